"""Text, of which each next token is to be told: cross entropy, right tokens, bits per byte."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.text import TextPart, open_text
from fedjets_flwr.data.text_site import open_site
from fedjets_flwr.data.text_tokens import digest_of
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.common_expert import CommonExpert
from fedjets_flwr.models.language_pretraining import windows
from fedjets_flwr.names import PARTS, SHARED_OF, TRAIN, Part
from fedjets_flwr.seeds import torch_generator
from fedjets_flwr.tasks.base import Inputs, Samples
from fedjets_flwr.tasks.of_text import OfText


class LanguageModelling(OfText):
    """The text of ``data.name = "text"`` or ``"text-folder"``, a domain for each client, or a site's own.

    A sample is a window of T tokens, its targets the T tokens that follow each; a client's windows do not overlap.
    """

    def __init__(self, config: Config, common: CommonExpert | None = None, domain: str = "") -> None:
        super().__init__(config)
        self.common, self.domain = common, domain

    @property
    def scores(self) -> Mapping[str, tuple[str, ...]]:
        """Nothing is written: the text is all there."""
        return {}

    @property
    def digest(self) -> str:
        """Return that of the text, from which tokens are learnt; where sites have their own, that of the tokens."""
        return digest_of(self._tokeniser) if self.config.text_elsewhere else open_text(self.config).digest

    @property
    def simulates(self) -> bool:
        """Whose text is whose is known wherever the text lies, unless sites have text of their own."""
        return not self.config.text_elsewhere

    def deal(self) -> None:
        """Cut the text into the clients' parts; what sites have of their own is nobody's to deal."""
        if self.simulates:
            open_text(self.config)

    def known(self, client: int) -> int:
        """Return how many windows a training client trains on."""
        return len(self.samples(client))

    def samples(self, client: int, folder: Path | None = None, part: str = "train") -> Samples:
        """Return windows of a client's text and their targets, int64 (n, T) both."""
        wanted = SHARED_OF.get(part, part)
        if wanted not in PARTS:
            raise FedjetsError(f"data.name = {self.config.data.name!r}: text has no {part} part")
        own = self.config.text_elsewhere
        held = self._site(client, folder, wanted) if own else open_text(self.config).client(client, wanted)
        cut = windows(held.tokens, self.config.language_model.context)
        if cut is None:
            raise FedjetsError(
                f"text.{wanted}-tokens: {len(held.tokens)} are less than a window of language-model.context ="
                f" {self.config.language_model.context} and one more; {'give more text, or ' * own}raise it"
            )
        training = self.config.partition.role_of(client) == TRAIN
        kinds = torch.full((len(cut[0]),), held.domain)
        return Samples(client, *cut, True, training, kinds, len(held.tokens) / held.num_bytes)

    def _site(self, client: int, place: Path | None, part: Part) -> TextPart:
        """Return a part of a site's own text, up to as many tokens as the settings say."""
        if place is None:
            raise FedjetsError(
                "partition.public-share = 1: every client is a site with text of its own; give data-path in"
                " --node-config, e.g. 'client-id=0 data-path=\"/data/text\"', or set it to 0 in a simulation"
            )
        text, c = open_site(place, self._tokeniser, self.config.cache_dir), self.config
        most = {"train": c.text.train_tokens, "val": c.text.val_tokens, "test": c.text.test_tokens}[part]
        tokens = text.stream(most, torch_generator(c.run.seed, f"order of {part}", client), part)
        return TextPart(tokens, text.num_bytes(tokens), c.text_domains.index(self.domain))

    @property
    def _tokeniser(self) -> str:
        return "" if self.common is None else self.common.tokeniser

    def inputs(self, stored: Tensor, common: CommonExpert, generator: torch.Generator | None = None) -> Inputs:
        """Return how to get windows of tokens, int64 (b, T); text is not augmented."""
        return lambda rows: stored[rows]

    def loss(self, outputs: Tensor, targets: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """Return the mean cross entropy of logits (b, T, V) and tokens (b, T), in nats per token."""
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def total_loss(self, outputs: Tensor, targets: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """Return the sum over windows of their mean cross entropy."""
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum") / targets.shape[1]

    @property
    def at_once(self) -> int:
        """Windows of a batch, each of T x V numbers."""
        return 64

    def predictions(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each token's cross entropy in nats, and whether it was told right, (b, T, 2)."""
        losses = F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")
        return torch.stack([losses, (outputs.argmax(2) == targets).to(losses.dtype)], dim=2)

    def count_right(self, predictions: Tensor, targets: Tensor) -> list[int]:
        """Return tokens told right, and tokens."""
        return [int(predictions[..., 1].sum(dtype=torch.float64)), targets.numel()]

    def told(self, predictions: Tensor, samples: Samples) -> dict[str, float]:
        """Return bits per byte, the mean bits per token by the bytes that a token stands for, and the domain."""
        bits = float(predictions[..., 0].mean(dtype=torch.float64)) / math.log(2)
        return {"bits-per-byte": bits * samples.per_byte, "domain": int(samples.columns[0])}

    def written(self, model: nn.Module, samples: Samples) -> dict[str, float]:
        """Return nothing."""
        return {}
