"""The gate: a two-layer MLP over the common expert's embedding (FedJETs, section 4)."""

from collections import OrderedDict

import torch
from torch import nn


def build_gate(inputs: int, hidden: int, experts: int, seed: int) -> nn.Sequential:
    """Return the gate's MLP; its outputs are the logits whose softmax over all M experts are the scores.

    The paper leaves width, activation and input open: we take ``gate.hidden`` ReLU units over the penultimate features,
    standardised per sample so that one learning rate suits every common expert.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            OrderedDict(
                norm=nn.LayerNorm(inputs, elementwise_affine=False),
                hidden=nn.Linear(inputs, hidden),
                relu=nn.ReLU(),
                output=nn.Linear(hidden, experts),
            )
        )
