"""Where a process computes."""

import torch

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError


def device_of(config: Config) -> torch.device:
    """Return the device that ``run.device`` means in this process.

    Raises:
        FedjetsError: it is ``cuda``, and no GPU can be used here.
    """
    wanted, present = config.run.device, torch.cuda.is_available()
    if wanted == "cuda" and not present:
        raise FedjetsError("run.device = 'cuda': PyTorch finds no GPU here; set it to 'auto' or 'cpu'")
    return torch.device("cuda" if present and wanted != "cpu" else "cpu")


def imitates_precision(config: Config) -> bool:
    """Return whether this process would compute in a precision that its device only imitates."""
    if config.train.precision == "float32" or config.run.device == "cuda":
        return False
    return device_of(config).type == "cpu" and not has_bfloat16()


def has_bfloat16() -> bool:
    """Return whether this CPU computes in bfloat16, or PyTorch cannot tell; one that imitates it takes far longer."""
    tells = getattr(torch.cpu, "get_capabilities", None)  # newer than the oldest PyTorch that will do
    return tells is None or any(tells().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
