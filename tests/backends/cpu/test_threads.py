"""The thread pool: each part is done once, no work outlives its call, and calls work without helpers, too."""

import _thread
import itertools
import os
import subprocess
import sys
import threading
import time

import pytest

from gpu_bn.backends.cpu import threads


@pytest.fixture(autouse=True)
def pool(monkeypatch):
    """Return a new pool of up to three threads."""
    fresh = threads._Pool()
    monkeypatch.setattr(threads, "_pool", fresh)
    monkeypatch.setattr(threads, "_threads", 3)
    return fresh


class Parts:
    """Work that hands out its parts as kernels do, and records the threads that take part."""

    def __init__(self, count, seconds=0.0):
        self.counter, self.count, self.seconds = itertools.count(), count, seconds
        self.done, self.inside, self.names = [], 0, set()

    def __call__(self):
        self.inside += 1
        self.names.add(threading.get_ident())
        try:
            while (part := next(self.counter)) < self.count:
                time.sleep(self.seconds)
                self.done.append(part)
        finally:
            self.inside -= 1


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_each_part_is_done_once(count, most):
    parts = Parts(count)
    threads.run(parts, most)
    assert sorted(parts.done) == list(range(count))
    assert parts.inside == 0


def count_threads(count):
    """Return how many threads run the work of a call, in which each waits for the others."""
    names, all_there = set(), threading.Barrier(count, timeout=20)

    def work():
        names.add(threading.get_ident())
        all_there.wait()

    threads.run(work, 3)
    return len(names)


def test_helpers_help_and_stay():
    for _ in range(3):
        assert count_threads(3) == 3
    assert threads._pool.helpers == 2


def test_calls_from_many_threads_at_once():
    work = [[Parts(20, 0.0001) for _ in range(20)] for _ in range(8)]

    def call(mine):
        for parts in mine:
            threads.run(parts, 3)
            assert sorted(parts.done) == list(range(20))
            assert parts.inside == 0

    errors = run_threads(call, work)
    assert errors == []
    assert threads._pool.helpers == 2


def run_threads(call, arguments):
    """Call a function in a new thread for each argument, and return the errors."""
    errors = []

    def guarded(argument):
        try:
            call(argument)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=guarded, args=(argument,)) for argument in arguments]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return errors


# --------------------------------------------------------------------------------------------------------- exceptions
class Failure(Exception):
    pass


def fail_in(caller, started=None):
    """Return work that raises in the caller's thread or in a helper's, once both have begun."""
    me, both = threading.get_ident(), threading.Barrier(2, timeout=10)

    def work():
        both.wait()
        if (threading.get_ident() == me) == caller:
            raise Failure("whole", 42)
        if started is not None:
            time.sleep(0.05)
            started.append("finished")

    return work


def test_a_helpers_exception_reaches_the_caller_whole():
    finished = []
    with pytest.raises(Failure) as caught:
        threads.run(fail_in(False, finished), 2)
    assert caught.value.args == ("whole", 42)
    assert any(entry.name == "work" for entry in caught.traceback)
    assert finished == ["finished"]
    test_helpers_help_and_stay()  # the helper is still alive


def test_the_callers_exception_waits_for_its_helpers():
    finished = []
    with pytest.raises(Failure):
        threads.run(fail_in(True, finished), 2)
    assert finished == ["finished"]


def test_exceptions_go_to_their_own_callers():
    def call(number):
        for _ in range(20):
            if number % 2:
                threads.run(Parts(5), 3)
            else:
                with pytest.raises(Failure) as caught:
                    threads.run(failing(number), 3)
                assert caught.value.args == (number,)

    def failing(number):
        def work():
            raise Failure(number)

        return work

    assert run_threads(call, range(6)) == []


def test_a_helper_that_has_not_begun_does_nothing_later(monkeypatch, pool):
    monkeypatch.setattr(threads, "start_new_thread", lambda *_: None)  # the helper does not start
    parts = Parts(3)
    threads.run(parts, 2)
    late = pool.queue.get_nowait()
    assert late.work is None, "it would keep the call's arrays"
    threads._help(late)
    assert sorted(parts.done) == [0, 1, 2]
    assert len(parts.names) == 1


