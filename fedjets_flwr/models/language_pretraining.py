"""Training a language model on the public text, from which a run then starts."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.public_text import open_public_text
from fedjets_flwr.data.text_tokens import NOTHING
from fedjets_flwr.models.architectures import build
from fedjets_flwr.models.common_expert import CommonExpert, freeze
from fedjets_flwr.models.device import device_of
from fedjets_flwr.models.transformer import LanguageArchitecture
from fedjets_flwr.seeds import derive, torch_generator

LOOKED_AT = 512
"""Windows at most of held-out text by which a model's accuracy is told."""


def windows(tokens: Tensor, context: int) -> tuple[Tensor, Tensor] | None:
    """Return windows of tokens (n, T) that follow each other, and the token after each of them, (n, T).

    None where there is not one: tokens (m,) make (m - 1) // T.
    """
    count = (len(tokens) - 1) // context
    if count < 1:
        return None
    return tokens[: count * context].view(count, context), tokens[1 : count * context + 1].view(count, context)


def language_architecture(config: Config, vocabulary: int) -> LanguageArchitecture:
    """Return the architecture that ``language-model.*`` describes, for so many tokens."""
    m = config.language_model
    sizes = (m.context, m.width, m.heads, m.layers, m.switch_layers, m.experts, m.hidden)
    return LanguageArchitecture(vocabulary, *sizes, balance=m.balance)


def pretrain_language_model(config: Config, progress: Callable[[str], None]) -> CommonExpert:
    """Train ``language-model.pretrain-steps`` steps of next tokens on ``run.device``, and freeze what comes out.

    Each step reads windows drawn at random from the public text. Where something is asked for in it, they begin where
    it says, and what is asked for, few of all tokens, counts by itself once more. AdamW, half a cosine after a
    twentieth of warm-up.
    """
    how, text, device = config.language_model, open_public_text(config), device_of(config)
    architecture, seed = language_architecture(config, text.vocabulary), config.common_expert.seed
    progress(f"training a language model, {how.pretrain_steps} steps")
    model = build(architecture, derive(seed, "common-expert")).to(device)
    draws = torch_generator(seed, "common-expert-batches")
    stream, asked, steps = text.public, text.public_asked, how.pretrain_steps
    step_of = _adam_w(list(model.parameters()))
    warm = max(1, steps // 20)
    places = torch.arange(how.context + 1)
    model.train()
    for step in range(steps):
        most = max(1, len(stream) - how.context) if asked is None else len(asked.begins)
        starts = torch.randint(most, (how.pretrain_batch, 1), generator=draws)
        chosen = ((starts if asked is None else asked.begins[starts]) + places) % len(stream)
        batch = stream[chosen].to(device)
        logits = model(batch[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, batch[:, 1:].flatten())
        if asked is not None:
            targets = asked.targets[chosen[:, 1:]].flatten().to(device)
            loss = loss + F.cross_entropy(logits, targets, ignore_index=NOTHING)
        model.zero_grad()
        loss.backward()
        step_of(how.pretrain_lr * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps))))
        if (step + 1) % max(1, steps // 20) == 0:
            progress(f"language model: step {step + 1}/{steps}, loss {float(loss.detach()):.3f}")
    accuracy = next_token_accuracy(freeze(model.cpu()), text.public_held_out, how.context)
    progress(f"language model: next-token accuracy {accuracy:.4f} on held-out public text")
    told = replace(architecture, balance=0.0)
    return CommonExpert(model, told, (), (), config.data.name, accuracy, tokeniser=text.tokeniser)


def _adam_w(parameters: list[nn.Parameter]) -> Callable[[float], None]:
    """Return what takes a step of AdamW at some rate.

    By torch's own function: its class imports the compiler on first use, seconds of a run that has none to spare.
    """
    means, squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    steps = [torch.tensor(0.0) for _ in parameters]

    @torch.no_grad()
    def step(lr: float) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        adamw(
            list[Tensor](parameters), gradients, means, squares, [], steps, foreach=True, amsgrad=False, beta1=0.9,
            beta2=0.999, lr=lr, weight_decay=0.01, eps=1e-8, maximize=False,
        )  # fmt: skip

    return step


@torch.inference_mode()
def next_token_accuracy(model: nn.Module, tokens: Tensor, context: int) -> float:
    """Return the share of tokens that a model tells right, on the first windows of a text; 0 where there is none."""
    cut = windows(tokens[: LOOKED_AT * context + 1], context)
    if cut is None:
        return 0.0
    right = sum(int((model(x).argmax(2) == y).sum()) for x, y in zip(*(part.split(64) for part in cut), strict=True))
    return right / cut[1].numel()
