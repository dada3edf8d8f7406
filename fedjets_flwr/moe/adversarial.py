"""FedADG's reference distribution of features, learned against a discriminator (Zhang et al. 2021, section 3).

Shapes: n samples, f features, C classes, N numbers of noise. Labels enter as ``LABEL`` times their one-hot vector.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedjets_flwr.config.schema import Config
from fedjets_flwr.seeds import derive

LABEL = 0.7
"""What a label's entry is in the generator's and the discriminator's input."""
GAIN = 0.5
"""Of the generator's random start."""


class Generator(nn.Module):
    """Noise (n, N) and labels (n, C) -> features that stand for their class everywhere, (n, f); shared by all."""

    def __init__(self, noise: int, classes: int, hidden: int, features: int) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(noise + classes, hidden), nn.Linear(hidden, features)
        for layer in (self.hidden, self.output):
            nn.init.xavier_uniform_(layer.weight, GAIN)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Return the features, none negative."""
        features: Tensor = self.output(F.leaky_relu(self.hidden(torch.cat([noise, labels], dim=1)))).relu()
        return features


class Discriminator(nn.Module):
    """Features (n, f) and labels (n, C) -> how much they look generated, (n,) from 0 to 1; each client's own."""

    def __init__(self, features: int, classes: int, projection: int, hidden: int) -> None:
        super().__init__()
        self.projection = nn.Linear(features, projection, bias=False)
        self.hidden, self.output = nn.Linear(projection + classes, hidden), nn.Linear(hidden, 1)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the scores."""
        joined = torch.cat([self.projection(features), labels], dim=1)
        scores: Tensor = self.output(F.leaky_relu(self.hidden(joined))).sigmoid().squeeze(1)
        return scores


def label_input(targets: Tensor, classes: int) -> Tensor:
    """Return labels as the two networks read them, (n, C) float32."""
    return LABEL * F.one_hot(targets, classes).float()


def tell_apart(on_generated: Tensor, on_features: Tensor) -> Tensor:
    """Return the discriminator's loss, mean[(1 - D(h'))^2 + D(h)^2]; at best 1/2 where h' and h are alike."""
    return ((1 - on_generated).square() + on_features.square()).mean()


def look_generated(on_features: Tensor) -> Tensor:
    """Return the extractor's loss, mean (1 - D(h))^2."""
    return (1 - on_features).square().mean()


def look_real(on_generated: Tensor) -> Tensor:
    """Return the generator's loss, mean D(h')^2."""
    return on_generated.square().mean()


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Return the mean cross entropy with 1 - eps on the true class and eps / (C - 1) on each other one."""
    if smoothing == 0:
        return F.cross_entropy(logits, targets)
    logs = logits.log_softmax(dim=1)
    true = logs.gather(1, targets[:, None]).squeeze(1)
    others = (logs.sum(dim=1) - true) / (logits.shape[1] - 1)
    return -((1 - smoothing) * true + smoothing * others).mean()


def build_generator(config: Config, classes: int, features: int) -> nn.Module:
    """Return the run's generator at its random start, the same at the server and at every client."""
    how = config.fedadg
    return seeded(derive(config.run.seed, "generator"), Generator, (how.noise, classes, how.generator_hidden, features))


def seeded(seed: int, make: type[nn.Module], sizes: Sequence[int]) -> nn.Module:
    """Return a network at its random start; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*sizes)
