"""What scores are computed from: arrays on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def host(values: Any, dtype: Any = None) -> np.ndarray:
    """Numbers, or a tensor of them, as an array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # numpy has none
    return np.asarray(values, dtype)
