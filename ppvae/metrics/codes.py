"""How many codes are used."""

from __future__ import annotations

from typing import Any

import numpy as np

from ppvae.metrics.arrays import host


def code_perplexity(indices: Any, num_codes: int) -> float:
    r"""The exponential of the entropy of how often each code is used; K for all alike.

    .. math:: \exp\Big(-\sum_k \hat p_k \log \hat p_k\Big), \qquad
              \hat p_k = \frac{1}{M} \sum_m 1[c_m = k]

    It grows with the number of rows until every code has been met: give a whole validation set,
    not a batch.

    Args:
        indices: integers in ``0 .. num_codes - 1``, of any shape.
        num_codes: K.

    Raises:
        ValueError: no indices, or one outside the range.

    Example:
        >>> round(code_perplexity([[0, 1], [2, 3]], num_codes=64), 6)
        4.0
    """
    numbers = np.asarray(host(indices)).ravel().astype(np.int64)
    if not numbers.size or numbers.min() < 0 or numbers.max() >= num_codes:
        seen = f"{numbers.min()} .. {numbers.max()}" if numbers.size else "none"
        raise ValueError(f"code_perplexity: indices must lie in 0 .. {num_codes - 1}, got {seen}")
    share = np.bincount(numbers, minlength=num_codes) / numbers.size
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))
