"""What settings must agree in with each other; each rule's message names a setting and the mend.

What a setting may be by itself stands in its section; what one method asks for, in the method's ``validate``.
"""

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from fedjets_flwr.config.sections import MOST_PARTS, OWN_DATA

if TYPE_CHECKING:
    from fedjets_flwr.config.schema import Config

Rule = tuple[bool, str]
"""Whether it is kept, and the message if not."""
LONGEST_NAME = 100
"""Bytes of a run's name; file systems take 255, and a number or an ending is added to it."""


def broken(config: "Config") -> str:
    """Return the message of the first rule that settings break, or nothing."""
    subjects = (_text, _run, _cohort, _data, _aggregation, _partition, _participants, _language_model, _training)
    rules = chain.from_iterable(subject(config) for subject in subjects)
    return next((message for kept, message in rules if not kept), "")


def _text(config: "Config") -> Iterator[Rule]:
    """Before all others, which send to settings that text has not; what is made for images alone is refused."""
    if not config.of_text:
        return
    public, most, context = config.partition.public_share, config.text.target_tokens, config.language_model.context
    yield (
        public == 0 or (public == 1 and not config.of_tasks),
        f"partition.public-share = {public:g}: some text is public anyway; set it to 0"
        + (", or to 1 where every client has text of its own" * (not config.of_tasks)),
    )
    yield (
        set(config.public_domains) <= set(config.text_domains) and not (config.of_tasks and config.text.public_domains),
        f"text.public-domains = {config.text.public_domains!r}: give some of text.domains ="
        f" {config.text.domains!r}, or none for tasks",
    )
    yield (
        config.data.name == "task-folder" or not config.text_scores,
        f"text.scores = {config.text.scores!r}: is for data.name = 'task-folder'; leave it empty",
    )
    of_images = {
        "moe.trainable": config.moe.trainable != "all",
        "train.logit-adjust": config.train.logit_adjust,
        "partition.private-share": config.partition.private_share > 0,
        "aggregation.rule": config.aggregation.rule == "validated",
        "attack.kind": config.attack.kind == "label-flip",
        "cohort.anchor-selection": config.cohort.anchor_selection != "partition",
        "run.start-from": bool(config.run.start_from),
    }
    flat, usual = config.flat(), type(config)().flat()
    for key, wrong in of_images.items():
        yield (
            not wrong,
            f"{key} = {flat[key]!r}: data.name = {config.data.name!r} has no such thing; set it to {usual[key]!r}",
        )
    yield (
        not config.of_tasks or most + 1 < context,
        f"text.target-tokens = {most}: leaves no room for an input in language-model.context = {context}; lower it",
    )


def _run(config: "Config") -> Iterator[Rule]:
    run = config.run
    yield (
        is_name(run.name),
        f"run.name = {run.name[:200]!r}: give a plain name of a folder, of at most {LONGEST_NAME} bytes,"
        " without / or \\ and not beginning with a dot; run.output-dir says where it lies",
    )
    yield (
        is_name(config.strategy.name),
        f"strategy.name = {config.strategy.name[:200]!r}: no name of a method; `fedjets presets` tells some",
    )
    yield (
        not (run.resume and run.overwrite),
        "run.overwrite = true: not together with run.resume; leave one of them out",
    )
    yield (
        bool(run.rounds or run.start_from or config.of_text),  # a language model is there already
        "run.rounds = 0: there is nothing to score without run.start-from; name a finished run there",
    )
    yield (
        not (run.start_from and config.common_expert.path),
        f"common-expert.path = {config.common_expert.path!r}: run.start-from brings its own; leave one out",
    )
    yield (
        not (run.start_from and config.privacy.noise_multiplier),
        "run.start-from: the models that it names were trained without this run's noise, and would be handed"
        " out all the same; leave it out, or set privacy.noise-multiplier to 0",
    )


def _cohort(config: "Config") -> Iterator[Rule]:
    moe, cohort, clients, anchors = config.moe, config.cohort, config.partition.clients, config.num_anchors
    yield moe.top_k <= moe.experts, f"moe.top-k = {moe.top_k}: more than moe.experts = {moe.experts}; lower it"
    yield (
        cohort.anchors <= anchors,
        f"cohort.anchors = {cohort.anchors}: only {anchors} anchor clients exist (one per expert); lower it",
    )
    yield (
        cohort.sampling != "one-per-domain" or (config.of_text and not config.text_elsewhere),
        "cohort.sampling = 'one-per-domain': only text.domains that are dealt to clients are known; set it to"
        " 'uniform'",
    )
    yield clients >= anchors, f"partition.clients = {clients}: fewer than the {anchors} anchor clients; raise it"
    yield (
        cohort.anchors + cohort.normals >= 1,
        "cohort.anchors + cohort.normals = 0: a round needs at least one client; raise one of them",
    )
    yield (
        cohort.normals <= clients - anchors,
        f"cohort.normals = {cohort.normals}: only {clients - anchors} normal clients exist"
        " (partition.clients - anchors); lower it",
    )


