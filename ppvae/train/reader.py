"""A thread that reads ahead of the training step, and leaves the processor to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

AHEAD = 3  # results that are made before they are asked for


def read_ahead(
    read: Callable[[Any], Any], items: Iterable[Any], ahead: int = AHEAD
) -> Generator[Any, None, None]:
    """Yield ``read(item)`` for each item, up to ``ahead`` of them before it is asked for.

    One thread reads. What is raised there is raised here. Closing the generator ends the thread.

    Example:
        >>> list(read_ahead(abs, [-1, 2, -3]))
        [1, 2, 3]
    """
    num_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(1, thread_name_prefix="ppvae reader")
    ready: deque[Future[Any]] = deque()
    try:
        pool.submit(_use_one_thread).result()
        torch.set_num_threads(num_threads)  # unchanged here, but threads started later follow it
        for item in items:
            ready.append(pool.submit(read, item))
            if len(ready) > ahead:
                yield ready.popleft().result()
        while ready:
            yield ready.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _use_one_thread() -> None:
    """Let torch compute without threads of its own in this one.

    They would spin while they wait for each other, and take the cores from the step.
    """
    torch.get_num_threads()  # the first call in a thread sets their number: let that be over
    torch.set_num_threads(1)
