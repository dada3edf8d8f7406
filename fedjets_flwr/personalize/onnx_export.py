"""A personalised model as one ONNX graph: pixels in, class probabilities and the expert's id out, routing inside.

The file is kept only if onnxruntime gives PyTorch's answers. Needs the extra ``onnx``.
"""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedjets_flwr.data.image_source import Pictures, open_pictures
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import StrPath, written
from fedjets_flwr.models.backbone import Backbone
from fedjets_flwr.moe.label_prior import with_prior
from fedjets_flwr.moe.mixture import probabilities, read, sample_scores
from fedjets_flwr.personalize.inference import CHUNK, Predictions
from fedjets_flwr.personalize.personaliser import Personaliser
from fedjets_flwr.printable import reason

TOLERANCE = 1e-4
"""Largest difference of a probability between onnxruntime and PyTorch."""


class Graph(nn.Module):
    """The whole of :meth:`Personaliser.predict` for one batch."""

    def __init__(self, personaliser: Personaliser) -> None:
        super().__init__()
        self.card, self.common = personaliser.card, personaliser.common
        # Copies: the parameters of the personaliser are views of one vector.
        self.backbone = Backbone(self.common, self.card.trainable)
        self.trunk, self.neck, self.head = (copy.deepcopy(part).cpu() for part in self.backbone.parts)
        gate = personaliser.gate
        self.gate = copy.deepcopy(gate.module).cpu() if gate else torch.tensor(self.card.gate_scores)
        self.experts = nn.ModuleList(copy.deepcopy(personaliser.experts[m].module).cpu() for m in self.card.experts)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return class probabilities (n, C) float32 and expert ids (n,) int64 for uint8 images (n, c, h, w).

        The id is -1 where the common expert answers.
        """
        card, pixels = self.card, self.common.normalise(images)
        seen = self.backbone.see(pixels, (self.trunk, self.neck, self.head))
        probs = probabilities(list(self.experts), self.backbone.expert_input(pixels, seen))
        all_scores = sample_scores(self.gate, seen[card.embedding])
        mixed, best = read(probs, all_scores, card.experts, seen["logits"].softmax(dim=1), card.read_out)
        if card.prior != "none":
            mixed = with_prior(mixed, torch.tensor(card.label_prior, dtype=torch.float64)).float()
        return mixed, best


def export_onnx(personaliser: Personaliser, path: StrPath, images: object = None) -> float:
    """Write the graph and return the largest difference of a probability from PyTorch's.

    Args:
        personaliser: what to export.
        path: the file.
        images: what to compare on (see :meth:`Personaliser.predict`); None: random pixels.

    Raises:
        FedjetsError: the extra is missing, the answers differ, or the file cannot be written.
    """
    runtime, path = _runtime(), Path(path)
    card = personaliser.card
    pictures = open_pictures(_noise(card.image_shape) if images is None else images, card.classes, card.image_shape)
    try:
        data = _convert(personaliser)
        difference = _compare(runtime, data, personaliser, pictures)
    except FedjetsError:
        raise
    except Exception as error:  # of two libraries, of any kind
        raise FedjetsError(f"{path}: not written; the model cannot be exported ({reason(error)})") from error
    if not difference <= TOLERANCE:
        raise FedjetsError(
            f"{path}: not written; onnxruntime's probabilities differ from PyTorch's by {difference:.2g}, more than"
            f" {TOLERANCE:g}: use the bundle itself, or another onnxruntime"
        )
    try:
        with written(path) as file:
            file.write_bytes(data)
    except OSError as error:
        raise FedjetsError(f"{path}: cannot be written ({error.strerror})") from None
    return difference


def _runtime() -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (what torch.onnx needs; asked for here, before any work)
    except ImportError as error:
        raise FedjetsError(f"--onnx: {error.name} is not installed; pip install 'fedjets-flwr[onnx]'") from None
    return onnxruntime


def _noise(shape: tuple[int, int, int]) -> Tensor:
    """Return random pixels, and some that are smooth, as uint8."""
    generator = torch.Generator().manual_seed(0)
    rough = torch.randint(0, 256, (32, *shape), generator=generator)
    smooth = torch.randint(0, 256, (32, shape[0], 1, 1), generator=generator).expand(32, *shape)
    return torch.cat([rough, smooth, (rough[:32] + smooth) // 2]).to(torch.uint8)


def _convert(personaliser: Personaliser) -> bytes:
    card = personaliser.card
    example = torch.zeros(3, *card.image_shape, dtype=torch.uint8)  # not 1: a batch of one would be taken as fixed
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Graph(personaliser),
            (example,),
            input_names=["images"],
            output_names=["probabilities", "expert"],
            dynamic_shapes={"images": {0: torch.export.Dim("n", min=1)}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(_metadata(personaliser))
    data: bytes = program.model_proto.SerializeToString()
    return data


def _metadata(personaliser: Personaliser) -> dict[str, str]:
    card = personaliser.card
    channels, height, width = card.image_shape
    return {
        "about": card.about,
        "classes": json.dumps(card.classes),
        "image_shape": json.dumps(card.image_shape),
        "preprocessing": f"upright {'RGB' if channels == 3 else 'grey'} image, stretched to {width} x {height} pixels"
        " (bilinear with antialiasing), uint8 from 0 to 255, NCHW; normalisation is inside",
        "experts": json.dumps(card.experts),
        "reading": f"{card.read_out}/{card.prior}",
        "run": card.run,
        "weights_hash": card.weights_hash,
    }


def _compare(runtime: Any, data: bytes, personaliser: Personaliser, pictures: Pictures) -> float:
    """Return the largest difference of a probability; infinity where one is no number."""
    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    worst = 0.0
    for start in range(0, pictures.count, CHUNK):
        pixels = pictures.read(start, start + CHUNK)
        wanted: Predictions = personaliser.predict(pixels)
        # In two pieces: the batch is free.
        found = [
            torch.from_numpy(session.run(["probabilities"], {"images": piece.numpy()})[0])
            for piece in (pixels[:1], pixels[1:])
            if len(piece)
        ]
        gap = float((torch.cat(found) - wanted.probabilities).abs().max())
        worst = max(worst, gap if gap == gap else float("inf"))
    return worst