def _data(config: "Config") -> Iterator[Rule]:
    data = config.data
    yield (
        config.moe.trainable == "all" or data.augment == "none",
        f"data.augment = {data.augment!r}: tails over a frozen trunk read cached features;"
        " set it to 'none' or moe.trainable to 'all'",
    )
    yield (
        data.name != "image-folder" or len(set(config.class_names)) == len(config.class_names) > 1,
        f"data.classes = {data.classes!r}: image-folder needs two or more different names, e.g. 'cat,dog'",
    )


def _aggregation(config: "Config") -> Iterator[Rule]:
    rule, partition = config.aggregation.rule, config.partition
    validated = "aggregation.rule = 'validated': the"
    yield (
        rule != "validated" or partition.public_share > 0,
        f"{validated} server needs samples that no client holds; set"
        " partition.public-share to 0.2, say, or to 1 where all clients are elsewhere",
    )
    yield (
        rule != "validated" or partition.validation_clients == 0,
        f"{validated} server judges by, and trains the gate on, the public samples that validation clients hold; set"
        " partition.validation-clients to 0",
    )
    yield (
        rule != "validated" or partition.name != "domains" or config.data.name in OWN_DATA,
        f"{validated} public samples are of none of partition.domains, and honest updates on other domains would be"
        " refused; choose another rule or partition.name",
    )
    yield (
        config.aggregation.bn == "mean" or rule == "mean",
        f"aggregation.bn = 'pooled': only with aggregation.rule = 'mean', not {rule!r}; set one of them to 'mean'",
    )


def _partition(config: "Config") -> Iterator[Rule]:
    partition, domains = config.partition, config.domain_names
    yield (
        partition.val_share + partition.test_share < 1,
        f"partition.val-share + partition.test-share = {partition.val_share + partition.test_share:g}: nothing"
        " is left to train on; lower one of them",
    )
    yield (
        not (partition.opt_out or partition.private_share) or not config.starts_from_clients,
        "partition.opt-out, partition.private-share: the common expert would be trained on what clients keep"
        " out; set partition.public-share to 0.2, say, common-expert.path, or common-expert.max-epochs to 0",
    )
    yield (
        partition.name != "domains" or len(set(domains)) == len(domains) > 1,
        f"partition.domains = {partition.domains!r}: give two or more different ones",
    )
    yield (
        partition.held_out_domain in ("", *domains),
        f"partition.held-out-domain = {partition.held_out_domain!r}: none of partition.domains = {partition.domains!r}",
    )
    yield (
        partition.unseen_domains <= len(domains),
        f"partition.unseen-domains = {partition.unseen_domains}: there are {len(domains)}; lower it",
    )


def _participants(config: "Config") -> Iterator[Rule]:
    participants, clients = config.participants, config.partition.clients
    yield (
        participants.clients <= clients,
        f"participants.clients = {participants.clients}: only {clients} training clients exist; lower it",
    )
    yield (
        not participants.tuned or config.of_text,
        f"participants.tuned = true: only of text, and data.name = {config.data.name!r}; set it to false",
    )


def _language_model(config: "Config") -> Iterator[Rule]:
    model = config.language_model
    yield (
        len(set(config.text_domains)) == len(config.text_domains) > 0,
        f"text.domains = {config.text.domains!r}: give one or more different ones",
    )
    yield (
        model.width % model.heads == 0,
        f"language-model.heads = {model.heads}: does not divide language-model.width = {model.width}; set 1, 2 or 4,"
        " say",
    )
    yield (
        model.layers + model.switch_layers * model.experts <= MOST_PARTS,
        f"language-model.experts = {model.experts}: with language-model.switch-layers = {model.switch_layers} more than"
        f" {MOST_PARTS} layers and experts; lower it",
    )
    yield (
        model.switch_layers <= model.layers,
        f"language-model.switch-layers = {model.switch_layers}: more than language-model.layers = {model.layers};"
        " lower it",
    )


def _training(config: "Config") -> Iterator[Rule]:
    train, fedmoe = config.train, config.fedmoe
    yield (
        train.optimizer == "sgd" or train.weight_decay == 0,
        f"train.weight-decay = {train.weight_decay:g}: train.optimizer = {train.optimizer!r} takes none; set it to 0",
    )
    yield (
        bool(config.memory_shares) and all(0 < share <= 1 for share in config.memory_shares),
        f"fedmoe.memory = {fedmoe.memory!r}: give one or more numbers above 0 and up to 1, e.g. '0.5,1'",
    )


def is_name(text: str) -> bool:
    """Return whether a text is empty, or can name a folder and nothing but one below its parent."""
    return not text or (
        text.isprintable()
        and len(text.encode()) <= LONGEST_NAME
        and not text.startswith(".")
        and not set(text) & {*"/\\"}
    )
