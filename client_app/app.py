"""The ClientApp: one handler per message type; a client that fails reports its own error and harms no other."""

import json
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from client_app.algorithms import algorithms
from client_app.attacks import poisoned
from client_app.choosing import choosing
from client_app.client import ClientContext, Work
from client_app.node import Node, local_settings, read_node
from client_app.participants import scored
from client_app.policy import Refused, policy_of
from client_app.queries import evaluate, inspect, prepare, route, vouch
from client_app.runtime import Runtime, common_expert_path, open_runtime, vector_store
from client_app.site import Site, open_site
from client_app.state import ADAPTED, TRAINED, ClientState
from client_app.validation import looking
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import written
from fedjets_flwr.models.common_expert import load_common_expert
from fedjets_flwr.models.device import imitates_precision
from fedjets_flwr.runs.private_folder import read_mark
from fedjets_flwr.seeds import derive, seed_layers
from fedjets_flwr.wire.messages import Job, Reply, Request, decode_request, encode_replies
from fedjets_flwr.wire.nodes import in_simulation
from fedjets_flwr.wire.transport import probe

app = ClientApp()
log = logging.getLogger("flwr")


@lru_cache(maxsize=1)
def _config(items: tuple[tuple[str, Scalar], ...]) -> Config:
    return Config.from_flat(dict(items))


def config_of(context: Context, message: Message | None = None) -> Config:
    """Return the settings of the run, built once per process; in a simulation a message may be of a run of its own."""
    settings: Mapping[str, Scalar] = context.run_config
    if message is not None and in_simulation():
        own = str(message.content.config_records["request"].get("settings", ""))
        settings = json.loads(own) if own else settings
    settings = local_settings(settings, context.node_config, in_simulation())
    return _config(tuple(sorted(settings.items())))


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Say which clients this node can run, and whether it holds the common expert."""
    request = message.content.config_records["request"]
    digest = str(request["common-expert"])
    config = config_of(context, message)
    node = read_node(context.node_config, config, in_simulation())
    policy_of(context.node_config)  # one that cannot be read is told at once
    host = ConfigRecord(
        {
            "any-client": node.client is None,
            "clients": [] if node.client is None else [node.client],
            "shared": probe(str(request["shared-folder"])),
            "sees-private": read_mark(config, str(request.get("private", ""))),
            "has-common-expert": bool(digest) and common_expert_path(config, digest).is_file(),
            "opted-out": node.opted_out,
            "imitates": imitates_precision(config),
        }
    )
    return Message(RecordDict({"host": host}), reply_to=message)


Handler = Callable[[Message, Context], Message]


def _serve(work: Work, stage: int | None = None) -> Handler:
    """Return a handler that runs ``work`` for each client of the message; a ``stage`` of the round may keep state."""

    def handle(message: Message, context: Context) -> Message:
        config, kind = config_of(context, message), message.metadata.message_type
        node = read_node(context.node_config, config, in_simulation())
        try:
            site = Site() if in_simulation() else open_site(message, context, config, node)
        except Refused as refusal:
            log.warning("%s: %s", kind, refusal)
            # An error, not a reply: nothing that came along is kept, and the server must not think so.
            return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, str(refusal)), reply_to=message)
        request = decode_request(message.content, vector_store(config, node))
        runtime, allowed = _open(config, node, request.facts, message), site.within(kind, work)
        replies = (_reply(allowed, runtime, request, job, stage) for job in request.jobs)
        # Each reply is encoded before the next client writes over the runtime's models.
        return Message(encode_replies(site.noted(replies), request.transport), reply_to=message)

    return handle


def _train(train: Work) -> Handler:
    """Return a handler of train messages; in a simulation some clients may be made to attack."""
    works = (looking(train), poisoned(looking(train)))
    honest, simulated = (_serve(choosing(work), TRAINED) for work in works)

    def handle(message: Message, context: Context) -> Message:
        attacked = in_simulation() and config_of(context, message).attack.kind != "none"
        return (simulated if attacked else honest)(message, context)

    return handle


def _reply(work: Work, runtime: Runtime, request: Request, job: Job, stage: int | None) -> Reply:
    try:
        kept = None
        if stage is not None and (start := request.facts.get("private")):
            kept = ClientState(runtime.config, start, job.client, (request.server_round, stage))
        # What a client makes for itself it makes of all that it has; anything else is the federation's.
        part = "train" if stage == ADAPTED else "shared"
        context = ClientContext(runtime, job, request.server_round, runtime.data(job.client, part), kept)
        seed_layers(derive(runtime.config.run.seed, "dropout", request.server_round, job.client))
        update = work(context, request.vectors)
        if update.state:
            context.keep(update.state)
        return Reply(job.client, update.vectors, update.numbers)
    except Refused as refusal:
        log.warning("client %d: %s", job.client, refusal)
        return Reply(job.client, {}, {}, error=str(refusal))
    except Exception as error:  # one client's failure must not take its node's other clients along
        log.exception("client %d failed", job.client)
        return Reply(job.client, {}, {}, error=f"{type(error).__name__}: {error}")


def _open(config: Config, node: Node, facts: Mapping[str, str], message: Message) -> Runtime:
    digest = facts["common-expert"]
    if (record := message.content.array_records.get("common-expert")) is not None:
        with written(common_expert_path(config, digest)) as file:
            file.write_bytes(record["safetensors"].data)
            if load_common_expert(file).digest != digest:
                raise FedjetsError("the common expert arrived damaged")
    return open_runtime(config, node, digest, facts["experts"], facts["layout"], facts.get("samples", ""))


app.query("prepare")(_serve(prepare))
app.query("route")(_serve(route))
app.query("vouch")(_serve(vouch))
app.query("inspect")(_serve(inspect))
app.evaluate()(_serve(evaluate))
for _name, _algorithm in algorithms().items():
    if _algorithm.train is not None:
        app.train(_name)(_train(_algorithm.train))
    if _algorithm.query is not None:
        app.query(_name)(_serve(_algorithm.query))
    app.evaluate(_name)(_serve(scored(_algorithm.adapt), ADAPTED))
