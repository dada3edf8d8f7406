"""Architectures by name.

Every model is an ``nn.Sequential`` of named stages that ends in ``pool`` (to a flat feature vector) and ``head`` (a
linear classifier), so that a trunk and a tail are slices of it and the penultimate features are ``model[:-1](x)``.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedjets_flwr.models.bottleneck import Bottleneck, with_bottleneck
from fedjets_flwr.models.transformer import LanguageArchitecture, language_model


@dataclass(frozen=True)
class Architecture:
    """What determines a model's layout."""

    name: str
    width: int
    norm: str
    stem: str
    channels: int
    num_classes: int
    neck: str = field(default="", repr=False)
    """What an expert has between features and head (a key of ``NECKS``); a common expert has nothing."""


AnyArchitecture = Architecture | LanguageArchitecture
"""Of a classifier of images, or of a language model."""


def build(architecture: AnyArchitecture, generator_seed: int) -> nn.Sequential:
    """Return a freshly initialised float32 model; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_seed)
        if isinstance(architecture, LanguageArchitecture):
            return language_model(architecture)
        return NECKS[architecture.neck](BUILDERS[architecture.name](architecture))


def tail_start(model: nn.Sequential, trainable: str) -> int:
    """Return the index of the first stage that belongs to an expert (0: the whole model)."""
    above = 2 if len(model) > 1 and isinstance(model[-2], Bottleneck) else 1
    return {"all": 0, "stage": len(model) - 2 - above, "head": len(model) - above}[trainable]


def tail(model: nn.Sequential, trainable: str) -> nn.Sequential:
    """Return the part of a model that is an expert."""
    if trainable == "all":
        return model
    part: nn.Sequential = model[tail_start(model, trainable) :]
    return part


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that takes a batch of one value a channel as in evaluation, since such a batch has no statistics.

    A client's last batch may be one image, and be one pixel by then; PyTorch's own fails there.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return it normalised, (n, C, H, W)."""
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def _norm(kind: str, channels: int) -> nn.Module:
    """Batch norm, or group norm with about 8 channels a group."""
    if kind == "batch":
        return BatchNorm(channels)
    return nn.GroupNorm(math.gcd(max(2, channels // 8), channels), channels)


def _pool() -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _cnn(a: Architecture) -> nn.Sequential:
    """Two convolutions, each with normalisation, max pooling and ReLU.

    ReLU after the pooling gives the bits of the usual order, and has a quarter of the work.
    """

    def block(inputs: int, outputs: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return nn.Sequential(conv, _norm(a.norm, outputs), nn.MaxPool2d(2), nn.ReLU(inplace=True))

    stages = [("layer1", block(a.channels, a.width)), ("layer2", block(a.width, 2 * a.width)), ("pool", _pool())]
    return nn.Sequential(OrderedDict([*stages, ("head", nn.Linear(2 * a.width, a.num_classes))]))


def _lenet(a: Architecture) -> nn.Sequential:
    """The LeNet of Listo Zec et al. for images of 32x32: two convolutions, three linear layers, half of one dropped.

    It has no normalisation and no width.
    """

    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 5), nn.MaxPool2d(2), nn.ReLU(inplace=True))

    # To 5x5, which images of 32x32 have already.
    to_flat, drop = nn.Sequential(nn.AdaptiveAvgPool2d(5), nn.Flatten()), nn.Dropout(0.5)
    hidden = nn.Linear(400, 120), nn.ReLU(inplace=True), drop, nn.Linear(120, 84), nn.ReLU(inplace=True)
    flat = nn.Sequential(*to_flat, *hidden)
    stages = [("layer1", block(a.channels, 6)), ("layer2", block(6, 16)), ("pool", flat)]
    return nn.Sequential(OrderedDict([*stages, ("head", nn.Linear(84, a.num_classes))]))


SMALLEST = {"lenet": 16}
"""Least height and width of an image, of models that do not take them all."""


class BasicBlock(nn.Module):
    """Residual block of the CIFAR ResNets with a parameter-free shortcut (He et al. 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = _norm(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = _norm(norm, outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(f(x) + x), x subsampled and zero-padded in channels where the shape changes."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        shortcut = x
        if self.stride != 1 or self.extra:
            before = self.extra // 2
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))
        return F.relu(out + shortcut, inplace=True)


def _cifar_resnet(blocks: int) -> Callable[[Architecture], nn.Sequential]:
    """The 6n+2 layer ResNets for 32x32 images (He et al. 2016, section 4.2)."""

    def make(a: Architecture) -> nn.Sequential:
        widths = (a.width, 2 * a.width, 4 * a.width)
        stem = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(a.channels, a.width, 3, 1, 1, bias=False),
                bn1=_norm(a.norm, a.width),
                relu=nn.ReLU(inplace=True),
            )
        )
        stages: list[tuple[str, nn.Module]] = [("stem", stem)]
        inputs = a.width
        for number, outputs in enumerate(widths, start=1):
            strides = [1 if number == 1 else 2, *[1] * (blocks - 1)]
            layer = []
            for stride in strides:
                layer.append(BasicBlock(inputs, outputs, stride, a.norm))
                inputs = outputs
            stages.append((f"layer{number}", nn.Sequential(*layer)))
        stages += [("pool", _pool()), ("head", nn.Linear(inputs, a.num_classes))]
        model = nn.Sequential(OrderedDict(stages))
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        return model

    return make


def _torchvision_resnet(name: str) -> Callable[[Architecture], nn.Sequential]:
    """torchvision's ResNet; the ``cifar`` stem is one 3x3 convolution of stride 1 without pooling."""

    def make(a: Architecture) -> nn.Sequential:
        import torchvision  # takes longer than torch to import; a deployed client's process serves one message

        net = getattr(torchvision.models, name)(num_classes=a.num_classes, norm_layer=lambda c: _norm(a.norm, c))
        stem: list[tuple[str, nn.Module]] = [("conv1", net.conv1), ("bn1", net.bn1), ("relu", net.relu)]
        if a.stem == "cifar":
            stem[0] = ("conv1", nn.Conv2d(a.channels, 64, 3, 1, 1, bias=False))
        else:
            stem[0] = ("conv1", nn.Conv2d(a.channels, 64, 7, 2, 3, bias=False))
            stem.append(("maxpool", net.maxpool))
        nn.init.kaiming_normal_(stem[0][1].weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
        stages: list[tuple[str, nn.Module]] = [("stem", nn.Sequential(OrderedDict(stem)))]
        stages += [(f"layer{number}", getattr(net, f"layer{number}")) for number in (1, 2, 3, 4)]
        return nn.Sequential(OrderedDict([*stages, ("pool", _pool()), ("head", net.fc)]))

    return make


NECKS: dict[str, Callable[[nn.Sequential], nn.Sequential]] = {"": lambda model: model, "gaussian": with_bottleneck}

BUILDERS: dict[str, Callable[[Architecture], nn.Sequential]] = {
    "cnn": _cnn,
    "lenet": _lenet,
    "resnet8": _cifar_resnet(1),
    "resnet20": _cifar_resnet(3),
    "resnet32": _cifar_resnet(5),
    "resnet56": _cifar_resnet(9),
    "resnet18": _torchvision_resnet("resnet18"),
    "resnet34": _torchvision_resnet("resnet34"),
}
