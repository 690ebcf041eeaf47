"""Test what ``gpu-bn bench`` can time: networks, operations, cases and their data."""

import numpy as np
import pytest

from gpu_bn.bench import cases, measurement
from gpu_bn.cli import main
from gpu_bn.explanation import DTYPES


@pytest.mark.parametrize(
    ("network", "layers", "channels"),
    [("resnet50-32", 53, 26_560), ("resnet50-256", 53, 26_560), ("mobilenetv2", 52, 17_056)],
)
def test_a_network_has_all_its_layers(network, layers, channels):
    rows = cases.NETWORKS[network]
    assert sum(rows.values()) == layers
    assert sum(count * shape[1] for shape, count in rows.items()) == channels  # each channel has two parameters


def test_there_is_every_kind_of_shape():
    assert {"resnet50-32", "resnet50-256", "mobilenetv2", "unet2d", "unet3d", "mlp", "tiny", "few"} == set(
        cases.NETWORKS
    )
    assert {len(shape) for shape in cases.NETWORKS["unet3d"]} == {5}
    assert {len(shape) for shape in cases.NETWORKS["mlp"]} == {2}
    assert {shape[0] for shape in cases.NETWORKS["resnet50-256"]} == {256}


def test_the_help_names_networks_dtypes_and_operations(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = "".join(capsys.readouterr().out.split())
    assert ",".join(cases.NETWORKS) in text
    assert ",".join(DTYPES) in text
    assert {name.split("+")[0] for name in cases.OPERATIONS} == {"forward", "backward", "eval"}
    assert {"eval+relu", "eval+add+relu"} < set(cases.OPERATIONS)
    assert "forward,backward,eval,each" in text


def test_every_operation_names_its_outputs():
    assert len(cases.OPERATIONS) == 9
    assert cases.OPERATIONS["eval"].outputs == cases.OPERATIONS["forward+relu"].outputs == ("y",)
    assert cases.OPERATIONS["backward+add+relu"].outputs == ("dx", "dweight", "dbias", "dresidual")


def test_cases_are_all_combinations_those_of_a_tensor_together():
    found = cases.select(["few", "4x8"], ["f16", "f32"], ["nchw", "nhwc"], ["forward", "eval"])
    assert len(found) == (4 * 2 + 2) * 2 * 2  # tensors of two axes have one layout
    assert str(found[0]) == "32x64x56x56 f16 nchw forward"
    assert str(found[-1]) == "4x8 f32 eval"
    tensors = [case.tensor for case in found]
    assert [t for t, before in zip(tensors, ["", *tensors], strict=False) if t != before] == list(
        dict.fromkeys(tensors)
    )
    only = cases.select(["few"], ["f32"], ["nchw"], ["forward", "backward"], only="14 f32 nchw b")
    assert list(map(str, only)) == ["32x256x14x14 f32 nchw backward"]


def test_data_lie_in_memory_as_the_case_says():
    first, last = (measurement.make_problem(cases.Case((4, 6, 5, 7), layout=layout)).x for layout in ("nchw", "nhwc"))
    assert first.flags.c_contiguous
    assert last.transpose(0, 2, 3, 1).flags.c_contiguous
    assert len(np.unique(first)) == first.size
    assert first.ctypes.data % 64 == last.ctypes.data % 64 == 0
