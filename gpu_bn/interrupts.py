"""Delay Ctrl-C until the end of a short section that must not be interrupted."""

from __future__ import annotations

import signal
import threading
from typing import Any


class deferred:
    """A context that delays SIGINT: its handler runs at the end of the block.

    Python runs signal handlers in the main thread only; in other threads the context does nothing.
    """

    __slots__ = ("_arrived", "_handler")

    def __enter__(self) -> None:
        self._arrived: Any = None
        self._handler: Any = None
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and threading.get_ident() == threading.main_thread().ident:
            self._handler = handler
            signal.signal(signal.SIGINT, self._note)  # an earlier interrupt is raised here, a later one is noted

    def _note(self, *arrived: Any) -> None:
        self._arrived = arrived

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._arrived is not None:
                self._handler(*self._arrived)
