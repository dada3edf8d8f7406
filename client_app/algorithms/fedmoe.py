"""FedMoE's client half (arXiv 2408.11304): a language model that holds some of the experts."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice

from torch import Tensor

from client_app.client import Adapted, ClientContext, Update
from client_app.participants import answering, predictions
from client_app.training import train_one
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.models.transformer import LanguageArchitecture, Transformer, joined, parted, sets_of, transformer_of
from fedjets_flwr.moe.local_training import Adam, batches, fit, rate
from fedjets_flwr.moe.lora import LoraProbe
from fedjets_flwr.wire.messages import Number


def train(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
    """Train the model of the job's vectors; tell where tokens went, and what the validation part says, if asked."""
    model, asked = _model(context, vectors), context.job.numbers
    sent = transformer_of(model.module).sent
    sent.zero_()
    numbers: dict[str, Number] = {"loss": train_one(context, model), "num-examples": len(context.data)}
    if asked.get("used"):
        numbers["used"] = sent.flatten().tolist()
    if asked.get("activation"):
        numbers |= _looked(context, model, sent)
    architecture = transformer_of(model.module).architecture
    return Update(parted(model.vector, architecture), numbers)


def adapt(context: ClientContext, vectors: Mapping[str, Tensor]) -> Adapted:
    """Adapt nothing: the client's part of the model answers as it came."""
    return answering(_model(context, vectors))


def query(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
    """Tell the domain of the client's text and, of one that was sent the whole model, which experts it activates."""
    domain = int(context.data.samples.columns[0])
    numbers: dict[str, Number] = {"num-examples": len(context.data), "domain": domain}
    if context.job.vectors:
        probed, model = PROBES[context.config.fedmoe.probe](context, vectors)
        # Without the load-balance loss: what counts is what the text prefers.
        steps, data, inputs = context.config.fedmoe.probe_steps, context.data, context.inputs()
        order = batches(len(data), context.config.train.batch_size, steps, context.generator("probe"))

        def losses_of(rows: Tensor) -> list[Tensor]:
            return [context.task.loss(probed.module(inputs(rows)), data.targets[rows], data.offset)]

        adam = Adam(probed, _probe_rate(context))
        fit([probed], [adam], islice(order, steps), losses_of)
        numbers["activation"] = _looked(context, probed, model.sent)["activation"]
    return Update(numbers=numbers)


def _probe_rate(context: ClientContext) -> float:
    """Return the rate of finding out: that of training makes sense if that is Adam's, too."""
    config = context.config
    usual = rate(config.train, context.server_round, config.run.rounds) if config.train.optimizer == "adam" else 0.001
    return config.fedmoe.probe_lr or usual


def _architecture(context: ClientContext) -> LanguageArchitecture:
    architecture = context.runtime.architecture(0)
    assert isinstance(architecture, LanguageArchitecture)
    return architecture


def _model(context: ClientContext, vectors: Mapping[str, Tensor]) -> FlatModel:
    """Return the model that holds the experts of the job."""
    whole = _architecture(context)
    sets = sets_of(context.job.vectors, whole.switch_layers)
    return context.runtime.model(replace(whole, held=sets), joined(vectors, sets))


def _looked(context: ClientContext, model: FlatModel, sent: Tensor) -> dict[str, Number]:
    """Return what a model makes of the validation part: bits per byte, and the share of tokens of each expert.

    ``sent``: counts the tokens that go to each expert of the model, (L, E).
    """
    sent.zero_()
    val = context.on("val")
    told = context.task.told(predictions(model, val), val.data.samples)
    shares = sent.double() / sent.sum(dim=1, keepdim=True)
    return {"score": told["bits-per-byte"], "activation": shares.flatten().tolist()}


def _lora(context: ClientContext, vectors: Mapping[str, Tensor]) -> tuple[FlatModel, Transformer]:
    """Return adapters of the whole model, and the model below."""
    whole = transformer_of(_model(context, vectors).module)
    probe = LoraProbe(whole, context.config.fedmoe.rank, context.generator("adapters"))
    return FlatModel(probe), probe.frozen


def _full(context: ClientContext, vectors: Mapping[str, Tensor]) -> tuple[FlatModel, Transformer]:
    """Return a copy of the whole model, all of which is trained."""
    model = context.copy(0, _model(context, vectors).vector)
    transformer = transformer_of(model.module)
    transformer.balance = 0.0
    return model, transformer


PROBES: Mapping[str, Callable[[ClientContext, Mapping[str, Tensor]], tuple[FlatModel, Transformer]]] = {
    "lora": _lora,
    "full": _full,
}
"""What is trained to find out which experts a text activates, and what counts that."""
