"""What scores are computed from: arrays on the host."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def host(values: Any) -> Any:
    """A tensor as an array; anything else as it is."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values
