"""Run functions of a module in several processes that communicate by gloo.

:func:`launch` starts them all. One of them is ``python -m support.processes MODULE FOLDER RANK WORLD NAME...``.
"""

import importlib
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from support.paths import ROOT, TESTS

TIMEOUT = 280  # seconds until processes count as hanging; pytest ends a test after 300


def launch(world, module, names, folder):
    """Run the processes and return the results of their functions by rank and name.

    Raises:
        AssertionError: a process has failed. The message is its output.
    """
    processes = start(world, module, names, folder)
    outputs = finish(processes)
    if any(process.returncode for process in processes):  # others fail as well, because the first closes connections
        raise AssertionError(min(outputs, key=lambda output: "closed by peer" in output or not output))
    return results(world, folder)


def once(tmp_path_factory, name, make):
    """Call ``make(folder)`` and return the folder. With ``pytest -n`` only one of the processes calls it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    done = folder / "done"
    try:
        folder.mkdir()
    except FileExistsError:
        while not done.exists():
            time.sleep(0.2)
    else:
        try:
            make(folder)
        finally:
            done.touch()
    return folder


def results(world, folder):
    """Return the results so far of the functions, by rank and name."""
    import torch

    return [torch.load(Path(folder) / f"result.{rank}", weights_only=False) for rank in range(world)]


def start(world, module, names, folder):
    """Start the processes."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, TESTS)))}
    command = [sys.executable, "-m", "support.processes", module, str(folder)]
    return [
        subprocess.Popen(
            [*command, str(rank), str(world), *names],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


def finish(processes):
    """Wait for the processes and return their outputs. Kill those that are not done in time."""
    end = time.monotonic() + TIMEOUT
    try:
        return [process.communicate(timeout=end - time.monotonic())[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def main(module, folder, rank, world, *names):
    """Run one process: call the named functions with its rank and the number of processes, and save the results."""
    import torch
    import torch.distributed as dist

    functions = importlib.import_module(module)  # imports gpu_bn before the group is created
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(rank),
        world_size=int(world),
        timeout=timedelta(seconds=TIMEOUT),
    )
    values = {}
    for name in names:
        values[name] = getattr(functions, name)(int(rank), int(world))
        torch.save(values, Path(folder) / f"result.{rank}")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch.compile keeps groups, and a Gloo thread that runs at the interpreter's end aborts the process


def gloo_threads():
    """Return the names of the threads of Gloo in this process."""
    names = (task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir())
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    main(*sys.argv[1:])
