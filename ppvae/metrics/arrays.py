"""What scores are computed from: arrays on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def host(values: Any, dtype: Any = None, name: str = "the argument") -> np.ndarray:
    """Numbers, or a tensor of them, as an array.

    Raises:
        TypeError: a tensor without a dense block of numbers.
        ValueError: a masked array of which values are hidden.
    """
    if isinstance(values, Tensor):
        if values.is_nested:
            raise TypeError(f"{name} is a nested tensor, of rows of different lengths: pad them")
        if values.layout != torch.strided or values.is_quantized or values.is_meta:
            raise TypeError(
                f"{name} is a tensor without a dense block of numbers ({values.layout}, "
                f"{values.dtype}, {values.device}): give its to_dense() or dequantize()"
            )
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # numpy has none
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise ValueError(f"{name} is a masked array, and some of its values are hidden: drop them")
    return np.asarray(values, dtype)
