"""Ctrl-C and termination signals, which let a run end where it can be taken up again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupt:
    """Whether a signal has asked the run to end."""

    asked = False


@contextmanager
def interrupts(wanted: bool) -> Iterator[Interrupt]:
    """Inside, the first Ctrl-C or termination signal sets ``asked``; the next acts as ever.

    Only the main thread gets signals; a signal that is ignored stays so.
    """
    interrupt = Interrupt()
    handlers: dict[int, Any] = {}

    def ask(number: int, frame: Any) -> None:
        interrupt.asked = True
        signal.signal(number, handlers[number])

    if wanted and threading.current_thread() is threading.main_thread():
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):
                handlers[number] = handler
                signal.signal(number, ask)
    try:
        yield interrupt
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
