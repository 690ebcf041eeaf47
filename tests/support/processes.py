"""Run functions of a module in several processes that talk by gloo, each with its own interpreter.

``python -m support.processes MODULE STORE RANK WORLD NAME...`` is one of them; :func:`launch` starts all.
"""

import importlib
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from support.paths import ROOT, TESTS

TIMEOUT = 280  # seconds, for a hang: a busy machine may take its time, and pytest ends a test after 300


def launch(world, module, names, folder):
    """Run the processes; return their functions' results by rank, or raise an assertion error with what one raised."""
    processes = start(world, module, names, folder)
    outputs = finish(processes)
    if any(process.returncode for process in processes):  # the first to fail ends the others
        raise AssertionError(min(outputs, key=lambda output: "closed by peer" in output or not output))
    return results(world, folder)


def once(tmp_path_factory, name, make):
    """Return ``make``'s result for a folder; of several processes that run tests (pytest -n), one calls it."""
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
    """Return what each process's functions have returned so far, by rank and name."""
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
    """Return what the processes print, and end them."""
    end = time.monotonic() + TIMEOUT
    try:
        return [process.communicate(timeout=end - time.monotonic())[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def main(module, folder, rank, world, *names):
    import torch
    import torch.distributed as dist

    functions = importlib.import_module(module)  # with gpu_bn, before there is a group
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(rank),
        world_size=int(world),
        timeout=timedelta(seconds=TIMEOUT),
    )
    found = {}
    for name in names:
        found[name] = getattr(functions, name)(int(rank), int(world))
        torch.save(found, Path(folder) / f"result.{rank}")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch.compile keeps groups: a thread of Gloo's at work when the interpreter ends aborts the process


def gloo_threads():
    """Return the names of this process's threads that serve a group."""
    names = (task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir())
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    main(*sys.argv[1:])
