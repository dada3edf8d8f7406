"""What an expert is: a whole model, or a tail over the common expert's frozen trunk."""

import copy

import torch
from torch import nn

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.datasets import Dataset
from fedjets_flwr.models.architectures import Architecture, build, tail_start
from fedjets_flwr.models.common_expert import CommonExpert
from fedjets_flwr.models.gate import build_gate
from fedjets_flwr.seeds import derive


def configured_architecture(config: Config, dataset: Dataset) -> Architecture:
    """Return the architecture that ``model.*`` describes for a data set."""
    m = config.model
    return Architecture(m.name, m.width, m.norm, m.stem, dataset.shape[0], len(dataset.classes))


def builds_own_experts(config: Config, init: str) -> bool:
    """Return whether experts have the architecture of ``model.*`` and not the common expert's."""
    return config.moe.trainable == "all" and init == "random"


def build_expert(config: Config, common: CommonExpert, dataset: Dataset, expert: int, init: str) -> nn.Sequential:
    """Return expert ``expert`` at its start, trainable.

    Args:
        config: ``moe.trainable`` says which part of the model an expert is; a part, or a start ``common``, takes the
            common expert's architecture.
        common: the common expert.
        dataset: shapes of a model of its own.
        expert: its id; decides its random draw.
        init: ``random`` or ``common``.
    """
    if init == "common":
        model = copy.deepcopy(common.model).requires_grad_(True)
    else:
        own = builds_own_experts(config, init)
        architecture = configured_architecture(config, dataset) if own else common.architecture
        model = build(architecture, derive(config.run.seed, "expert", expert))
    return model[tail_start(model, config.moe.trainable) :]


def gate_inputs(common: CommonExpert, layer: str) -> int:
    """Return the length of an embedding, ``logits`` or ``penultimate``: the gate's inputs."""
    head = common.model[-1]
    assert isinstance(head, nn.Linear)
    return head.out_features if layer == "logits" else head.in_features


def build_configured_gate(config: Config, common: CommonExpert, experts: int) -> nn.Sequential:
    """Return the gate at its start."""
    inputs = gate_inputs(common, config.common_expert.embedding)
    return build_gate(inputs, config.gate.hidden, experts, derive(config.run.seed, "gate"))


def expert_input(config: Config, common: CommonExpert, dataset: Dataset) -> torch.Tensor:
    """Return one sample of an expert's input: an image, or the trunk's output."""
    image = torch.zeros(1, *dataset.shape)
    with torch.no_grad():
        sample: torch.Tensor = common.model[: tail_start(common.model, config.moe.trainable)](image)
    return sample


def forward_flops(module: nn.Module, sample: torch.Tensor) -> int:
    """Return the floating-point operations of one forward pass (2 per multiply-add)."""
    # Its import takes a tenth of the start of a deployed client's process, which never counts.
    from torch.utils.flop_counter import FlopCounterMode

    training = module.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(sample)
    module.train(training)
    return int(counter.get_total_flops())
