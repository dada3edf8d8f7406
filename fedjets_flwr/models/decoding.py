"""Text that a language model writes: greedily, a batch at once."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.inference_mode()
def greedy(answer: Callable[[Tensor], Tensor], prompts: Tensor, most: int, end: int) -> Tensor:
    """Return the ``most`` tokens that follow each prompt, each the likeliest after those before it.

    All are guessed at once and looked at again until none changes (Jacobi iteration): what stands before a token is
    right after as many passes, so this is what one token after the other gives, in as many passes at most and mostly in
    fewer.

    Args:
        answer: tokens (b, t), numbers below 0 behind the last -> logits of the next ones, (b, t, V).
        prompts: (b, t) int64, numbers below 0 behind the last token.
        most: tokens that are written.
        end: the token after which only it follows.
    """
    lengths = (prompts >= 0).sum(dim=1, keepdim=True)
    wide = int(lengths.max()) + most
    places = torch.arange(wide, device=prompts.device)
    written = (places >= lengths) & (places < lengths + most)
    tokens = F.pad(prompts, (0, max(0, wide - prompts.shape[1])), value=-1)[:, :wide].masked_fill(written, end)
    rows = torch.arange(len(prompts), device=prompts.device)
    for _ in range(most):
        before, open_ = tokens[rows], written[rows]
        likeliest = F.pad(answer(before[:, :-1]).argmax(dim=2), (1, 0))
        after = torch.where(open_, likeliest, before)
        ended = ((after == end) & open_).cumsum(dim=1) > 0
        after = after.masked_fill(ended & open_, end)
        tokens[rows] = after
        rows = rows[(after != before).any(dim=1)]
        if not len(rows):
            break
    return tokens[written].view(-1, most)
