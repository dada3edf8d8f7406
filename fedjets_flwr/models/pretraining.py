"""Central training of a common expert, stopped at the first crossing of a target accuracy."""

import hashlib
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.clients import open_dataset, without_held_out
from fedjets_flwr.data.datasets import Images
from fedjets_flwr.data.partition import held_out, public_samples
from fedjets_flwr.data.public_text import open_public_text
from fedjets_flwr.data.text_tokens import digest_of
from fedjets_flwr.data.transforms import AUGMENTATIONS
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import StrPath, made_once, written
from fedjets_flwr.models.architectures import build
from fedjets_flwr.models.calibration import fit_temperature, usual_entropy
from fedjets_flwr.models.common_expert import (
    COMMON_EXPERT,
    CommonExpert,
    accuracy_of,
    freeze,
    kept_common_expert,
    load_common_expert,
    logits_of,
)
from fedjets_flwr.models.device import device_of
from fedjets_flwr.models.expert import configured_architecture
from fedjets_flwr.models.language_pretraining import pretrain_language_model
from fedjets_flwr.models.transformer import LanguageArchitecture
from fedjets_flwr.seeds import derive, seed_layers, torch_generator

Progress = Callable[[str], None]


class TargetMissed(FedjetsError):
    """A common expert was trained for as long as allowed and stayed below its target.

    Attributes:
        best: as it was at its best.
    """

    def __init__(self, config: Config, best: CommonExpert) -> None:
        settings = config.common_expert
        super().__init__(
            f"common-expert.target-accuracy = {settings.target_accuracy}: the best of {settings.max_epochs} epochs was"
            f" {best.accuracy:.4f}; lower it, or raise common-expert.max-epochs or model.width"
        )
        self.best = best


def provide_common_expert(config: Config, progress: Progress) -> CommonExpert:
    """Return the common expert that the settings name, or train one and keep it in the cache, if no other run does.

    Raises:
        FedjetsError: the file does not fit the data set, or training never reached the target.
    """
    if config.common_expert.path or config.run.start_from:
        return named_common_expert(config)
    path = cached_path(config)
    if (found := kept_common_expert(path)) is None:
        with made_once(path, lambda: progress("waiting for the common expert that another run trains")):
            if (found := kept_common_expert(path)) is None:
                pretrain_into(path, config, progress)
    progress(f"common expert: {path}")
    return found or load_common_expert(path)


def pretrain_into(path: Path, config: Config, progress: Progress) -> CommonExpert:
    """Train a common expert and write it to a file; one that misses its target is written beside that.

    Raises:
        FedjetsError: the target was not reached; it says where the best one is.
    """
    try:
        expert = pretrain(config, progress)
    except TargetMissed as missed:
        beside = path.absolute().with_name(f"{path.stem}.below-target{path.suffix}")
        save_common_expert(missed.best, beside)
        raise FedjetsError(f"{missed}; or take that one by common-expert.path = {str(beside)!r}") from None
    save_common_expert(expert, path)
    return expert


def named_common_expert(config: Config) -> CommonExpert:
    """Return the common expert in the file ``common-expert.path``, or that of the run in ``run.start-from``.

    Raises:
        FedjetsError: it cannot be read, or does not fit the data set.
    """
    name, path = "common-expert.path", Path(config.common_expert.path)
    if not config.common_expert.path:
        name, path = "run.start-from", Path(config.run.start_from) / COMMON_EXPERT
        if not path.is_file():
            raise FedjetsError(f"run.start-from = {config.run.start_from!r}: no finished run; name the folder of one")
    expert = load_common_expert(path.expanduser())
    if config.of_text:
        _check_language_model(config, expert)
        return expert
    dataset = open_dataset(config)
    have = (expert.architecture.channels, expert.architecture.num_classes)
    if have != (dataset.shape[0], len(dataset.classes)):
        raise FedjetsError(
            f"{name} = {str(path)!r}: made for {have[0]} channels and {have[1]}"
            f" classes, but {dataset.name} has {dataset.shape[0]} and {len(dataset.classes)}"
        )
    return expert


