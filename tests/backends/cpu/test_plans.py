"""Plans: how tensors are cut for the caches of the processor."""

from dataclasses import replace

import numpy as np
import pytest
from support import rng, same_bits

pytest.importorskip("numba")

import gpu_bn
from gpu_bn.backends.cpu import launch, plans
from gpu_bn.kernels.cpu.vector import BFLOAT16, FLOAT32, FLOAT64
from gpu_bn.spec import FLOAT_DTYPES
from gpu_bn.testing import Case, check


def parse_caches(folder, *caches):
    """Write a system's description of its caches (level, size, sharing cores) and return how it is read."""
    for at, texts in enumerate(caches):
        index = folder / f"index{at}"
        index.mkdir()
        for name, text in zip(("level", "size", "shared_cpu_map"), texts, strict=True):
            (index / name).write_text(f"{text}\n")
    return plans._caches(folder)


def test_a_virtual_machine_counts_on_a_part_of_the_last_cache(tmp_path, monkeypatch):
    found = parse_caches(tmp_path, ("1", "48K", "1"), ("2", "2048K", "1"), ("3", "300M", "3"))
    assert set(found) == {(1, 48 << 10, 1), (2, 2 << 20, 1), (3, 300 << 20, 2)}
    monkeypatch.setattr(plans, "_caches", lambda: found)
    assert plans.second_cache.__wrapped__() == 2 << 20
    assert plans.last_cache.__wrapped__() == 32 << 20


def test_many_cores_have_a_whole_last_cache(tmp_path, monkeypatch):
    found = parse_caches(tmp_path, ("3", "98304K", "ffff,ffffffff"))
    monkeypatch.setattr(plans, "_caches", lambda: found)
    assert plans.last_cache.__wrapped__() == 96 << 20


@pytest.mark.parametrize("caches", [[], [("2", "", "1")], [("2", "1G", "1")], [("two", "1M", "1")]], ids=str)
def test_caches_that_a_system_does_not_describe(caches, tmp_path, monkeypatch):
    assert parse_caches(tmp_path, *caches) == []
    monkeypatch.setattr(plans, "_caches", list)
    assert plans.second_cache.__wrapped__() == 1 << 20
    assert plans.last_cache.__wrapped__() == 32 << 20


@pytest.mark.parametrize("nbytes", [1 << 18, 2 << 20, 64 << 20])
def test_no_bit_depends_on_the_second_level_cache(nbytes, monkeypatch):
    x, dy = rng(1).standard_normal((2, 32, 64, 7, 7)).astype(np.float32)

    def results():
        monkeypatch.setattr(launch, "_prepared", {})
        y, saved = gpu_bn.batch_norm_forward(x, training=True, backend="cpu")
        return y, gpu_bn.batch_norm_backward(dy, saved, backend="cpu").dx

    expected = results()
    monkeypatch.setattr(plans, "second_cache", lambda: nbytes)
    group = plans.plan(plans.Geometry(32, 64, 49, (), 0), FLOAT32, True, False).group
    assert group == max(128 << 10, nbytes // 8) // (4 * 32 * 49)
    assert all(map(same_bits, results(), expected))


@pytest.mark.parametrize(
    ("runs", "channels", "length", "code", "evaluates", "by_rows"),
    [
        (8, 200, 15, FLOAT32, False, True),
        (16, 200, 16, FLOAT32, False, True),
        (16, 200, 36, BFLOAT16, False, True),
        (16, 200, 37, FLOAT32, False, False),
        (15, 200, 16, FLOAT32, False, False),
        (8, 200, 16, FLOAT32, True, True),
        (7, 200, 16, FLOAT32, True, False),
        (31, 200, 16, FLOAT64, False, False),
        (32, 100, 16, FLOAT64, False, True),
        (32, 2000, 16, FLOAT32, False, False),  # more scratch memory than a thread keeps
        (16, 2, 16, FLOAT32, False, False),  # tiny
    ],
)
def test_channels_of_a_few_elements_are_columns_where_there_are_many_runs(
    runs, channels, length, code, evaluates, by_rows
):
    seen = plans.Geometry(runs, channels, length, (), 0)
    assert plans.plan(seen, code, True, evaluates).by_rows == by_rows


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "case",
    [
        Case((32, 5, 4, 4), activation="relu", residual=True),
        Case((40, 3, 5, 5), mean=1e4, std=1.0),
        Case((33, 4, 6, 6), activation="silu", layout="sliced"),
    ],
    ids=str,
)
def test_such_channels_are_computed_right(case, mode, dtype):
    runs, channels, *rest = case.shape
    case = replace(case, mode=mode, dtype=dtype)
    seen = plans.Geometry(runs, channels, int(np.prod(rest)), (), 0)
    assert plans.plan(seen, FLOAT_DTYPES.index(dtype), True, mode == "eval").by_rows
    check(case, "cpu")
