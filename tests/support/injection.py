"""Inject faults at every place of a call: an interrupt at a line, lack of memory in a call into C."""

import sys
from pathlib import Path

import pytest

import gpu_bn

PACKAGE = str(Path(gpu_bn.__file__).parent)


class Fault(BaseException):
    """Be what is injected; nothing catches it by accident."""


def at_line(number, error):
    """Make a trace function that raises at a line of the package, counted from 0, and counts the lines it has seen."""
    seen = [0]

    def local(_, event, __):
        if event == "line":
            seen[0] += 1
            if seen[0] == number + 1:
                raise error
        return local

    def trace(frame, *_):
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    return trace, seen


def at_c_call(number, error, parts=("",)):
    """Make a profile function that raises before a call into C from parts of the package, and counts these calls."""
    seen = [0]

    def profile(frame, event, _):
        name = frame.f_code.co_filename
        if event == "c_call" and name.startswith(PACKAGE) and any(part in name for part in parts):
            seen[0] += 1
            if seen[0] == number + 1:
                raise error

    return profile, seen


def injected(call, install, place, error):
    """Run with a fault at a place; return whether it was raised, and how many places there were."""
    function, seen = place
    before = sys.gettrace() if install is sys.settrace else sys.getprofile()
    install(function)
    try:
        call()
    except type(error):
        raised = True
    else:
        raised = False
    finally:
        install(before)
    return raised, seen[0]


INJECTIONS = [
    pytest.param(sys.settrace, at_line, KeyboardInterrupt(), id="interrupt at a line"),
    pytest.param(sys.setprofile, at_c_call, MemoryError(), id="no memory in a call into C"),
]
