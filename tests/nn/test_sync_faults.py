"""Test that an error on one process is raised by SyncBatchNorm on all, changes nothing, and leaves the group usable."""

import pytest

pytest.importorskip("torch")

from support import sync_faults as scenarios
from support.processes import finish, launch, once, results, start


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Return the results of three processes. The scenarios end with the kill of one of them."""

    def run(folder):
        names = ["troubles", "mistakes", "differences", "skipped", "wrong_vectors", "backwards", "first_calls"]
        names += ["aliases", "no_memory", "everywhere", "skipped_at_first", "silent", "killed"]
        (folder / "output").write_text("\n".join(finish(start(3, "support.sync_faults", names, folder))))

    folder = once(tmp_path_factory, "three", run)
    found = results(3, folder)
    assert [len(result) for result in found] == [13, 13, 12], (folder / "output").read_text()
    return found


REASONS = {
    "rank": "expected at least 2D input, up to 5D (got 1D input)",
    "channels": "expected input with as many channels as the layer has (got 5)",
    "dtype": "input should be float16, bfloat16, float32 or float64",
    "residual": "residual should have the input's shape, dtype and device",
    "mask": "mask should be bool or uint8, broadcast to the input's shape with one channel, and be on its device",
}


@pytest.mark.parametrize("mistake", list(REASONS))
def test_a_mistake_of_one_process_raises_on_all(three, mistake):
    texts = {result["troubles"][mistake] for result in three}
    assert texts == {f"SyncBatchNorm, process 1 of 3: {REASONS[mistake]}"}


def test_a_mistake_changes_nothing(three):
    assert all(result["troubles"]["unchanged"] and result["troubles"]["after"] == (4, 3) for result in three)


@pytest.mark.parametrize("mistake", list(scenarios.MISTAKES))
def test_what_fails_on_one_process_before_it_sends_raises_on_all(three, mistake):
    (text,) = {result["mistakes"][mistake][0] for result in three}
    assert text.startswith("SyncBatchNorm, process 2 of 3: ")
    named = mistake.removeprefix("infinite ").replace("counter", "num_batches_tracked")
    assert {"activation": "unknown activation 'selu'", "eps": "eps "}.get(mistake, named) in text
    assert all(result["mistakes"][mistake][1] for result in three), "a state has changed"


@pytest.mark.parametrize("difference", list(scenarios.DIFFERENCES))
def test_calls_that_differ_raise_on_all(three, difference):
    (text,) = {result["differences"][difference][0] for result in three}
    assert text.startswith("SyncBatchNorm, the 3 processes of a group made different calls: ")
    named = difference.removeprefix("no ")
    shown = {"momentum": "momentum 0.1 on 0 and 1, ", "dtype": "dtype float32 on 0 and 1, float64 on 2"}
    assert shown.get(named, named) in text
    assert all(result["differences"][difference][1] for result in three), "a state has changed"


@pytest.mark.parametrize("what", ["mistakes", "differences"])
def test_after_an_error_the_group_still_works(three, what):
    assert all(result[what]["after"] == ((4, 3), 1) for result in three)


@pytest.mark.parametrize("what", ["skipped", "evaluated", "other channels"])
def test_a_layer_left_out_on_one_process_raises_on_all(three, what):
    (text,) = {result["skipped"][what][0] for result in three}
    assert ("channels 3 on 0 and 1, 600 on 2" if what == "other channels" else "layer ") in text
    counters = [result["skipped"][what][1] for result in three]
    assert all(counter[2] == 1 for counter in counters)
    assert all(counter[1] <= 1 for counter in counters)
    assert all(result["skipped"][what + ", after"] == (4, 3) for result in three)


@pytest.mark.parametrize("mistake", ["weight", "bias", "running", "dtype", "device", "pair"])
def test_what_does_not_fit_per_channel_on_one_process_raises_on_all(three, mistake):
    for result in three:
        text, count = result["wrong_vectors"][mistake]
        assert text.startswith("SyncBatchNorm, process 2 of 3: weight, bias, running_mean and running_var should")
        assert count == 0


BACKWARD = {
    "skipped": "layer ",
    "forward": "pass backward on 0 and 1, forward on 2",
    "other order": "forward call ",
    "create_graph": "pass backward on 0 and 1, second derivative on 2",
    "no memory": "process 2 of 3: MemoryError: none left",
}


@pytest.mark.parametrize("difference", list(BACKWARD))
def test_backward_passes_that_differ_raise_on_all(three, difference):
    (text,) = {result["backwards"][difference] for result in three}
    assert text.startswith("SyncBatchNorm, ")
    assert BACKWARD[difference] in text
    assert all(result["backwards"][difference + ", unchanged"] for result in three)
    assert all(result["backwards"][difference + ", after"] == (4, 3) for result in three)


def test_a_process_that_asks_for_fewer_gradients_takes_part_all_the_same(three):
    assert all(result["backwards"]["of weights only"] is None for result in three)


def test_memory_that_runs_out_after_the_sums_raises_on_that_process_alone(three):
    found = [result["backwards"]["after the sums"] for result in three]
    assert found == [(None, True, (4, 3)), (None, True, (4, 3)), ("none left", True, (4, 3))]


def test_what_is_differentiated_is_compared_before_there_is_a_backward_pass(three):
    (text,) = {result["backwards"]["gradient"] for result in three}
    assert text.endswith("made different calls: gradient of the input on 0 and 1, of parameters only on 2")


@pytest.mark.parametrize("channels", [3, 600])
@pytest.mark.parametrize("phase", ["empty_like", "stats", "normalize"])
def test_memory_that_runs_out_on_one_process_raises_on_all_and_changes_nothing(three, phase, channels):
    for result in three:
        assert result["no_memory"][phase, channels] == ("SyncBatchNorm, process 2 of 3: MemoryError: none left", True)
        assert result["no_memory"]["after", channels] == (4, channels)


def test_wherever_memory_runs_out_all_raise_or_none_and_states_are_all_old_or_all_new(three):
    first, *others = [result["everywhere"] for result in three]
    assert others == [first, first]
    assert len(first) > 40
    told = "SyncBatchNorm, process 2 of 3: MemoryError: none left", [True] * 5
    moved = None, [True, True, False, False, False]  # the last call, and calls that can go on with less memory
    assert all(outcome in (told, moved) for outcome in first)
    assert first.count(told) > 30
    assert first[-1] == moved


def test_a_layer_left_out_of_its_first_call_raises_on_all(three):
    for result in three:
        (texts, counters), (more, _) = result["skipped_at_first"]
        assert texts[0] is None
        assert "made different calls: layer " in texts[1]
        assert counters == [1, 0, 0]
        assert more == [None, None]  # layers have no common number if one process has made more


def test_sums_are_the_same_bits_on_all(three):
    first, *others = [result["backwards"]["same bits"] for result in three]
    assert all(first.equal(other) for other in others)


def test_a_layer_whose_first_call_raised_is_the_same_layer_on_all_later(three):
    for result in three:
        text, shapes = result["first_calls"]
        assert text == "SyncBatchNorm, process 2 of 3: input should be a Tensor, got str"
        assert shapes == [(4, 3)] * 3


@pytest.mark.parametrize("name", ["running_var", "weight"])
def test_statistics_that_share_memory_on_one_process_raise_on_all(three, name):
    (text,) = {result["aliases"][name] for result in three}
    assert text == (
        f"SyncBatchNorm, process 2 of 3: ValueError: running_mean is written to, so it may not share memory with {name}"
    )
    assert all(result["aliases"][name + ", unchanged"] for result in three)


@pytest.mark.slow
def test_a_mistake_of_one_process_raises_on_all_in_compiled_code(tmp_path):
    reasons = {name: REASONS[name] for name in ("rank", "residual")}
    outcomes = launch(2, "support.sync_faults", ["compiled"], tmp_path)
    (waited, unchanged), lacking = [result["compiled"]["output"] for result in outcomes]
    assert waited.startswith("SyncBatchNorm: a process of the group has ended, or did not answer within its timeout")
    assert unchanged
    assert lacking == ("none left", True)
    for result in outcomes:
        found = result["compiled"]
        assert {name: found[name] for name in reasons} == {
            name: f"SyncBatchNorm, process 1 of 2: {reason}" for name, reason in reasons.items()
        }
        assert found["activation"].startswith("SyncBatchNorm, process 1 of 2: ValueError: unknown activation 'selu'")
        assert found["memory"] == found["memory, backward"] == "SyncBatchNorm, process 1 of 2: MemoryError: none left"
        assert found["counter"] == 2
        assert found["backward"] is None
        assert found["after"] == (4, 3, 5)


@pytest.mark.parametrize("what", ["silent", "killed"])
def test_a_process_that_is_gone_is_an_error_in_time(three, what):
    for result in three[:2]:
        text, seconds = result[what]
        assert text.startswith("SyncBatchNorm: a process of the group has ended, or did not answer within its timeout")
        assert seconds < 60
