"""Inject errors into a call: an interrupt at a line, or a lack of memory in a call into C."""

import sys
from pathlib import Path

import pytest

import gpu_bn

PACKAGE = str(Path(gpu_bn.__file__).parent)


class Fault(BaseException):
    """An error to inject, which no code catches by accident."""


def at_line(number, error):
    """Return a trace function that raises at line ``number`` of the package, and a list with the count of lines."""
    count = [0]

    def local(_, event, __):
        if event == "line":
            count[0] += 1
            if count[0] == number + 1:
                raise error
        return local

    def trace(frame, *_):
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    return trace, count


def at_c_call(number, error, parts=("",)):
    """Return a profile function that raises before call ``number`` into C, and a list with the count of these calls.

    Only calls from files of the package whose path contains one of ``parts`` count.
    """
    count = [0]

    def profile(frame, event, _):
        name = frame.f_code.co_filename
        if event == "c_call" and name.startswith(PACKAGE) and any(part in name for part in parts):
            count[0] += 1
            if count[0] == number + 1:
                raise error

    return profile, count


def run_with_error(call, install, place, error):
    """Run a call with an error injected. Return whether it was raised, and the number of lines or calls into C.

    ``install`` is ``sys.settrace`` for a place from :func:`at_line`, ``sys.setprofile`` for one from :func:`at_c_call`.
    """
    function, count = place
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
    return raised, count[0]


INJECTIONS = [
    pytest.param(sys.settrace, at_line, KeyboardInterrupt(), id="interrupt at a line"),
    pytest.param(sys.setprofile, at_c_call, MemoryError(), id="no memory in a call into C"),
]
