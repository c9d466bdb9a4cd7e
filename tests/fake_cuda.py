"""The CUDA runtime in host memory: the part of `cuda.bindings.runtime` that `device_memory.py` calls.

What is put on a stream waits until somebody synchronises, so reading too early, or overwriting too early what a copy
has yet to read, shows. A captured graph keeps its operations and runs them at each launch.
"""

from __future__ import annotations

import ctypes
import enum
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

OK, OUT_OF_MEMORY, FAILED = 0, 2, 700
STREAM = 77
Operation = Callable[[], object]


class Graph(list[Operation]):
    """What was captured."""


class FakeCuda:
    """fail: calls that fail, by name, with how many go well before. total: bytes of the GPU."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = enum.IntEnum("cudaDeviceAttr", {"major": 75, "minor": 76})

    def __init__(self, *, total: int = 1 << 24, gpus: int = 1, compute_capability: tuple[int, int] = (9, 0)) -> None:
        self.total, self.gpus, self.compute_capability = total, gpus, compute_capability
        self.device_memory: dict[int, Any] = {}
        self.host_memory: dict[int, Any] = {}
        self.calls: Counter[str] = Counter()
        self.fail: dict[str, int] = {}
        self.pending: list[Operation] = []
        self.recording: Graph | None = None

    @property
    def used(self) -> int:
        return sum(map(ctypes.sizeof, self.device_memory.values()))

    @property
    def capturing(self) -> bool:
        return self.recording is not None

    def put(self, operation: Operation) -> None:
        (self.pending if self.recording is None else self.recording).append(operation)

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cuda") or not callable(found) or isinstance(found, type):
            return found

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls[name] += 1
            if name in self.fail and self.calls[name] > self.fail[name]:
                return (OUT_OF_MEMORY if name == "cudaMalloc" else FAILED, None)
            result = found(*arguments)
            return (OK, *result) if isinstance(result, tuple) else (OK,) if result is None else (OK, result)

        return call

    # --- what the module has ---

    def cudaGetDeviceCount(self) -> int:
        return self.gpus

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> int:
        return self.compute_capability[attribute - 75]

    def cudaMemGetInfo(self) -> tuple[int, int]:
        return [self.total - self.used, self.total]  # type: ignore[return-value]

    def cudaMalloc(self, size: int) -> int:
        memory = (ctypes.c_uint8 * size).from_buffer(bytearray(b"\xff" * size))
        self.device_memory[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def cudaFree(self, pointer: int) -> None:
        del self.device_memory[pointer]

    def cudaHostAlloc(self, size: int, flags: int) -> int:
        memory = (ctypes.c_uint8 * size)()
        self.host_memory[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def cudaFreeHost(self, pointer: int) -> None:
        del self.host_memory[pointer]

    def cudaMemsetAsync(self, pointer: int, value: int, size: int, stream: int) -> None:
        assert stream == STREAM and self.holds(pointer, size, self.device_memory)
        self.put(lambda: ctypes.memset(pointer, value, size))

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        device, host = (target, source) if kind == 1 else (source, target)
        assert stream == STREAM and self.holds(device, size, self.device_memory)
        assert self.holds(host, size, self.host_memory), "not pinned: the copy would block"
        self.put(lambda: ctypes.memmove(target, source, size))

    def cudaStreamCreateWithFlags(self, flags: int) -> int:
        return STREAM

    def cudaStreamDestroy(self, stream: int) -> None: ...

    def cudaStreamSynchronize(self, stream: int) -> None:
        assert not self.capturing
        while self.pending:
            self.pending.pop(0)()

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> None:
        self.recording = Graph()

    def cudaStreamEndCapture(self, stream: int) -> Graph:
        graph, self.recording = self.recording, None
        assert graph is not None
        return graph

    def cudaGraphInstantiate(self, graph: Graph, flags: int) -> Graph:
        return graph

    def cudaGraphDestroy(self, graph: Graph) -> None: ...

    def cudaGraphExecDestroy(self, graph: Graph) -> None: ...

    def cudaGraphLaunch(self, graph: Graph, stream: int) -> None:
        self.pending += graph

    def cudaGetLastError(self) -> None: ...

    def cudaGetErrorString(self, status: int) -> bytes:
        return {OUT_OF_MEMORY: b"out of memory", FAILED: b"an illegal memory access was encountered"}[status]

    @staticmethod
    def holds(pointer: int, size: int, memory: dict[int, Any]) -> bool:
        return any(start <= pointer and pointer + size <= start + ctypes.sizeof(m) for start, m in memory.items())
