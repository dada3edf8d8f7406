"""What an expert is: a whole model, or a tail over the common expert's frozen trunk."""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.datasets import Spec
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.architectures import NECKS, SMALLEST, AnyArchitecture, Architecture, build, tail
from fedjets_flwr.models.common_expert import CommonExpert
from fedjets_flwr.models.flat_model import VectorSpec
from fedjets_flwr.models.gate import build_gate
from fedjets_flwr.models.language_pretraining import language_architecture
from fedjets_flwr.models.transformer import LanguageArchitecture
from fedjets_flwr.seeds import derive

_ARCHITECTURES = TypeAdapter(list[AnyArchitecture])


def configured_architecture(config: Config, spec: Spec) -> Architecture:
    """Return the architecture that ``model.*`` describes for samples of a kind.

    Raises:
        FedjetsError: it takes larger images only.
    """
    m = config.model
    least = SMALLEST.get(m.name, 0)
    if any(side < least for side in spec.shape[1:]):
        raise FedjetsError(f"model.name = {m.name!r}: takes images of {least} x {least} or more; choose another model")
    return Architecture(m.name, m.width, m.norm, m.stem, spec.shape[0], len(spec.classes))


def builds_own_experts(config: Config, init: str) -> bool:
    """Return whether experts have the architecture of ``model.*`` and not the common expert's."""
    return config.moe.trainable == "all" and init == "random"


def encode_architectures(architectures: Sequence[AnyArchitecture]) -> str:
    """Return architectures as JSON."""
    return json.dumps([asdict(architecture) for architecture in architectures])


def decode_architectures(text: str) -> list[AnyArchitecture]:
    """Return the architectures of all experts, or one for all.

    Raises:
        FedjetsError: the text is none.
    """
    try:
        return _ARCHITECTURES.validate_json(text)
    except ValidationError:
        raise FedjetsError("the server sent malformed architectures; install the same release on both") from None


def expert_architecture(config: Config, common: CommonExpert, spec: Spec, init: str) -> AnyArchitecture:
    """Return the architecture of an expert, or of the model whose tail it is, by the settings.

    A tail, or an expert that starts as the common expert (``init = "common"``), takes the common expert's; how a
    language model is trained in rounds is not for a file to say.
    """
    if isinstance(common.architecture, LanguageArchitecture):
        own = common.architecture
        if builds_own_experts(config, init):
            own = language_architecture(config, own.vocabulary)
        return replace(own, balance=config.language_model.balance)
    return configured_architecture(config, spec) if builds_own_experts(config, init) else common.architecture


def build_expert(
    config: Config, common: CommonExpert, architecture: AnyArchitecture, expert: int, init: str
) -> nn.Sequential:
    """Return expert ``expert`` at its start, trainable.

    Args:
        config: ``moe.trainable`` says which part of the model an expert is.
        common: the common expert.
        architecture: of the expert, or of the model whose tail it is.
        expert: its id; decides its random draw.
        init: ``random`` or ``common``.
    """
    if init == "common":
        model = copy.deepcopy(common.model).requires_grad_(True)
        if isinstance(architecture, Architecture):
            model = NECKS[architecture.neck](model)
    else:
        model = build(architecture, derive(config.run.seed, "expert", expert))
    return tail(model, config.moe.trainable)


def expert_specs(architectures: Sequence[AnyArchitecture], trainable: str) -> list[VectorSpec]:
    """Return the layouts of experts of some architectures; each kind is built once, without memory for its weights."""
    with torch.device("meta"):
        kinds = {a: VectorSpec.of(tail(build(a, 0), trainable)) for a in set(architectures)}
    return [kinds[a] for a in architectures]


def gate_inputs(common: CommonExpert, layer: str) -> int:
    """Return the length of an embedding, ``logits`` or ``penultimate``: the gate's inputs."""
    head = common.model[-1]
    assert isinstance(head, nn.Linear)
    return head.out_features if layer == "logits" else head.in_features


def build_configured_gate(config: Config, common: CommonExpert, experts: int) -> nn.Sequential:
    """Return the gate at its start."""
    inputs = gate_inputs(common, config.common_expert.embedding)
    return build_gate(inputs, config.gate.hidden, experts, derive(config.run.seed, "gate"))
