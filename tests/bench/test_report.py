"""Test the tables of ``gpu-bn bench`` and its warnings about unreliable times. No time is asserted."""

import pytest
from support.bench_stand_ins import timed

from gpu_bn.bench import cases, measurement, report, timing


def refused(by, shape, why, ours=False, **options):
    return measurement.Result(cases.Case(shape), by, ours, refused=why, **options)


def test_what_a_peer_refuses_for_one_reason_is_one_line():
    from gpu_bn.bench.report import refusals

    results = [refused("peer", (size, 8), "out of luck") for size in (2, 3, 4)]
    results += [refused("ours", (size, 8), "wrong: y", ours=True) for size in (2, 3)]
    results += [measurement.Result(cases.Case((size, 8)), "ours", True, not_served="too odd") for size in (5, 6)]
    results += [measurement.Result(cases.Case((8, 8)), "peer", False, not_served="by design")]
    assert refusals(results).splitlines() == [
        "NOT TIMED 2x8 f32 nchw forward by ours: wrong: y",
        "NOT TIMED 3x8 f32 nchw forward by ours: wrong: y",
        "NOT TIMED 2x8 f32 nchw forward and 2 more by peer: out of luck",
        "NOT TIMED 5x8 f32 nchw forward and 1 more by ours: too odd",
    ]


def test_layers_are_summed_as_often_as_the_network_has_them():
    results = [
        measurement.Result(cases.Case(shape), "x", True, timings={"wall": timing.Timing(1e-3, 0, 0, 1)})
        for shape in cases.shapes_of(["resnet50-32", "tiny"])
    ]
    lines = str(report.layers_table(results)[0]).splitlines()
    assert lines[1].endswith("all layers (ms)")
    assert [line.split() for line in lines[3:-1]] == [["resnet50-32", "53", "f32", "nchw", "forward", "x", "53.0"]]
    assert report.layers_table(results[1:]) == []  # one layer has no time


def test_json_has_no_numbers_that_are_none(tmp_path):
    found = report.Report("gpu-bn bench", {}, [timed("x", 1.0)])
    found.results[0].error = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        found.write(tmp_path / "report.json")


def result_of(by, seconds, threads, ours=False):
    case = cases.Case((4, 8), layout="nc")
    found = {"wall": timing.Timing(seconds, seconds, seconds, 5)}
    ratios = {"wall": {"peer": 0.001}} if ours else {}
    return measurement.Result(case, by, ours, 0.1, timings=found, ratios=ratios, threads=threads, floor_bytes=64)


BUSY = [
    result_of("gpu_bn numpy", 12e-6, 1, True),
    result_of("peer", 20e-6, 1),
    result_of("gpu_bn numpy", 12e-6, 2, True),
    result_of("peer", 21e-3, 2),
]


def test_a_peer_that_threads_slow_down_is_flagged():
    (warning,) = report.thread_warnings(BUSY)
    assert warning.startswith("UNSTEADY: peer takes up to 1050 times as long with more threads as with one (4x8 f32")
    assert report.thread_warnings([*BUSY[:3], result_of("peer", 25e-6, 2)]) == []
    (table,) = report.measured_table(BUSY, 1e9)
    alone, together = (line.split() for line in str(table).splitlines() if " forward " in line)
    assert alone[1:4] == ["gpu_bn", "numpy", "1"]
    assert alone[-2:] == ["0.0200", "<0.01"]
    assert together[-2:] == ["21.0!", "<0.01"]
    assert "peer (ms)" in str(table)


def test_pictures_and_sums_are_of_threads_that_do_not_wait():
    assert [(r.by, r.threads) for r in report.Report("", {}, BUSY).drawn] == [("gpu_bn numpy", 1), ("peer", 1)]
    steady = report.Report("", {}, [*BUSY[:3], result_of("peer", 25e-6, 2)])
    assert [(r.by, r.threads) for r in steady.drawn] == [("gpu_bn numpy", 2), ("peer", 2)]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0123456, "0.0123"), (1, "1.00"), (12.34, "12.3"), (999.7, "1000"), (21000.4, "21000"), (0, "0")],
)
def test_three_digits(number, text):
    assert report.three_digits(number) == text
