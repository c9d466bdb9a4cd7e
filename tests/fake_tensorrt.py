"""TensorRT's Python module, played by `simulated_engine.Engine` over the memory of a `FakeCuda`.

A context reads host inputs when it is enqueued, GPU inputs when the stream runs, as the plugin does; thus a graph
replays with the host inputs of its capture. Contexts that a graph came from must not be changed any more.
"""

from __future__ import annotations

import ctypes
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasa_trt.core.contract import FASA_INPUTS, INPUTS, LOGITS
from fasa_trt.core.spec import SparseSpec
from fasa_trt.plugins.plugin_library import CREATOR
from fasa_trt.runtime.scheduler import Limits
from fasa_trt.runtime.step import Step
from tests.fake_cuda import STREAM, FakeCuda
from tests.simulated_engine import LAYERS, VOCAB, Engine

PLAN = b"a plan"
WORKSPACE = 4096
HEADS, HEAD_DIM = (2, 3), 64  # of the two pools' layers
TYPES = {"int32": "INT32", "int64": "INT64", "float32": "FLOAT"}


BLOCK, BATCH, TOKENS, LENGTH = 8, 6, 24, 60
LIMITS = Limits(BATCH, TOKENS, LENGTH, VOCAB)


def config(target: str = "tensorrt") -> dict[str, Any]:
    """The config.json of an engine for the simulated one."""
    heads = [count for count, layers in zip(HEADS, LAYERS, strict=True) for _ in range(layers)]
    return {
        "pretrained_config": {
            "dtype": "float16",
            "vocab_size": VOCAB,
            "num_hidden_layers": len(heads),
            "num_key_value_heads": HEADS[0],
            "num_kv_heads_per_layer": heads,
            "head_size": HEAD_DIM,
        },
        "build_config": {
            "max_batch_size": BATCH,
            "max_num_tokens": TOKENS,
            "max_seq_len": LENGTH,
            "plugin_config": {"tokens_per_block": BLOCK},
        },
        "fasa": {
            "target": target,
            "model_file": "rank0.engine",
            "lowering": "plugin",
            "sparse": SparseSpec(budget=16, n_tip=8, sink=2, recent=4).to_json(),
            "layers": [{"n_tip": 8, "window": None}] * len(heads),
            "eos_token_ids": [3],
        },
    }


class FakeTensorRT(ModuleType):
    """fail: names of calls that go wrong. dtypes, names: of the engine's tensors, to be changed by tests."""

    def __init__(self, cuda: FakeCuda, *, name: str = "tensorrt") -> None:
        super().__init__(name)
        self.__version__ = "10.14.1.48"
        self.cuda = cuda
        self.fail: set[str] = set()
        self.tensors = {**{b.name: TYPES[b.dtype] for b in FASA_INPUTS}, LOGITS.name: "FLOAT"}
        self.creators: set[tuple[str, ...]] = set()
        self.contexts: list[Context] = []
        self.not_finite: set[int] = set()  # tokens whose rows overflow
        self.ILogger = Logger
        self.Runtime = lambda log: SimpleNamespace(deserialize_cuda_engine=lambda plan: self.engine(log, bytes(plan)))
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")

    def get_plugin_registry(self) -> Any:
        return SimpleNamespace(
            get_creator=lambda *names: names if names in self.creators else None,
            load_library=lambda path: None if "load_library" in self.fail else self.creators.add(CREATOR),
            deregister_library=lambda handle: self.creators.clear(),
        )

    def engine(self, log: Logger, plan: bytes) -> Any:
        if plan != PLAN or CREATOR not in self.creators or "deserialize" in self.fail:
            log.log(Logger.Severity.WARNING, "a warning")
            log.log(Logger.Severity.ERROR, "Error Code 1: Serialization\nmore")
            return None
        names = list(self.tensors)
        return SimpleNamespace(
            num_io_tensors=len(names),
            get_tensor_name=lambda index: names[index],
            get_tensor_dtype=lambda name: SimpleNamespace(name=self.tensors[name]),
            device_memory_size_v2=WORKSPACE,
            create_execution_context=lambda strategy: self.context(strategy, log),
        )

    def context(self, strategy: str, log: Logger) -> Context | None:
        assert strategy == "user managed"
        if "create_execution_context" in self.fail:
            return None
        self.contexts.append(Context(self, log))
        return self.contexts[-1]


class Logger:
    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


