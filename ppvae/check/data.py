"""What can be wrong with data, whatever the pair, as lines of a message."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


def shape_fault(tensors: Mapping[str, Tensor]) -> str:
    """Why tensors, by their names, are not rows of datapoints; "" if they are."""
    for label, tensor in tensors.items():
        if kind := _no_numbers(tensor):
            return f"argument {label!r} {kind}"
        if tensor.layout != torch.strided:
            return f"argument {label!r} is sparse ({tensor.layout}): give {label}.to_dense()"
        if tensor.dim() == 0:
            return (
                f"argument {label!r} is a single number, and the first dimension of every tensor "
                "is the datapoints: give it as a Python number, or as an attribute of the program"
            )
        if tensor.numel() == 0:
            return (
                f"argument {label!r} is empty: shape {tuple(tensor.shape)}; its first dimension is "
                "the datapoints, and there must be at least one"
            )
    if len({len(tensor) for tensor in tensors.values()}) > 1:
        seen = ", ".join(f"{label}: {tuple(t.shape)}" for label, t in tensors.items())
        return f"the arguments differ in length ({seen}); each needs one row per datapoint"
    return ""


def _no_numbers(tensor: Tensor) -> str:
    """Why a tensor has no values that a density could be taken of, and the cure; "" if it has."""
    if tensor.is_nested:
        return "is a nested tensor, of rows of different lengths: pad them, and mask the padding"
    if tensor.is_meta:
        return "is on the device 'meta', which keeps no values: give the tensor itself"
    if tensor.is_quantized:
        return f"is quantised ({tensor.dtype}): give its dequantize()"
    if tensor.is_floating_point() and tensor.element_size() == 1:
        return f"is {tensor.dtype}, which torch does not reckon with: give its float()"
    if tensor.is_complex():
        return f"is complex ({tensor.dtype}): give torch.view_as_real(...) of it"
    return ""


def number_fault(tensors: Mapping[str, Tensor], where: str = "") -> str:
    """Which tensor, of the data that ``where`` names, holds NaN or infinite values; "": none."""
    for label, tensor in tensors.items():
        rows = rows_without_numbers(tensor).nonzero()
        if len(rows):
            count = int((~torch.isfinite(tensor)).sum())
            return (
                f"argument {label!r}{where} has {count} NaN or infinite values in "
                f"{len(rows)} rows, the first is row {int(rows[0])}"
            )
    return ""


def rows_without_numbers(tensor: Tensor) -> Tensor:
    """Which rows of a tensor hold NaN or infinite values, ``(N,)``."""
    # A finite sum has no NaN or infinity in it, and costs a fraction of looking at each value.
    if not tensor.is_floating_point() or torch.isfinite(tensor.sum()):
        return torch.zeros(len(tensor), dtype=torch.bool, device=tensor.device)
    return (~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1)


def refused_rows(check: Callable[[Tensor], None], values: Tensor, start: int = 0) -> Iterator[int]:
    """Rows that a check refuses, in their order; what it accepts as a whole is not looked into."""
    try:
        check(values)
    except ValueError:
        half = len(values) // 2
        if not half:
            yield start
            return
        yield from refused_rows(check, values[:half], start)
        yield from refused_rows(check, values[half:], start + half)