def _check_language_model(config: Config, expert: CommonExpert) -> None:
    """Raise FedjetsError unless a common expert reads the tokens of the text, or tells them, and as many at once."""
    named = f"common-expert.path = {config.common_expert.path!r}"
    found, context = expert.architecture, config.language_model.context
    if not isinstance(found, LanguageArchitecture):
        raise FedjetsError(f"{named}: reads images, but data.name = {config.data.name!r}; leave it empty to train one")
    if config.text_elsewhere:
        if not expert.encodes:
            raise FedjetsError(f"{named}: tells no tokeniser, which sites need; make it anew with `fedjets pretrain`")
    elif found.vocabulary != (vocabulary := open_public_text(config).vocabulary):
        raise FedjetsError(
            f"{named}: made for {found.vocabulary} tokens, but the text has {vocabulary}; set text.vocabulary and"
            " text.tokens as they were, and give the same text"
        )
    elif expert.tokeniser and expert.tokeniser != open_public_text(config).tokeniser:
        raise FedjetsError(f"{named}: made for other tokens than those of the text; give the same text")
    if found.context != context:
        raise FedjetsError(
            f"{named}: reads {found.context} tokens at once; set language-model.context to that, it is {context}"
        )


def cached_path(config: Config) -> Path:
    """Return where a common expert trained for these settings is kept."""
    flat = config.flat()
    if config.of_text:
        decides = [(k, v) for k, v in sorted(flat.items()) if k.startswith("language-model.")]
        text = open_public_text(config)
        tokens = [config.text.tokens, config.text.vocabulary, digest_of(text.tokeniser)]
        named = repr([text.digest, *tokens, config.public_domains, config.text_elsewhere, config.common_expert.seed])
        digest = derive(0, named + repr(decides))
        return config.cache_dir / "common-experts" / f"transformer-{config.data.name}-{digest:016x}.safetensors"
    unused = ("common-expert.path", "common-expert.embedding")
    decides = [
        (k, v) for k, v in sorted(flat.items()) if k.startswith(("model.", "common-expert.")) and k not in unused
    ]
    if config.partition.public_share:
        decides += [("partition.public-share", config.partition.public_share), ("surety", "measured")]
    if config.data.name == "image-folder":  # others of that name hold the same images everywhere
        decides += [("images", _digest_of_images(config)), ("without", config.partition.held_out_domain)]
    digest = derive(0, repr([config.data.name, *decides]))
    return config.cache_dir / "common-experts" / f"{config.model.name}-{config.data.name}-{digest:016x}.safetensors"


def _digest_of_images(config: Config) -> str:
    """Return what tells a folder's images, their labels and the classes' names from any others."""
    dataset = open_dataset(config)
    found = hashlib.sha256(repr((dataset.shape, dataset.classes)).encode())
    for part in (dataset.train, dataset.test):
        found.update(str(len(part)).encode())
        for tensor in (part.pixels, part.labels):
            found.update(tensor.numpy())  # type: ignore[arg-type]  # an array is a buffer
    return found.hexdigest()


def save_common_expert(expert: CommonExpert, path: StrPath) -> None:
    """Write the file in one step, so that a reader never sees half of it."""
    with written(Path(path)) as file:
        file.write_bytes(expert.as_bytes)


def _parts(config: Config) -> tuple[Images, Images]:
    """Return what a common expert is trained on, and what stops that; a domain that is held out has no part in it."""
    dataset = open_dataset(config)
    if not config.partition.public_share:
        return without_held_out(config, dataset.train), without_held_out(config, dataset.test)
    public = public_samples(config, len(dataset.train))
    stops = held_out(public)
    rows = public[len(stops) :], stops
    trains, looks = (without_held_out(config, dataset.train.subset(some)) for some in rows)
    return trains, looks


