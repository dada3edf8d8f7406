"""A root of trust: the server judges what clients make of an expert by labelled samples that no client holds.

After Zeno (Xie et al. 2019), which trusts an update by what it does to the loss on a few samples at the server. Experts
specialise: a good one forgets how often classes occur that its clients do not hold, and its plain loss on samples of
all classes rises. So the outputs are centred first, which takes a model's prior out of its loss and leaves what it can
tell apart. A good specialist stays as able as the common expert that it came from, or gets better; a spoilt one not.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.models.architectures import Architecture, build, tail
from fedjets_flwr.models.backbone import Backbone
from fedjets_flwr.models.common_expert import CommonExpert
from fedjets_flwr.models.device import device_of
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.names import expert_ids
from fedjets_flwr.tasks.base import Samples, Task
from fedjets_flwr.wire.messages import BadReply, Reply


class Judge:
    """Finds the experts that became worse than both the common expert and what they were.

    Attributes:
        tolerance: by which share an expert's loss may lie above the common expert's.
    """

    def __init__(
        self, task: Task, samples: Samples, backbone: Backbone, architectures: Sequence[Architecture], tolerance: float
    ) -> None:
        """Begin.

        Args:
            task: what a sample is.
            samples: n labelled ones.
            backbone: the common expert, cut where the experts begin.
            architectures: of all experts, or of the models whose tails they are.
            tolerance: as in the attributes.
        """
        self.tolerance = tolerance
        self._task, self._samples, self._backbone, self._architectures = task, samples, backbone, architectures
        self._device = samples.stored.device
        kinds = {a: tail(build(a, 0), backbone.trainable).to(self._device) for a in set(architectures)}
        self._models = {architecture: FlatModel(module) for architecture, module in kinds.items()}
        self._known: dict[int, tuple[Tensor, float]] = {}

    @classmethod
    def of(cls, config: Config, task: Task, common: CommonExpert, architectures: Sequence[Architecture]) -> "Judge":
        """Return the judge of the settings (``aggregation.rule = "validated"``)."""
        device = device_of(config)
        samples = task.samples(-1, part="public").first(config.aggregation.root_samples).to(device)
        model = common.model if device.type == "cpu" else copy.deepcopy(common.model).to(device)
        backbone = Backbone(replace(common, model=model), config.moe.trainable)
        return cls(task, samples, backbone, architectures, config.aggregation.tolerance)

    def check(self, reply: Reply, state: Mapping[str, Tensor]) -> None:
        """Check the experts of a reply to a train message.

        Args:
            reply: finite vectors of the expected sizes.
            state: the vectors that the client started from.

        Raises:
            BadReply: an expert in it must not be used.
        """
        for name, vector in reply.vectors.items():
            for expert in expert_ids([name]) if name in state else ():
                if self.loss(expert, vector) > self.bound(expert, state[name]):
                    raise BadReply(f"{name} does worse than it did, and than the common expert, on the public samples")

    def bound(self, expert: int, old: Tensor) -> float:
        """Return the loss that an expert may have after training from ``old``.

        An expert that is better than the common expert may fall back to it; one that is not must not get worse.
        """
        if expert not in self._known or self._known[expert][0] is not old:
            self._known[expert] = (old, self.loss(expert, old))
        return max((1 + self.tolerance) * self.common_loss, self._known[expert][1])

    def loss(self, expert: int, vector: Tensor) -> float:
        """Return the centred loss of an expert that has a vector's weights."""
        model = self._models[self._architectures[expert]]
        model.load(vector)
        with torch.inference_mode():
            return centred_loss(self._task, model.module.eval()(self._inputs), self._samples.targets)

    @cached_property
    def common_loss(self) -> float:
        """The centred loss of the common expert."""
        with torch.inference_mode():
            return centred_loss(self._task, self._backbone.common.model(self._images), self._samples.targets)

    @cached_property
    def _images(self) -> Tensor:
        inputs = self._task.inputs(self._samples.stored, self._backbone.common)
        return inputs(torch.arange(len(self._samples), device=self._device))

    @cached_property
    def _inputs(self) -> Tensor:
        with torch.inference_mode():
            return self._backbone.expert_input(self._images, self._backbone.see(self._images))


def centred_loss(task: Task, outputs: Tensor, targets: Tensor) -> float:
    """Return the mean loss of outputs (n, ..., C) less their mean over all samples: that of a model without a prior."""
    return float(task.loss(outputs - outputs.flatten(0, -2).mean(dim=0), targets))
