"""The number of threads of a call, by the environment, the CPU affinity and the quota of a control group."""

import os

import pytest

import gpu_bn
from gpu_bn.backends.cpu import threads


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    monkeypatch.setattr(threads, "_threads", 3)


@pytest.mark.parametrize("text", ["", "abc", "-3", "2.5", "²"])
@pytest.mark.parametrize("nbytes", [0, 64, 1 << 30])
def test_a_bad_number_in_the_environment_is_named_at_the_first_use(monkeypatch, text, nbytes):
    monkeypatch.setenv("GPU_BN_NUM_THREADS", text)
    monkeypatch.setattr(threads, "_threads", 0)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"environment variable GPU_BN_NUM_THREADS .* got '{text}'"):
            threads.threads_for(nbytes, 3 << 19)


@pytest.mark.parametrize("differentiated", [False, True])
def test_a_bad_number_in_the_environment_is_named_by_a_small_layer_of_torch(monkeypatch, differentiated):
    torch = pytest.importorskip("torch")
    from gpu_bn import nn

    monkeypatch.setenv("GPU_BN_NUM_THREADS", "abc")
    monkeypatch.setattr(threads, "_threads", 0)
    layer, x = nn.BatchNorm(3), torch.ones(4, 3, 1, 1, 5 + differentiated, requires_grad=differentiated)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"environment variable GPU_BN_NUM_THREADS .* got 'abc'"):
            layer(x)
    assert layer.num_batches_tracked == 0


def test_the_environment_sets_the_number_and_a_call_changes_it(monkeypatch):
    monkeypatch.setenv("GPU_BN_NUM_THREADS", "5")
    monkeypatch.setattr(threads, "_threads", 0)
    assert gpu_bn.get_num_threads() == 5
    gpu_bn.set_num_threads(2)
    assert gpu_bn.get_num_threads() == 2
    monkeypatch.setenv("GPU_BN_NUM_THREADS", "0")
    monkeypatch.setattr(threads, "_threads", 0)
    assert gpu_bn.get_num_threads() == min(threads._cores(), 8)


@pytest.mark.parametrize(("wrong", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError)])
def test_a_wrong_number_changes_nothing(wrong, error):
    with pytest.raises(error, match="thread"):
        gpu_bn.set_num_threads(wrong)
    assert gpu_bn.get_num_threads() == 3


def test_small_tensors_stay_on_the_callers_thread():
    assert threads.threads_for(0, 3 << 19) == threads.threads_for(1 << 20, 3 << 19) == 1
    assert threads.threads_for(1 << 30, 3 << 19) == 3


def files(folder, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("group", "limits", "cores"),
    [
        ("0::/", {"": {"cpu__max": "150000 100000"}}, 1.5),
        ("0::/a/b", {"a": {"cpu__max": "200000 100000"}, "a/b": {"cpu__max": "max 100000"}}, 2),
        ("0::/a/b", {"": {"cpu__max": "100000 100000"}, "a": {"cpu__max": "200000 100000"}}, 1),
        ("0::/of/the/host", {"": {"cpu__max": "300000 100000"}}, 3),
        (
            "4:cpu,cpuacct:/x\n3:memory:/",
            {"cpu/x": {"cpu__cfs_quota_us": "50000", "cpu__cfs_period_us": "100000"}},
            0.5,
        ),
        ("4:cpu:/x", {"cpu/x": {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}}, 1 << 20),
        ("3:memory:/x", {"x": {"cpu__max": "100000 100000"}}, 1 << 20),
        ("0::/a", {}, 1 << 20),
    ],
)
def test_the_quota_of_a_control_group(tmp_path, group, limits, cores):
    for folder, texts in limits.items():
        files(tmp_path / "fs" / folder, **texts)
    files(tmp_path, own=group + "\n")
    assert threads._quota(tmp_path / "fs", tmp_path / "own") == cores


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert threads._quota(tmp_path, tmp_path / "none") == 1 << 20


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
def test_the_cores_are_those_of_the_affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(threads, "_quota", lambda *_: 2.9)
    assert threads._cores() == 2
    monkeypatch.setattr(threads, "_quota", lambda *_: 0.5)
    assert threads._cores() == 1
    monkeypatch.setattr(threads, "_quota", lambda *_: 99.0)
    assert threads._cores() == 6
