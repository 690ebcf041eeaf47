"""The suite can fail: backends with one bug each, and the result in which the cases must notice it."""

from dataclasses import replace
from itertools import pairwise
from math import prod

import numpy as np
import pytest

from gpu_bn.backends.numpy import NumpyBackend
from gpu_bn.backends.protocol import Moments
from gpu_bn.testing import Case, cases, check


class BiasedRunningVariance(NumpyBackend):
    def update_running(self, moments, running_mean, running_var, momentum):
        super().update_running(moments, running_mean, running_var, momentum)
        running_var -= momentum * moments.var / max(moments.count - 1, 1)


class MomentumTheWrongWay(NumpyBackend):
    def update_running(self, moments, running_mean, running_var, momentum):
        super().update_running(moments, running_mean, running_var, 1 - momentum)


class RunningStatisticsNotUpdated(NumpyBackend):
    def update_running(self, moments, running_mean, running_var, momentum):
        pass


class DroppedTail(NumpyBackend):
    def stats(self, x, axis):
        inner = [a for a in range(x.ndim) if a != axis and x.shape[a] > 1][-1]
        index = [slice(None)] * x.ndim
        index[inner] = slice(0, -1)
        return replace(super().stats(x[tuple(index)], axis), count=super().stats(x, axis).count)


class WrongLaneCount(NumpyBackend):
    def stats(self, x, axis):
        moments = super().stats(x, axis)
        padded = -(-moments.count // 32) * 32
        return replace(moments, var=moments.var * moments.count / padded)


class SampleVarianceInForward(NumpyBackend):
    def stats(self, x, axis):
        moments = super().stats(x, axis)
        return replace(moments, var=moments.var * moments.count / max(moments.count - 1, 1))


class SumOfSquaresInFloat32(NumpyBackend):
    def stats(self, x, axis):
        rows = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1).astype(np.float32)
        mean = rows.mean(axis=1)
        var = (rows * rows).mean(axis=1) - mean * mean
        return Moments(rows.shape[1], mean.astype(float), np.maximum(var, 0).astype(float))


class MeanRoundedToFloat32(NumpyBackend):
    def stats(self, x, axis):
        moments = super().stats(x, axis)
        return replace(moments, mean=moments.mean.astype(np.float32).astype(float))


class EpsMissing(NumpyBackend):
    def normalize(self, saved, residual, out):
        super().normalize(replace(saved, spec=replace(saved.spec, eps=0.0)), residual, out)


class EpsOutsideTheRoot(NumpyBackend):
    def normalize(self, saved, residual, out):
        eps = saved.spec.eps
        var = (np.sqrt(saved.moments.var) + eps) ** 2 - eps
        super().normalize(replace(saved, moments=replace(saved.moments, var=var)), residual, out)


class RstdTakenForVariance(NumpyBackend):
    def normalize(self, saved, residual, out):
        super().normalize(replace(saved, moments=replace(saved.moments, var=saved.rstd)), residual, out)


class ResidualAfterActivation(NumpyBackend):
    def normalize(self, saved, residual, out):
        super().normalize(saved, None, out)
        if residual is not None:
            out += residual


class ActivationForgotten(NumpyBackend):
    def normalize(self, saved, residual, out):
        identity = replace(saved.spec.activation, name="identity")
        super().normalize(replace(saved, spec=replace(saved.spec, activation=identity)), residual, out)


class RecomputedSignOff(NumpyBackend):
    def backward_reduce(self, dy, saved, dz):
        return super().backward_reduce(dy, replace(saved, bias=None if saved.bias is None else -saved.bias), dz)


class ResidualMissingFromRecomputation(NumpyBackend):
    def backward_reduce(self, dy, saved, dz):
        return super().backward_reduce(dy, replace(saved, residual=None), dz)


class DxWithoutMeanTerm(NumpyBackend):
    def backward_input(self, dy, saved, sums, out):
        sums = sums and sums._replace(dz=0 * sums.dz)
        super().backward_input(dy, saved, sums, out)


class DxWithoutProjection(NumpyBackend):
    def backward_input(self, dy, saved, sums, out):
        sums = sums and sums._replace(dz_xhat=0 * sums.dz_xhat)
        super().backward_input(dy, saved, sums, out)


class FrozenTakenForTraining(NumpyBackend):
    def backward_input(self, dy, saved, sums, out):
        super().backward_input(dy, saved, sums or self.backward_reduce(dy, saved, None), out)


class DweightWithoutRstd(NumpyBackend):
    def backward_reduce(self, dy, saved, dz):
        sums = super().backward_reduce(dy, saved, dz)
        return sums._replace(dz_xhat=sums.dz_xhat / saved.rstd)


class MemoryFormatLost(NumpyBackend):
    def empty_like(self, x):
        return np.empty(x.shape, x.dtype)


class GradientInAnotherDtype(NumpyBackend):
    def cast(self, vector, dtype):
        return super().cast(vector, "float64" if dtype == "float32" else "float32")


class InputOverwritten(NumpyBackend):
    def normalize(self, saved, residual, out):
        super().normalize(saved, residual, out)
        if saved.x.flags.writeable:
            saved.x.flat[0] += 1


class StridesOfDyTakenForThoseOfX(NumpyBackend):
    def backward_input(self, dy, saved, sums, out):
        if dy.flags.c_contiguous and not saved.x.flags.c_contiguous:
            order = sorted(range(dy.ndim), key=lambda axis: -abs(saved.x.strides[axis]))
            dy = dy.reshape([dy.shape[axis] for axis in order]).transpose(np.argsort(order))
        super().backward_input(dy, saved, sums, out)


PLANTED = {
    BiasedRunningVariance: "running_var",
    MomentumTheWrongWay: "running_mean",
    RunningStatisticsNotUpdated: "running_mean",
    DroppedTail: "y",
    WrongLaneCount: "y",
    SampleVarianceInForward: "y",
    SumOfSquaresInFloat32: "y",
    MeanRoundedToFloat32: "y",
    EpsMissing: "y",
    EpsOutsideTheRoot: "y",
    RstdTakenForVariance: "y",
    ResidualAfterActivation: "y",
    ActivationForgotten: "y",
    RecomputedSignOff: "dx",
    ResidualMissingFromRecomputation: "dx",
    DxWithoutMeanTerm: "dx",
    DxWithoutProjection: "dx",
    FrozenTakenForTraining: "dx",
    DweightWithoutRstd: "dx",
    MemoryFormatLost: "axes lie in memory",
    GradientInAnotherDtype: "dweight has dtype",
    InputOverwritten: "was written to",
    StridesOfDyTakenForThoseOfX: "dx",
}


@pytest.mark.parametrize(("mutant", "noticed"), PLANTED.items(), ids=lambda value: getattr(value, "__name__", None))
def test_the_cases_notice(mutant, noticed):
    messages = []
    for case in sorted(cases(), key=lambda case: prod(case.shape)):
        try:
            check(case, mutant())
        except AssertionError as error:
            messages.append(str(error))
            if noticed in messages[-1]:
                break
    else:
        pytest.fail(f"no case notices {mutant.__name__} in {noticed}; what they say: {messages[:3]}")
    assert str(case) in messages[-1], "the message names the case"


def test_without_a_bug_the_same_backend_class_passes():
    assert all(share <= 1 for share in check(Case((4, 6, 5, 7)), NumpyBackend()).values())


def test_each_bug_is_planted_once():
    assert all(a is not b for a, b in pairwise(PLANTED))
    assert all(mutant in PLANTED for mutant in NumpyBackend.__subclasses__() if mutant.__module__ == __name__)
