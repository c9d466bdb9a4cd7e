"""The CUDA runtime as a backend uses it: memory, one stream, graphs. Every call that fails raises FasaError."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fasa_trt.core.errors import FasaError

SUCCESS, OUT_OF_MEMORY = 0, 2  # cudaError_t
NON_BLOCKING = 1  # cudaStreamNonBlocking
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76  # cudaDeviceAttr


class Device:
    """The current GPU and a stream on it. What it allocates lives until `close`.

    cudart: the module `cuda.bindings.runtime`, imported when not given.
    """

    def __init__(self, cudart: Any = None) -> None:
        self._cudart = _bindings() if cudart is None else cudart
        self._release: list[Callable[[], Any]] = []
        if self._call("cudaGetDeviceCount") == 0:
            raise FasaError("there is no NVIDIA GPU here", hint="build with --target onnxruntime")
        self.stream = int(self._call("cudaStreamCreateWithFlags", NON_BLOCKING))
        self._release.append(lambda: self._cudart.cudaStreamDestroy(self.stream))

    @property
    def compute_capability(self) -> tuple[int, int]:
        attributes = self._cudart.cudaDeviceAttr
        major, minor = (
            int(self._call("cudaDeviceGetAttribute", attributes(number), 0))
            for number in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR)
        )
        return major, minor

    @property
    def free_bytes(self) -> int:
        return int(self._call("cudaMemGetInfo")[0])

    def allocate(self, size: int, purpose: str) -> int:
        """The address of `size` bytes of GPU memory, all zero. purpose: for the error."""
        status, pointer = self._cudart.cudaMalloc(size)
        if int(status) == OUT_OF_MEMORY:
            raise FasaError(
                f"the GPU has no {size / 2**20:.0f} MiB for {purpose}: {self.free_bytes / 2**20:.0f} MiB are free",
                hint="end other programs on this GPU, or build with smaller --max-batch-size, --max-num-tokens",
            )
        self._check("cudaMalloc", status)
        self._release.append(lambda: self._cudart.cudaFree(pointer))
        self._call("cudaMemsetAsync", pointer, 0, size, self.stream)
        return int(pointer)

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A zeroed array in pinned host memory, from which copies do not block."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pointer = int(self._call("cudaHostAlloc", size, 0))
        self._release.append(lambda: self._cudart.cudaFreeHost(pointer))
        memory = (ctypes.c_uint8 * size).from_address(pointer)
        array: NDArray[Any] = np.ctypeslib.as_array(memory).view(dtype).reshape(shape)
        array[...] = 0
        return array

    def upload(self, target: int, source: NDArray[Any]) -> None:
        """Enqueues a copy from pinned memory."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, kind, self.stream)

    def download(self, target: NDArray[Any], source: int) -> None:
        """Enqueues a copy into pinned memory."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, kind, self.stream)

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self.stream)

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """A graph of what `enqueue` puts on the stream, which is not executed."""
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            enqueue()
        except FasaError:
            self._cudart.cudaStreamEndCapture(self.stream)  # the stream is of no use before
            self._cudart.cudaGetLastError()
            raise
        graph = self._call("cudaStreamEndCapture", self.stream)
        executable = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        self._release.append(lambda: self._cudart.cudaGraphExecDestroy(executable))
        return executable

    def launch(self, graph: Any) -> None:
        self._call("cudaGraphLaunch", graph, self.stream)

    def close(self) -> None:
        """Gives everything back, the youngest first. Nothing may use it any more."""
        self._cudart.cudaStreamSynchronize(self.stream)
        while self._release:
            self._release.pop()()

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._cudart, name)(*arguments)
        self._check(name, status)
        return results[0] if len(results) == 1 else results

    def _check(self, name: str, status: Any) -> None:
        if int(status) != SUCCESS:
            _, text = self._cudart.cudaGetErrorString(status)
            reason = text.decode() if isinstance(text, bytes) else text
            raise FasaError(f"CUDA's {name} failed: {reason}", hint="run fasa-trt doctor")


def _bindings() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise FasaError(
            "CUDA's Python bindings are not installed", hint="pip install cuda-bindings, for your driver's CUDA version"
        ) from None
    return runtime
