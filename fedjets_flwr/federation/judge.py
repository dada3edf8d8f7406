"""A root of trust: the server judges what clients make of an expert by labelled samples that no client holds.

After Zeno (Xie et al. 2019), which trusts an update by what it does to the loss on a few samples at the server. Experts
specialise: a good one forgets how often classes occur that its clients do not hold, and its plain loss on samples of
all classes rises. So the outputs are centred first, which takes a model's prior out of its loss and leaves what it can
tell apart. In that a good specialist stays as able as the common expert that it came from, or gets better.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import repeat

import torch
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.architectures import AnyArchitecture, build, tail
from fedjets_flwr.models.backbone import Backbone, Seen
from fedjets_flwr.models.common_expert import CommonExpert
from fedjets_flwr.models.device import device_of
from fedjets_flwr.models.expert import build_configured_gate
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.gating import mixture_loss, scores
from fedjets_flwr.moe.local_training import Sgd, fit
from fedjets_flwr.names import expert_ids, expert_name
from fedjets_flwr.tasks.base import Samples, Task
from fedjets_flwr.wire.messages import BadReply


class Judge:
    """What a server knows of labelled samples of its own.

    Attributes:
        config: the settings; ``aggregation.tolerance`` says how far an expert may fall behind the common expert.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        common: CommonExpert,
        architectures: Sequence[AnyArchitecture],
        samples: Samples,
    ) -> None:
        """Begin.

        Args:
            config: the settings.
            task: what a sample is.
            common: the common expert, on the samples' device.
            architectures: of all experts, or of the models whose tails they are.
            samples: n labelled ones that no client holds.
        """
        self.config, self._task, self._samples = config, task, samples
        self._backbone, self._architectures = Backbone(common, config.moe.trainable), architectures
        self._device = samples.stored.device
        kinds = {a: tail(build(a, 0), config.moe.trainable).to(self._device) for a in set(architectures)}
        self._models = {architecture: FlatModel(module.eval()) for architecture, module in kinds.items()}
        self._known: dict[int, tuple[Tensor, float]] = {}

    @classmethod
    def of(cls, config: Config, task: Task, common: CommonExpert, architectures: Sequence[AnyArchitecture]) -> "Judge":
        """Return the judge of the settings (``aggregation.rule = "validated"``).

        Raises:
            FedjetsError: there is nothing to judge by.
        """
        device = device_of(config)
        samples = task.samples(-1, part="public").first(config.aggregation.root_samples).to(device)
        if not len(samples):
            raise FedjetsError(
                f"aggregation.rule = 'validated': no public samples to judge by, data.dir = {config.data.dir!r};"
                " name a folder that has some, or choose another rule"
            )
        model = common.model if device.type == "cpu" else copy.deepcopy(common.model).to(device)
        return cls(config, task, replace(common, model=model), architectures, samples)

    def check(self, averaged: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Check the experts that a client trained.

        Args:
            averaged: finite vectors of the expected sizes, by full name.
            state: the vectors that the client started from.

        Raises:
            BadReply: an expert in it must not be used.
        """
        for name, vector in averaged.items():
            for expert in expert_ids([name]) if name in state else ():
                if not self.passes(expert, vector, state[name]):
                    raise BadReply(f"{name} does worse than it did, and than the common expert, on the public samples")

    def passes(self, expert: int, new: Tensor, old: Tensor) -> bool:
        """Return whether an expert is as good as the common expert, or no worse than it was."""
        if expert not in self._known or self._known[expert][0] is not old:
            self._known[expert] = (old, self.loss(expert, old))
        allowed = max((1 + self.config.aggregation.tolerance) * self.common_loss, self._known[expert][1])
        return self.loss(expert, new) <= allowed

    def loss(self, expert: int, vector: Tensor) -> float:
        """Return the centred loss of an expert that has a vector's weights."""
        return centred_loss(self._task, self._outputs(expert, vector), self._samples.targets)

    @cached_property
    def common_loss(self) -> float:
        """The centred loss of the common expert."""
        return centred_loss(self._task, self._seen["logits"], self._samples.targets)

    def train_gate(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Return a gate after ``aggregation.gate-steps`` full steps down the loss of the mixture of all experts.

        Probabilities are mixed whatever ``moe.mix`` says: an expert's logits for classes that its clients do not hold
        are of no known size.

        Args:
            vectors: the gate and all experts, by full name.
        """
        experts, settings = len(self._architectures), self.config.aggregation
        logits = torch.stack([self._outputs(m, vectors[expert_name(m)]) for m in range(experts)])
        gate = FlatModel(build_configured_gate(self.config, self._backbone.common, experts).to(self._device))
        gate.load(vectors["gate"])
        embedding, targets = self._seen[self.config.common_expert.embedding], self._samples.targets

        def losses_of(rows: Tensor) -> list[Tensor]:
            return [mixture_loss(logits, scores(gate.module(embedding)), targets, "probs")]

        if settings.gate_steps:
            fit([gate], [Sgd(gate, self.config.gate.lr)], repeat(targets, settings.gate_steps), losses_of)
        return gate.vector.detach().cpu()

    @torch.no_grad()
    def _outputs(self, expert: int, vector: Tensor) -> Tensor:
        model = self._models[self._architectures[expert]]
        model.load(vector)
        outputs: Tensor = model.module(self._backbone.expert_input(self._images, self._seen))
        return outputs

    @cached_property
    def _images(self) -> Tensor:
        rows = torch.arange(len(self._samples), device=self._device)
        return self._task.inputs(self._samples.stored, self._backbone.common)(rows)

    @cached_property
    def _seen(self) -> Seen:
        with torch.no_grad():
            return self._backbone.see(self._images)


def centred_loss(task: Task, outputs: Tensor, targets: Tensor) -> float:
    """Return the mean loss of outputs (n, ..., C) less their mean over all samples: that of a model without a prior."""
    return float(task.loss(outputs - outputs.flatten(0, -2).mean(dim=0), targets))
