"""How tensors are cut for the processor's caches."""

import numpy as np
import pytest
from support import rng, same_bits

pytest.importorskip("numba")

import gpu_bn
from gpu_bn.backends.cpu import launch, plans
from gpu_bn.kernels.cpu.vector import FLOAT32


def described(folder, *caches):
    """A system's description of caches: level, size, and which cores share each."""
    for at, texts in enumerate(caches):
        index = folder / f"index{at}"
        index.mkdir()
        for name, text in zip(("level", "size", "shared_cpu_map"), texts, strict=True):
            (index / name).write_text(f"{text}\n")
    return plans._caches(folder)


def test_a_virtual_machine_has_a_part_of_its_hosts_last_cache(tmp_path, monkeypatch):
    found = described(tmp_path, ("1", "48K", "1"), ("2", "2048K", "1"), ("3", "300M", "3"))
    assert set(found) == {(1, 48 << 10, 1), (2, 2 << 20, 1), (3, 300 << 20, 2)}
    monkeypatch.setattr(plans, "_caches", lambda: found)
    assert plans.second_cache.__wrapped__() == 2 << 20
    assert plans.last_cache.__wrapped__() == 32 << 20


def test_many_cores_have_a_whole_last_cache(tmp_path, monkeypatch):
    found = described(tmp_path, ("3", "98304K", "ffff,ffffffff"))
    monkeypatch.setattr(plans, "_caches", lambda: found)
    assert plans.last_cache.__wrapped__() == 96 << 20


@pytest.mark.parametrize("caches", [[], [("2", "", "1")], [("2", "1G", "1")], [("two", "1M", "1")]], ids=str)
def test_systems_that_do_not_tell(caches, tmp_path, monkeypatch):
    assert described(tmp_path, *caches) == []
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
