"""A site's personalised model: made from a trained run and unlabelled images, saved as a bundle, used anywhere.

    personaliser = personalise(open_run("runs/mine"), "images")
    personaliser.save("bundle")
    Personaliser.load("bundle").predict("more-images").probabilities

Experts are chosen, and answer, as in the run's own evaluation: by the same functions, in the same batches.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

import safetensors.torch
import torch
from torch import Tensor, nn

from fedjets_flwr.config.sections import Model
from fedjets_flwr.data.image_source import Pictures, open_pictures
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import StrPath
from fedjets_flwr.models.architectures import build, tail
from fedjets_flwr.models.common_expert import CommonExpert
from fedjets_flwr.models.expert import build_configured_gate
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.adabn import adapt_batch_norm, batch_norms
from fedjets_flwr.moe.embedding import adapted_logits
from fedjets_flwr.moe.gating import READ_OUTS, keeps_common, surest, top_k_experts
from fedjets_flwr.moe.label_prior import ESTIMATES, estimates, with_prior
from fedjets_flwr.moe.metrics import STATISTICS
from fedjets_flwr.moe.mixture import COMMON, Mixture, gate_scores, predict
from fedjets_flwr.names import expert_name
from fedjets_flwr.personalize import bundle
from fedjets_flwr.personalize.bundle import Card, MixtureCard
from fedjets_flwr.personalize.inference import Chunk, Predictions, answer, inputs_of, look, place
from fedjets_flwr.printable import one_line
from fedjets_flwr.runs.trained_run import TrainedRun


@dataclass(frozen=True)
class Personaliser:
    """The common expert, the gate (if the method has one) and the K experts of one site, ready to answer.

    Attributes:
        card: what it is, and how it answers.
        predictions: on the images that it was made for; None once it was saved and loaded.
    """

    card: Card
    common: CommonExpert
    gate: FlatModel | None
    experts: Mapping[int, FlatModel]
    device: torch.device
    predictions: Predictions | None = None

    @classmethod
    def load(cls, folder: StrPath, device: str = "cpu") -> "Personaliser":
        """Return the personalised model in a bundle.

        Raises:
            FedjetsError: a file is missing, altered, or does not fit the others.
        """
        where, folder = place(device), Path(folder)
        card, files = bundle.read_bundle(folder)
        common = bundle.read_common(card, files[bundle.COMMON], folder / bundle.COMMON)
        gate = bundle.read_gate(card, common, files[bundle.GATE], folder / bundle.GATE) if card.gated else None
        experts = {}
        for m in card.experts:
            name = bundle.expert_file(m)
            experts[m] = FlatModel(bundle.read_expert(card, m, files[name], folder / name).to(where))
        return cls(card, common, FlatModel(gate.to(where)) if gate else None, experts, where)

    def predict(self, images: object) -> Predictions:
        """Return the answers to images that nobody labelled, one or many.

        A prior is the card's ``label_prior``, estimated when the model was made, and not estimated anew: the answer to
        an image does not depend on which other images are asked about, and one image is as good as thousands.

        Args:
            images: a folder, a file, a sequence of files, or uint8 pixels (n, c, h, w) of the card's shape.

        Raises:
            FedjetsError: there is no image, or one cannot be read.
        """
        pictures = open_pictures(images, self.card.classes, self.card.image_shape)
        chunks = look(self.common, pictures, self.card.embedding, self.card.trainable, self.device)
        return self.answers(chunks, pictures)

    def answers(self, chunks: Iterable[Chunk], pictures: Pictures) -> Predictions:
        """Return the answers to images that the common expert has seen."""
        return self._predictions(*self._answer(chunks), pictures)

    def save(self, folder: StrPath) -> None:
        """Write the bundle to a new folder.

        Raises:
            FedjetsError: the folder holds something already, or cannot be written.
        """
        files = {bundle.COMMON: self.common.as_bytes}
        if self.gate is not None:
            files[bundle.GATE] = _as_bytes(self.gate)
        files |= {bundle.expert_file(m): _as_bytes(expert) for m, expert in self.experts.items()}
        if self.predictions is not None:
            files[bundle.PREDICTIONS] = self.predictions.csv()
        bundle.write_bundle(folder, self.card, files)

    def _answer(self, chunks: Iterable[Chunk]) -> tuple[Tensor, Tensor]:
        c, models = self.card, [self.experts[m] for m in self.card.experts]
        gate = self.gate.module if self.gate else torch.tensor(c.gate_scores)
        return answer(chunks, self.common, Mixture(models, c.experts, gate, c.read_out), self.device)

    def _predictions(self, probs: Tensor, experts: Tensor, pictures: Pictures) -> Predictions:
        if self.card.prior != "none":
            probs = with_prior(probs, torch.tensor(self.card.label_prior, dtype=torch.float64))
        # The likeliest class before float32 can make a tie of two, as in the run's evaluation.
        classes = probs.argmax(dim=1)
        return Predictions(probs.float(), classes, experts, self.card.classes, pictures.files, pictures.labels)


def personalise(
    run: TrainedRun,
    images: object,
    experts: int = 0,
    read_out: str = "",
    prior: str = "",
    device: str = "cpu",
    statistics: str = "",
) -> Personaliser:
    """Return a site's personalised model: the experts that the run's method serves to a client with these images.

    Labels are not read; where class folders tell them, they only score ``predictions``.

    Args:
        run: a trained run.
        images: as in :meth:`Personaliser.predict`; they choose the experts and the label prior.
        experts: K; 0: as many as the method serves.
        read_out: how they answer (a key of ``gating.READ_OUTS``); empty: as in the run.
        prior: ``none`` or how class shares are estimated (a key of ``label_prior.ESTIMATES``); empty: as in the run.
        device: where to compute, e.g. ``cuda``.
        statistics: of the experts' batch norm: ``trained``, or ``own``, those of these images, which the model keeps;
            empty: as in the run.

    Raises:
        FedjetsError: names the option, file or setting that is wrong.
    """
    config, where = run.config, place(device)
    read_out = read_out or config.personalize.read_out or run.serving.read_out
    prior = prior or config.personalize.prior
    if read_out not in READ_OUTS:
        raise FedjetsError(f"--read-out {read_out}: no such read-out; choose one of {', '.join(READ_OUTS)}")
    asked, statistics = statistics, statistics or config.personalize.statistics
    if prior not in ("none", *ESTIMATES):
        raise FedjetsError(f"--prior {prior}: no such correction; choose one of none, {', '.join(ESTIMATES)}")
    if statistics not in STATISTICS:
        raise FedjetsError(f"--statistics {statistics}: choose {' or '.join(STATISTICS)}")
    channels, height, width = run.spec.shape
    pictures = open_pictures(images, run.spec.classes, (channels, height, width))
    chunks = list(look(run.common, pictures, config.common_expert.embedding, config.moe.trainable, where))
    gate = _gate(run, where)
    embedding = torch.cat([chunk.seen.embedding for chunk in chunks])
    scores = gate_scores(gate.module if gate else _surest(run, chunks, where, statistics), embedding, where)
    models = {m: _trained(run, m, where) for m in _choose(run, scores, experts, read_out)}
    if asked == "own" and not any(batch_norms(model.module) for model in models.values()):
        raise FedjetsError("--statistics own: it is about batch norm, of which the experts have none; leave it out")
    if read_out == "familiar":
        first = next(iter(models))
        keep = _keeps_common(run, first, chunks, where)
        read_out, models = (COMMON, {first: models[first]}) if keep else ("top-1", models)
    if statistics == "own" or read_out == "surest":
        inputs = _inputs(run, chunks, where)
        if statistics == "own":
            for model in models.values():
                adapt_batch_norm(model.module, inputs.__getitem__, len(inputs))
        if read_out == "surest":  # of these images; from now on it answers every other one too
            best = list(models)[int(surest(predict(list(models.values()), inputs.__getitem__, len(inputs))).argmax())]
            models, read_out = {best: models[best]}, "top-1"
    unread = Personaliser(card_of(run, tuple(models), scores, read_out, prior), run.common, gate, models, where)
    probs, answered = unread._answer(chunks)
    shares = estimates(probs)[prior if prior != "none" else "em"]
    card = unread.card.model_copy(update={"label_prior": tuple(shares.clamp(0, 1).tolist())})
    made = replace(unread, card=card)
    return replace(made, predictions=made._predictions(probs, answered, pictures))


def _keeps_common(run: TrainedRun, expert: int, chunks: Sequence[Chunk], where: torch.device) -> bool:
    """Return whether the images are more familiar to the common expert than to the gate's first choice.

    Raises:
        FedjetsError: the run did not ask how sure experts usually are.
    """
    usual, common = run.usual, run.common
    if not usual and run.config.personalize.read_out == "familiar":
        return False  # no anchor answered, and the run's own clients kept none either
    if not usual or math.isnan(common.usual_entropy):
        raise FedjetsError(
            f"{run.folder}: its anchors were not asked how sure their experts usually are, which the read-out familiar"
            " compares with; train with personalize.read-out = 'familiar', or choose another --read-out"
        )
    inputs, own = _inputs(run, chunks, where), _trained(run, expert, where)
    adapt_batch_norm(own.module, inputs.__getitem__, len(inputs))
    pixels = torch.cat([chunk.pixels for chunk in chunks])
    adapted = adapted_logits(common.model, common.normalise(pixels).to(where).__getitem__, len(pixels))
    told = (usual.get(expert, median(usual.values())), common.usual_entropy)
    return keeps_common(predict([own], inputs.__getitem__, len(inputs))[0], adapted.softmax(1), told)


def _surest(run: TrainedRun, chunks: Sequence[Chunk], where: torch.device, statistics: str) -> Tensor:
    """Return the scores of a run's M models where no gate gives any, (M,): 1 for the one that is surest.

    ``statistics``: of the batch norm with which they are compared, that with which the chosen one will answer.
    """
    if run.num_experts == 1:
        return torch.ones(1)
    models, inputs = [_trained(run, m, where) for m in range(run.num_experts)], _inputs(run, chunks, where)
    if statistics == "own":
        for model in models:
            adapt_batch_norm(model.module, inputs.__getitem__, len(inputs))
    return surest(predict(models, inputs.__getitem__, len(inputs)))


def _inputs(run: TrainedRun, chunks: Sequence[Chunk], device: torch.device) -> Tensor:
    """Return what experts read of images, (n, ...)."""
    return torch.cat([inputs_of(chunk, run.common) for chunk in chunks]).to(device)


def _choose(run: TrainedRun, scores: Tensor, experts: int, read_out: str) -> tuple[int, ...]:
    """Return the K experts that the run's method serves: the gate's choice, or all of them in order.

    Where one answers for all images, as without a gate, the others are left out.
    """
    total = run.num_experts
    if experts and not 1 <= experts <= total:
        raise FedjetsError(f"--experts {experts}: the run has {total}; choose 1 to {total}")
    if not experts and "gate" not in run.vectors and read_out == "top-1":
        experts = 1
    if not experts and not run.serving.routed:
        return tuple(range(total))
    return top_k_experts(scores, experts or run.config.moe.top_k)


def _gate(run: TrainedRun, device: torch.device) -> FlatModel | None:
    if "gate" not in run.vectors:
        return None
    if run.config.gate.mode == "oracle":
        raise FedjetsError(
            f"{run.folder}: gate.mode = 'oracle' reads labels, which a site has not; train with 'learned'"
        )
    return _held(run, "gate", build_configured_gate(run.config, run.common, run.num_experts), device)


def _trained(run: TrainedRun, expert: int, device: torch.device) -> FlatModel:
    untrained = tail(build(run.serving.architectures[expert], 0), run.config.moe.trainable)
    return _held(run, expert_name(expert), untrained, device)


def _held(run: TrainedRun, name: str, module: nn.Module, device: torch.device) -> FlatModel:
    """Return a model that holds a vector of the run's checkpoint, rounded as it was for the run's own sites."""
    model, vector = FlatModel(module.to(device).eval().requires_grad_(False)), run.vectors.get(name)
    if vector is None or vector.shape != model.vector.shape:
        raise FedjetsError(f"{run.folder / 'checkpoints'}: {name} does not fit config.json; the run is damaged")
    model.load(vector.to(getattr(torch, run.config.transport.dtype)))
    return model


def card_of(
    run: TrainedRun,
    chosen: tuple[int, ...],
    scores: Tensor,
    read_out: str,
    prior: str,
    mixture: MixtureCard | None = None,
) -> Card:
    """Return what a bundle says of itself, before class shares are estimated.

    Args:
        run: whose experts they are.
        chosen: their ids.
        scores: of all experts, for each image of the site, (n, M).
        read_out: how they answer.
        prior: how their answers are corrected.
        mixture: set if the one expert is mixed with a specialist that was trained on the site's labels.
    """
    c, spec, dataset, name = run.config, run.spec, run.summary["dataset"], one_line(run.folder.name)
    models = [Model(name=a.name, width=a.width, norm=a.norm, stem=a.stem)  # type: ignore[arg-type]
              for a in (run.serving.architectures[m] for m in chosen)]  # fmt: skip
    made = (
        f"without labels: {len(chosen)} of {run.num_experts} experts of the federated run {name}"
        f" ({c.strategy.name} on {dataset}), chosen for {len(scores)} images."
        if mixture is None
        else f"by its labels: the model of the federated run {name} ({c.strategy.name} on {dataset}), mixed"
        f" with a specialist that was trained on {len(scores)} images and never sent."
    )
    answering = (
        f"The experts answer by {read_out}"
        if read_out != COMMON
        else "The common expert, to which they are more familiar, answers"
    )
    about = (
        f"An image classifier personalised for one site {made}"
        f" It tells {len(spec.classes)} classes apart on images of {spec.shape[0]} channels and {spec.shape[1]} x"
        f" {spec.shape[2]} pixels. {answering};"
        f" {'nothing' if prior == 'none' else 'label_prior'} corrects their probabilities."
        " Use it with `fedjets predict`, `fedjets export` or fedjets_flwr.personalize.personaliser."
    )
    return Card(
        about=about,
        strategy=c.strategy.name,
        dataset=dataset,
        run=name,
        rounds=run.summary["rounds"],
        seed=c.run.seed,
        weights_hash=run.summary["weights_hash"],
        classes=spec.classes,
        image_shape=spec.shape,  # type: ignore[arg-type]
        experts=chosen,
        gated="gate" in run.vectors and mixture is None,
        gate_scores=tuple(scores.double().mean(dim=0).clamp(0, 1).tolist()),
        read_out=read_out,  # type: ignore[arg-type]
        prior=prior,  # type: ignore[arg-type]
        label_prior=(1 / len(spec.classes),) * len(spec.classes),
        images=len(scores),
        trainable=c.moe.trainable,
        embedding=c.common_expert.embedding,
        model=models[0],
        models=tuple(models) if len(set(models)) > 1 else (),
        mixture=mixture,
        neck=run.serving.architectures[chosen[0]].neck,  # type: ignore[arg-type]
        versions={name: version(name) for name in ("fedjets-flwr", "torch", "torchvision", "numpy", "safetensors")},
    )


def _as_bytes(model: FlatModel) -> bytes:
    tensors = model.module.state_dict()
    return safetensors.torch.save({name: tensor.cpu().clone() for name, tensor in tensors.items()})
