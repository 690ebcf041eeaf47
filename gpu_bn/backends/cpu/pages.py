"""Huge pages for large outputs.

What an allocator has just taken from the system has no pages yet: the kernel's first write to each, of 4 KB, stops at
a fault, which costs more than the whole call. Linux gives 2 MB at a fault where it is told that they will be used.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

LARGE = 3 << 20
"""Bytes of an output that asks for them."""
PAGE = 2 << 20
MADV_HUGEPAGE = 14


def advise(address: int, nbytes: int) -> None:
    """Ask for huge pages, which systems may refuse, for all of them that lie within some memory."""
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
