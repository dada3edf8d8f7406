"""A site's own mixture of a run's model and a specialist, trained where its images lie (Listo Zec et al. 2020).

Nothing is sent, and no client need have taken part in the run: the generalist is whatever one model the run left.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.image_source import open_pictures
from fedjets_flwr.data.transforms import AUGMENTATIONS
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.own_training import Held, fit_own, start_of
from fedjets_flwr.moe.specialist import NLL, build_mixture, filled
from fedjets_flwr.names import expert_name
from fedjets_flwr.personalize.bundle import MixtureCard
from fedjets_flwr.personalize.inference import Chunk, inputs_of, look, place
from fedjets_flwr.personalize.personaliser import Personaliser, card_of
from fedjets_flwr.runs.trained_run import TrainedRun
from fedjets_flwr.seeds import derive, torch_generator
from fedjets_flwr.tasks.image_classification import CROSS_ENTROPY

STOPPING_SHARE = 0.2
"""Share of the images that stops the training where ``partition.val-share`` sets none aside."""


def personalise_labelled(run: TrainedRun, images: object, device: str = "cpu") -> Personaliser:
    """Return a site's mixture (``specialist.*`` and ``adapt.*`` of the run) for images whose class folders tell labels.

    Its ``predictions`` are of the images that stopped the training, on which no weight was trained.

    Args:
        run: a trained run that left one model.
        images: a folder of class folders.
        device: where to compute, e.g. ``cuda``.

    Raises:
        FedjetsError: names what is wrong with the run or the images.
    """
    config, where = run.config, place(device)
    if run.num_experts != 1:
        raise FedjetsError(
            f"--labels: {run.folder.name} left {run.num_experts} experts, and a specialist goes beside one model;"
            " take a run of fedavg or specialist, say"
        )
    channels, height, width = run.spec.shape
    pictures = open_pictures(images, run.spec.classes, (channels, height, width))
    if pictures.labels is None:
        raise FedjetsError(f"--labels: {images}: the images lie in one folder for each class, named as it")
    chunks = list(look(run.common, pictures, config.common_expert.embedding, config.moe.trainable, where))
    stops, trains = _drawn(config, len(pictures.labels))
    train, stop = _parts(run, chunks, pictures.labels, stops, trains, where)
    architecture, trainable, seed = run.serving.architectures[0], config.moe.trainable, config.run.seed
    generalist = run.vectors[expert_name(0)]
    specialist = FlatModel(start_of(config, run.common, architecture, derive(seed, "local")).to(where))
    if config.specialist.start == "finetuned":
        specialist.load(generalist)
    torch.manual_seed(derive(seed, "adapt dropout"))
    order = [torch_generator(seed, "adapt", phase) for phase in range(2)]
    fit_own(specialist, train, stop, CROSS_ENTROPY, config.adapt, config.adapt.lr, order[0])
    mixture = build_mixture(architecture, trainable, config.specialist, derive(seed, "specialist's gate"))
    model = filled(mixture, specialist.vector, generalist, where)
    fit_own(model, train, stop, NLL, config.adapt, config.specialist.lr, order[1])
    model.module.eval().requires_grad_(False)
    told = MixtureCard(gate=config.specialist.gate, mix=config.specialist.mix)
    card = card_of(run, (0,), torch.ones(len(pictures.labels), 1), "top-1", "none", told)
    shares = torch.bincount(pictures.labels, minlength=len(run.spec.classes)) / len(pictures.labels)
    card = card.model_copy(update={"label_prior": tuple(shares.tolist())})
    made = Personaliser(card, run.common, None, {0: model}, where)
    return replace(made, predictions=made.answers(chunks, pictures).only(stops))


def _drawn(config: Config, count: int) -> tuple[Tensor, Tensor]:
    """Return which of a site's images stop the training, and which are trained on."""
    stopping = max(1, round((config.partition.val_share or STOPPING_SHARE) * count))
    if count <= stopping:
        raise FedjetsError(f"--labels: {count} images are too few to train on some and stop by others")
    drawn = torch.randperm(count, generator=torch_generator(config.run.seed, "own parts"))
    return drawn[:stopping].sort().values, drawn[stopping:].sort().values


def _parts(
    run: TrainedRun, chunks: list[Chunk], labels: Tensor, stops: Tensor, trains: Tensor, where: torch.device
) -> tuple[Held, Held]:
    """Return what the models are trained on, augmented as the run says, and what stops that."""
    config = run.config
    plain = torch.cat([inputs_of(chunk, run.common) for chunk in chunks]).to(where)
    targets = labels.to(where)
    augment, draws = AUGMENTATIONS[config.data.augment], torch_generator(config.run.seed, "adapt augment", device=where)
    pixels = torch.cat([chunk.pixels for chunk in chunks]).to(where) if config.data.augment != "none" else None

    def augmented(rows: Tensor) -> Tensor:
        if pixels is None:
            return plain[trains[rows]]
        return run.common.normalise(augment(pixels[trains[rows]], draws))

    return Held(augmented, targets[trains]), Held(lambda rows: plain[stops[rows]], targets[stops])
