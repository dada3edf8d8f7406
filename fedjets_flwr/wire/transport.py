"""How one vector becomes an array of a Flower message: raw little-endian float32, no header to parse."""

import sys

import numpy as np
import torch
from flwr.app import Array
from torch import Tensor

STYPE = "fedjets.raw"


def encode(vector: Tensor) -> Array:
    """Return a float32 vector as an array of a message: one copy."""
    assert vector.dtype == torch.float32 and vector.dim() == 1 and sys.byteorder == "little"
    data = vector.detach().cpu().contiguous().numpy().tobytes()
    return Array(dtype="float32", shape=tuple(vector.shape), stype=STYPE, data=data)


def decode(array: Array) -> Tensor:
    """Return the vector in an array: a read-only view of its bytes, no copy."""
    floats = np.frombuffer(array.data, dtype=np.float32)
    floats.flags.writeable = False
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the view must not be written to
        return torch.from_numpy(floats)
