"""What scores are computed from: arrays on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


def host(values: Any, dtype: Any = None) -> np.ndarray:
    """Numbers, or a tensor of them, as an array."""
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype)