def pretrain(config: Config, progress: Progress) -> CommonExpert:
    """Train on ``run.device`` until the accuracy on held-out samples first reaches ``common-expert.target-accuracy``.

    With ``partition.public-share`` it sees public samples alone, a fifth of them held out, which fit its temperature
    and tell how sure it usually is; otherwise it is trained on the train split, which the clients share, and stopped by
    the test split.

    With ``common-expert.max-epochs = 0`` it is the random start itself.

    Of text it is a language model, trained as ``language-model.*`` says.

    SGD with Nesterov momentum and a one-cycle rate. The paper states neither data nor recipe of its common experts; its
    73 % and 93 % columns are read here as two stopping points on the same pool.

    Raises:
        TargetMissed: the target was not reached in ``common-expert.max-epochs``.
    """
    if config.of_text:
        return pretrain_language_model(config, progress)
    progress(f"training a common expert ({config.model.name}) to {config.common_expert.target_accuracy:.0%}")
    settings, dataset = config.common_expert, open_dataset(config)
    architecture = configured_architecture(config, dataset.spec)
    device = device_of(config)
    model = build(architecture, derive(settings.seed, "common-expert")).to(device)
    expert = CommonExpert(model, architecture, dataset.mean, dataset.std, dataset.name, 0.0)
    generator = torch_generator(settings.seed, "common-expert-batches")
    on_gpu = device.type != "cpu"
    draws = torch_generator(settings.seed, "common-expert-augment", device=device) if on_gpu else generator
    augment = AUGMENTATIONS["crop" if dataset.name == "digits" else "crop-flip"]
    parts = _parts(config)
    if not all(len(part) for part in parts):
        share = config.partition.public_share
        raise FedjetsError(
            f"partition.public-share = {share:g}: too few images to train a common expert on; raise it"
            if share and len(dataset.train)
            else f"data.dir = {config.data.dir!r}: no images to train a common expert on in its train/ and test/;"
            " mend the path, or name a trained one by common-expert.path"
        )
    seed_layers(derive(settings.seed, "common-expert-layers"))
    train, test = (Images(part.pixels.to(device), part.labels.to(device)) for part in parts)
    if not settings.max_epochs:
        freeze(model)  # looking at it must not change its running statistics
        accuracy = accuracy_of(expert, test.pixels, test.labels)
        return replace(expert, model=model.cpu(), accuracy=accuracy, temperature=1.0)
    steps = max(1, len(train) // settings.batch_size)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=settings.max_epochs * steps, pct_start=min(0.3, 2 / settings.max_epochs)
    )
    check = max(1, math.ceil(steps / settings.checks_per_epoch))
    best, kept = -1.0, model.state_dict()
    for epoch in range(settings.max_epochs):
        order = torch.randperm(len(train), generator=generator)
        for step in range(steps):
            rows = order[step * settings.batch_size : (step + 1) * settings.batch_size]
            pixels = augment(train.pixels[rows], draws)
            model.train()
            loss = F.cross_entropy(model(expert.normalise(pixels)), train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if (step + 1) % check == 0 or step + 1 == steps:
                model.eval()
                accuracy = accuracy_of(expert, test.pixels, test.labels)
                if accuracy > best:
                    best, kept = accuracy, deepcopy(model.state_dict())
                progress(f"epoch {epoch + 1}/{settings.max_epochs}: held-out accuracy {accuracy:.4f}")
                if accuracy >= settings.target_accuracy:
                    return _finished(config, expert, accuracy, test)
    model.load_state_dict(kept)
    raise TargetMissed(config, _finished(config, expert, best, test))


def _finished(config: Config, expert: CommonExpert, accuracy: float, held_out: Images) -> CommonExpert:
    """Return a trained common expert, frozen and on the CPU; public samples that were held out say how sure it is."""
    done = replace(expert, model=freeze(expert.model.cpu()), accuracy=accuracy)
    on_cpu = Images(held_out.pixels.cpu(), held_out.labels.cpu())
    return _with_surety(done, on_cpu) if config.partition.public_share else done


def _with_surety(expert: CommonExpert, held_out: Images) -> CommonExpert:
    """Return a common expert that tells how sure it may be, and how sure it usually is."""
    temperature = fit_temperature(logits_of(expert, held_out.pixels), held_out.labels)
    usual = usual_entropy(expert.model, expert.normalise(held_out.pixels))
    return replace(expert, temperature=temperature, usual_entropy=usual)