class Context:
    def __init__(self, trt: FakeTensorRT, log: Logger) -> None:
        self.trt, self.log, self.cuda = trt, log, trt.cuda
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.memory: tuple[int, int] | None = None
        self.fresh = self.captured = False  # fresh: shapes have changed since the last enqueue

    def set_device_memory(self, pointer: int, size: int) -> None:
        assert size >= WORKSPACE and self.cuda.holds(pointer, size, self.cuda.device_memory)
        self.memory = pointer, size

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        assert not self.captured, "a graph was captured from this context"
        gpu = name == LOGITS.name or INPUTS[name].memory == "gpu"
        assert self.cuda.holds(pointer, 1, self.cuda.device_memory if gpu else self.cuda.host_memory), name
        self.addresses[name] = pointer
        return "set_tensor_address" not in self.trt.fail

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes.get(name, (-1,))

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self.captured, "a graph was captured from this context"
        self.shapes[name], self.fresh = shape, True
        return "set_input_shape" not in self.trt.fail

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM and self.memory is not None and len(self.addresses) == len(self.trt.tensors)
        capturing = self.cuda.capturing
        if "execute_async_v3" in self.trt.fail or ("capture" in self.trt.fail and capturing):
            self.log.log(Logger.Severity.ERROR, "Error Code 1: Cuda Runtime (out of memory)")
            return False
        assert not (capturing and self.fresh), "TensorRT has work to do after a change of shapes that no graph holds"
        self.fresh, self.captured = False, self.captured or capturing
        host = {b.name: self.read(b.name).copy() for b in FASA_INPUTS if b.memory != "gpu"}
        shapes = dict(self.shapes)
        self.cuda.put(lambda: self.compute(host, shapes, frozen=capturing))
        return True

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        shape = self.shapes[name] if shape is None else shape
        dtype = np.dtype(LOGITS.dtype if name == LOGITS.name else INPUTS[name].dtype)
        memory = (ctypes.c_uint8 * (int(np.prod(shape)) * dtype.itemsize)).from_address(self.addresses[name])
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def compute(self, host: dict[str, NDArray[Any]], shapes: dict[str, tuple[int, ...]], *, frozen: bool) -> None:
        gpu = {b.name: self.read(b.name, shapes[b.name]) for b in FASA_INPUTS if b.memory == "gpu"}
        lengths, kinds = gpu["sequence_length"], host["host_request_types"]
        counts = np.diff(gpu["last_token_ids"], prepend=0)
        past = lengths - kinds
        if not frozen:
            assert (host["host_context_lengths"] == gpu["context_lengths"]).all()
            past = host["host_past_key_value_lengths"]
        positions = [np.arange(end - n, end) for n, end in zip(counts, lengths, strict=True)]
        rows = np.arange(len(lengths), dtype=np.int32)
        step = Step(
            requests=tuple(rows.tolist()),
            position_ids=np.concatenate(positions).astype(np.int32),
            host_past_key_value_lengths=past,
            host_request_types=kinds,
            logit_rows=rows,
            **gpu,
        )
        tokens = self.simulated(host)(step)
        logits = self.read(LOGITS.name, (len(rows), VOCAB))
        logits[:] = np.arange(VOCAB) % 3  # something to draw from
        logits[rows, tokens] = 5
        logits[[token in self.trt.not_finite for token in tokens]] = np.nan

    def simulated(self, host: dict[str, NDArray[Any]]) -> Engine:
        """The simulated engine over the first layer's keys in the first pool: a number in each slot's place."""
        size = BLOCK
        assert host["host_kv_cache_pool_mapping"].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]
        counts = []
        for pool, layers in enumerate(LAYERS):
            pointer = int(host["host_kv_cache_pool_pointers"][pool, 0])
            block = 2 * layers * HEADS[pool] * size * HEAD_DIM * 2  # 16-bit
            counts.append(ctypes.sizeof(self.cuda.device_memory[pointer]) // block)
            if pool == 0:
                memory, stride = self.cuda.device_memory[pointer], block
        assert counts[0] == counts[1]
        allocator = SimpleNamespace(tokens_per_block=size, num_blocks=counts[0])
        engine = Engine(SimpleNamespace(limits=LIMITS, allocator=allocator))  # type: ignore[arg-type]
        engine.pool = np.ndarray((counts[0], size), np.int64, buffer=memory, strides=(stride, 8))
        return engine