# ------------------------------------------------------------------------------------------- threads that cannot start
def test_without_new_threads_the_caller_does_it_all(monkeypatch, pool):
    def refused(*_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threads, "start_new_thread", refused)
        first = Parts(5)
        threads.run(first, 3)
    assert sorted(first.done) == list(range(5))
    assert pool.queue.empty()
    later = Parts(30, 0.005)
    threads.run(later, 3)
    assert sorted(later.done) == list(range(30))
    assert first.done == list(range(5)), "a task has outlived its call"


def test_the_second_helper_may_be_refused(monkeypatch, pool):
    start = threads.start_new_thread

    def first_only(*arguments):
        if pool.helpers:
            raise RuntimeError("can't start new thread")
        return start(*arguments)

    monkeypatch.setattr(threads, "start_new_thread", first_only)
    assert (count_threads(2), pool.helpers) == (2, 1)


ENDINGS = {
    "atexit": "import atexit; atexit.register(call)",
    "del": """
class Late:
    def __del__(self, call=call): call()
import builtins; builtins.late = Late()""",
    "a thread that outlives main": """
import threading, time
def later():
    while threading.main_thread().is_alive(): time.sleep(0.01)
    time.sleep(0.05)
    call()
threading.Thread(target=later).start()""",
}


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
def test_calls_at_the_end_of_the_process(ending, used):
    code = f"""
import itertools, os, time
from gpu_bn.backends.cpu import threads
def call(os=os, run=threads.run, count=itertools.count, sleep=time.sleep):
    counter, done = count(), []
    def work():
        while (part := next(counter)) < 20:
            sleep(0.001)
            done.append(part)
    run(work, 3)
    os.write(1, b"right\\n" if sorted(done) == [*range(20)] else b"wrong\\n")
{"call()" if used else ""}
{ENDINGS[ending]}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["right"] * (2 if used else 1)


@pytest.mark.parametrize("ending", ["del", "a thread that outlives main"])
def test_large_calls_at_the_end_of_the_process(ending, backend):
    """Calls work when the interpreter shuts down and nothing can be imported any more."""
    code = f"""
import os, numpy, gpu_bn
gpu_bn.set_num_threads(3)
x = numpy.linspace(0, 1, 1 << 20, dtype="f4").reshape(64, 16, 1024)
def call(x=x, function=gpu_bn.batch_norm, write=os.write):
    y = function(x, training=True, activation="relu", backend="{backend}")
    write(1, b"right\\n" if y[0, 0, 0] == 0 and 1.7 < y[-1, -1, -1] < 1.8 else b"wrong\\n")
call()
{ENDINGS[ending]}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["right"] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_a_pool_of_its_own():
    threads.run(Parts(20, 0.002), 3)
    child = os.fork()
    if not child:
        os._exit(0 if count_threads(3) == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0


# --------------------------------------------------------------------------------------------------------- interrupts
def test_an_interrupt_while_the_caller_waits():
    me, begun, finished = threading.get_ident(), threading.Event(), []

    def work():
        if threading.get_ident() != me:
            begun.set()
            time.sleep(0.05)  # by then the caller waits
            _thread.interrupt_main()
            time.sleep(0.05)
            finished.append(True)
        else:
            begun.wait(30)

    with pytest.raises(KeyboardInterrupt):
        threads.run(work, 2)
    assert finished == [True]


def test_an_interrupt_at_any_line_leaves_no_helper_at_work():
    """Each call is interrupted once, at another line of the pool's code."""
    test_helpers_help_and_stay()  # starts the helpers
    for at in itertools.count():
        parts = Parts(6, 0.002)
        interrupted = run_interrupted(parts, at)
        assert parts.inside == 0, f"a helper was left at work (line event {at})"
        done = len(parts.done)
        time.sleep(0.004)
        assert len(parts.done) == done, f"a task has outlived its call (line event {at})"
        if not interrupted:
            break
    assert at > 20
    assert sorted(parts.done) == list(range(6))


def run_interrupted(parts, at):
    """Run with a KeyboardInterrupt at the ``at``-th line of the pool's code; tell whether that line was reached."""
    count = itertools.count()

    def trace(frame, event, _):
        if frame.f_code.co_filename != threads.__file__:
            return None
        if event == "line" and next(count) == at:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        threads.run(parts, 3)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
