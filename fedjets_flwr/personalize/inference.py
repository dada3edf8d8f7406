"""What a site's experts answer, image by image: the run's own evaluation without its labels."""

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedjets_flwr.data.image_source import Pictures
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.backbone import Backbone
from fedjets_flwr.models.common_expert import CommonExpert
from fedjets_flwr.moe.embedding import Embedded, compute, embedded
from fedjets_flwr.moe.mixture import COMMON, Mixture, gate_scores, predict, read
from fedjets_flwr.printable import reason

_FORMULA = ("=", "+", "-", "@")
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}

CHUNK = 512
"""Images in memory at a time: the batch of the run's evaluation, so that the sums are the same."""


@dataclass(frozen=True)
class Predictions:
    """Answers to n images.

    Attributes:
        probabilities: (n, C) float32.
        classes: index of the likeliest class, (n,) int64.
        experts: id of the expert that the gate trusts most with each image, (n,) int64; under ``top-1`` it answered;
            -1: the common expert did.
        names: names of the C classes.
        files: the images' files, relative to their folder; empty for pixels.
        labels: (n,) int64 where class folders tell them, for scoring alone.
    """

    probabilities: Tensor
    classes: Tensor
    experts: Tensor
    names: tuple[str, ...]
    files: tuple[str, ...] = ()
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.classes)

    def only(self, rows: Tensor) -> "Predictions":
        """Return the answers to some of the images, by position, (m,) int64."""
        return replace(
            self,
            probabilities=self.probabilities[rows],
            classes=self.classes[rows],
            experts=self.experts[rows],
            files=tuple(self.files[row] for row in rows.tolist()) if self.files else (),
            labels=None if self.labels is None else self.labels[rows],
        )

    @property
    def accuracy(self) -> float | None:
        """Share of right answers, if labels are known."""
        return None if self.labels is None else int((self.classes == self.labels).sum()) / len(self.labels)

    def csv(self) -> bytes:
        """Return the table ``file,class,probability,expert`` in UTF-8; pixels are numbered instead of named.

        Where the common expert answered, ``expert`` is ``common``.

        Names of files and classes are text alone (:func:`cell`).
        """
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("file", "class", "probability", "expert"))
        files = self.files or tuple(map(str, range(len(self))))
        top = self.probabilities.gather(1, self.classes[:, None]).flatten()
        experts = [COMMON if m < 0 else m for m in self.experts.tolist()]
        rows = zip(files, self.classes.tolist(), top.tolist(), experts, strict=True)
        table.writerows(
            (cell(file), cell(self.names[answer]), f"{share:.6f}", expert) for file, answer, share, expert in rows
        )
        return text.getvalue().encode("utf-8", "surrogateescape")  # a file's name need not be UTF-8


def cell(name: str) -> str:
    r"""Return a name that no spreadsheet computes and no terminal obeys: ``'=1+1``, and ``\x1b`` for a control."""
    plain = name.translate(_CONTROLS)
    return f"'{plain}" if plain.lstrip().startswith(_FORMULA) else plain


def place(device: str) -> torch.device:
    """Return a torch device by its name.

    Raises:
        FedjetsError: this machine has none of that name.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise FedjetsError(
            f"--device {device}: cannot be used here ({reason(error)}); leave it out for the CPU"
        ) from None


@dataclass(frozen=True)
class Chunk:
    """Some images and what the common expert says of them."""

    pixels: Tensor
    seen: Embedded


def look(common: CommonExpert, pictures: Pictures, layer: str, trainable: str, device: torch.device) -> Iterator[Chunk]:
    """Yield the images, :data:`CHUNK` at a time, with what the common expert says of them."""
    backbone = Backbone(common, trainable)
    for start in range(0, pictures.count, CHUNK):
        pixels = pictures.read(start, start + CHUNK)
        yield Chunk(pixels, embedded(compute(backbone, pixels, device), layer, backbone))


def inputs_of(chunk: Chunk, common: CommonExpert) -> Tensor:
    """Return what experts read of the images, (n, ...), on the CPU."""
    return chunk.seen.features if chunk.seen.features is not None else common.normalise(chunk.pixels)


def answer(
    chunks: Iterable[Chunk], common: CommonExpert, mixture: Mixture, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return class probabilities by the mixture's read-out, (n, C), and the id of each image's expert, (n,)."""
    probs, logits, embedding = [], [], []
    for chunk in chunks:
        on_device = inputs_of(chunk, common).to(device)
        probs.append(predict(mixture.experts, on_device.__getitem__, len(chunk.pixels), CHUNK))
        logits.append(chunk.seen.logits)
        embedding.append(chunk.seen.embedding)
    all_scores = gate_scores(mixture.gate, torch.cat(embedding), device)
    return read(torch.cat(probs, dim=1), all_scores, mixture.ids, torch.cat(logits).softmax(1), mixture.read_out)
