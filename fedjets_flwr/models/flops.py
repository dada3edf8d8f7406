"""Floating-point operations of a model.

PyTorch's own counter imports its compiler, a second of every run; of the models here its counts are the same
(``tests/models/test_flops.py``): they call no other functions with weights than those below.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def forward_flops(module: nn.Module, sample: Tensor) -> int:
    """Return the floating-point operations of one forward pass: 2 per multiply-add, nothing for the rest.

    Products of attention count as nothing, too: PyTorch's counter knows none on a CPU.
    """
    training, counter = module.training, _Counter()
    with counter, torch.no_grad():
        module.eval()(sample)
    module.train(training)
    return counter.flops


class _Counter(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if (counted := _MULTIPLY_ADDS.get(func)) is not None:
            self.flops += 2 * counted(result, *args)
        return result


def _per_output(result: Tensor, x: Tensor, weight: Tensor, *_: object) -> int:
    """Return those of a layer each of whose outputs is a product with one row of its weight."""
    return result.numel() * weight[0].numel()


def _product(result: Tensor, x: Tensor, *_: object) -> int:
    return result.numel() * x.shape[-1]


_MULTIPLY_ADDS: dict[Any, Callable[..., int]] = {
    F.linear: _per_output,
    torch.conv2d: _per_output,
    torch.matmul: _product,
    Tensor.matmul: _product,
    Tensor.__matmul__: _product,
}
