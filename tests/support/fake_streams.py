"""Provide a replacement of CuPy's streams without a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from support.fake_cupy import EmulatedGpu


class Stream:
    """A stream that runs launches at once, even while it is captured. Each thread has a current stream per device."""

    def __init__(self, gpu: EmulatedGpu, ptr: int | None = None) -> None:
        self.gpu, self.ptr = gpu, id(self) if ptr is None else ptr
        self.capturing = False
        self.before: list[Stream] = []

    def __enter__(self) -> Stream:
        self.before.append(self.gpu.stream)
        self.gpu.stream = self
        return self

    def __exit__(self, *_: object) -> None:
        self.gpu.stream = self.before.pop()

    def is_capturing(self) -> bool:
        return self.capturing

    def begin_capture(self) -> None:
        self.capturing = True

    def end_capture(self) -> None:
        self.capturing = False


class MadeStreams:
    """The replacement of the class ``cupy.cuda.Stream``."""

    def __init__(self, gpu: EmulatedGpu) -> None:
        self.gpu = gpu

    def __call__(self, non_blocking: bool = False) -> Stream:
        del non_blocking
        return Stream(self.gpu)

    def from_external(self, stream: Any) -> Stream:
        """Return the stream of another library by the CUDA stream protocol."""
        version, ptr = stream.__cuda_stream__()
        assert version == 0
        return Stream(self.gpu, ptr)
