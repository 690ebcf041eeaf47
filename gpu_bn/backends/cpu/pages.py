"""Huge pages for large outputs.

Memory that an allocator has just taken from the system has no pages yet: the first write to each page of 4 KB causes a
page fault. For a large output the faults take longer than the call itself. Linux maps 2 MB at a fault if asked to.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

LARGE = 3 << 20
"""Bytes from which on an output gets huge pages."""
PAGE = 2 << 20
MADV_HUGEPAGE = 14


def advise(address: int, nbytes: int) -> None:
    """Ask Linux to use huge pages for those that lie wholly within this memory; it may refuse."""
    first, end = -(-address // PAGE) * PAGE, (address + nbytes) // PAGE * PAGE
    madvise = _madvise()
    if madvise is not None and end > first:
        madvise(first, end - first, MADV_HUGEPAGE)


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
