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
