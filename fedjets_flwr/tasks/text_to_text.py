"""Text that is written for a text: cross entropy of the target, right tokens, and scores of what a model writes."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.text_tasks import open_tasks, scores_of
from fedjets_flwr.data.text_tokens import NOTHING
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.common_expert import CommonExpert
from fedjets_flwr.models.decoding import greedy
from fedjets_flwr.names import PARTS, SHARED_OF, TRAIN
from fedjets_flwr.tasks.base import Inputs, Samples
from fedjets_flwr.tasks.of_text import OfText
from fedjets_flwr.tasks.text_scores import SCORES


class TextToText(OfText):
    """The pairs of ``data.name = "tasks"`` or ``"task-folder"``, of one task for each client.

    A sample is what a decoder reads, an input and its target; its targets are the tokens that follow, of the target
    alone.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._names = scores_of(config)
        if unknown := sorted(set(self._names) - SCORES.keys()):
            raise FedjetsError(f"text.scores: no {unknown[0]!r}; there are {', '.join(SCORES)}")

    @property
    def scores(self) -> Mapping[str, tuple[str, ...]]:
        """Those of each task, as ``text.scores`` or the reader of its domain says."""
        return {domain: tuple(SCORES[name]) for domain, name in zip(self.config.text_domains, self._names, strict=True)}

    @property
    def digest(self) -> str:
        """Return that of all pairs, from which tokens are learnt."""
        return open_tasks(self.config).digest

    @property
    def simulates(self) -> bool:
        """Whose pairs are whose is known wherever they lie."""
        return True

    def deal(self) -> None:
        """Deal the pairs to clients."""
        open_tasks(self.config)

    def known(self, client: int) -> int:
        """Return how many pairs a training client trains on."""
        return self.config.text.train_pairs

    def samples(self, client: int, folder: Path | None = None, part: str = "train") -> Samples:
        """Return a client's pairs as tokens, and those to be told after each, int64 (n, T) both."""
        wanted = SHARED_OF.get(part, part)
        if folder is not None or wanted not in PARTS:
            raise FedjetsError(
                f"data.name = {self.config.data.name!r}: there is no {part} part for a site's own folder"
            )
        held = open_tasks(self.config).client(client, wanted)
        training = self.config.partition.role_of(client) == TRAIN
        kinds = torch.full((len(held.read),), held.domain)
        per_byte = int((held.targets != NOTHING).sum()) / held.num_bytes
        return Samples(client, held.read, held.targets, True, training, kinds, per_byte)

    def inputs(self, stored: Tensor, common: CommonExpert, generator: torch.Generator | None = None) -> Inputs:
        """Return how to get samples, as wide as the longest of them, int64 (b, t)."""

        def batch(rows: Tensor) -> Tensor:
            chosen = stored[rows]
            return chosen[:, : int((chosen != NOTHING).sum(dim=1).max())]

        return batch

    def loss(self, outputs: Tensor, targets: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """Return the mean cross entropy of the targets' tokens, in nats per token."""
        there = targets[:, : outputs.shape[1]]
        return F.cross_entropy(outputs.flatten(0, 1), there.flatten(), ignore_index=NOTHING)

    def total_loss(self, outputs: Tensor, targets: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """Return the sum over samples of the mean cross entropy of their targets' tokens."""
        nats, _, tokens = self.predictions(outputs, targets).unbind(dim=1)
        return (nats / tokens).sum()

    @property
    def at_once(self) -> int:
        """Samples of a batch, each of T x V numbers."""
        return 32

    def predictions(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each target's cross entropy in nats, how many of its tokens were told right, and how many there are.

        (b, 3).
        """
        there = targets[:, : outputs.shape[1]]
        losses = F.cross_entropy(outputs.transpose(1, 2), there, reduction="none", ignore_index=NOTHING)
        counted = there != NOTHING
        right = (outputs.argmax(dim=2) == there) & counted
        return torch.stack([losses.sum(dim=1), *(found.sum(dim=1).to(losses.dtype) for found in (right, counted))], 1)

    def count_right(self, predictions: Tensor, targets: Tensor) -> list[int]:
        """Return the targets' tokens told right, and how many there are."""
        _, right, tokens = predictions.sum(dim=0, dtype=torch.float64).tolist()
        return [int(right), int(tokens)]

    def told(self, predictions: Tensor, samples: Samples) -> dict[str, float]:
        """Return the bits that a byte of a target takes, and the task."""
        nats, _, tokens = predictions.sum(dim=0, dtype=torch.float64).tolist()
        bits = nats / tokens / math.log(2)
        return {"bits-per-byte": bits * samples.per_byte, "domain": int(samples.columns[0])}

    def written(self, model: nn.Module, samples: Samples) -> dict[str, float]:
        """Return the mean scores of what a model writes for the samples, the likeliest token each time."""
        split, most = open_tasks(self.config), self.config.text.target_tokens
        device = next(model.parameters()).device
        begun = (samples.targets != NOTHING).cumsum(dim=1) > 1  # from the first token of the target on
        prompts, texts = samples.stored.masked_fill(begun, NOTHING), list[str]()
        model.eval()
        for rows in prompts.split(self.at_once):
            found = greedy(model, rows.to(device), most, split.frame.end).cpu()
            texts += [split.text(row) for row in found]
        right = [split.text(row[row != NOTHING]) for row in samples.targets]
        scores = SCORES[self._names[int(samples.columns[0])]]
        return {
            name: sum(score(*pair) for pair in zip(texts, right, strict=True)) / len(right)
            for name, score in scores.items()
        }
