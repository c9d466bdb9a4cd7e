"""The embedded backend: onnxruntime on the CPU, or on a GPU where its CUDA provider is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from fasa_trt.core.engine_dir import EngineDirectory
from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.backend import Tokens
from fasa_trt.runtime.rows import RowBatcher

CAPACITY_STEP = 512  # slots; a decode step reads the cache to its capacity, so spare slots cost time
CACHE_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bfloat16)": np.uint16}
BFLOAT16 = 16  # onnx.TensorProtocol.BFLOAT16


class OnnxRuntimeBackend:
    """Holds a session and the cache, which the model updates in place: each cache tensor is bound as input and as
    output. Its capacity grows in steps, so that a short conversation does not pay for the longest one."""

    def __init__(self, engine: EngineDirectory, *, threads: int | None = None, provider: str | None = None) -> None:
        """provider: "cpu" or "cuda"; None takes CUDA where it is installed. Raises FasaError when it cannot run."""
        self.max_seq_len, self.max_batch_size = engine.max_seq_len, engine.max_batch_size
        self.vocab_size = int(engine.config["pretrained_config"].get("vocab_size", 2**31))
        self._device, providers = _providers(provider)
        dtype = str(engine.config["pretrained_config"]["dtype"])
        if self._device == "cpu" and dtype == "bfloat16":
            raise FasaError(
                "onnxruntime has no bfloat16 kernels for the CPU", hint="build with --dtype float32, or use a GPU"
            )
        self._session = _session(engine.model_file, providers, threads)
        inputs = {value.name: value for value in self._session.get_inputs()}
        self._caches = {name: value for name, value in inputs.items() if f"present.{name}" in self._output_names}
        self._binding = self._session.io_binding()
        self._values: dict[str, ort.OrtValue] = {}
        self._batch = self._capacity = 0
        self._bound: tuple[int, int] | None = None  # rows of the cache: the first, and how many

    @property
    def _output_names(self) -> set[str]:
        return {value.name for value in self._session.get_outputs()}

    @property
    def capacity(self) -> int:
        """Slots that each row's cache has at present."""
        return self._capacity

    def batcher(self, rows: int | None = None) -> RowBatcher:
        return RowBatcher(self, rows)

    def allocate(self, batch: int) -> None:
        if not 1 <= batch <= self.max_batch_size:
            raise FasaError(
                f"{batch} sequences at once: this engine was built for 1 to {self.max_batch_size}",
                hint="build with a larger --max-batch-size",
            )
        self._values, self._batch, self._capacity, self._bound = {}, batch, 0, None

    def step(
        self,
        tokens: Tokens,
        cache_position: Tokens,
        left_padding: Tokens,
        logit_index: Tokens,
        *,
        sparse: bool = True,
        first_row: int = 0,
    ) -> NDArray[np.float32]:
        needed = int(cache_position.max()) + tokens.shape[1]
        if needed > self.max_seq_len:
            raise FasaError(
                f"{needed} tokens do not fit: this engine holds {self.max_seq_len}",
                hint="shorten the prompt, lower --max-new-tokens or build with a larger --max-seq-len",
            )
        if needed > self._capacity:
            self._grow(needed)
        self._bind(first_row, len(tokens))
        feed: dict[str, NDArray[Any]] = {
            "input_ids": tokens,
            "cache_position": cache_position,
            "left_padding": left_padding,
            "logit_index": logit_index,
            "sparse": np.asarray(sparse),
        }
        for name, array in feed.items():
            self._binding.bind_cpu_input(name, np.ascontiguousarray(array))
        self._binding.bind_output("logits")
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise FasaError(f"onnxruntime cannot compute this step: {_first_line(error)}") from None
        logits: NDArray[np.float32] = self._binding.get_outputs()[-1].numpy()
        return logits

    def describe(self) -> dict[str, Any]:
        return {
            "backend": "onnxruntime",
            "version": ort.__version__,
            "provider": self._session.get_providers()[0],
            "cache_bytes": sum(int(np.prod(value.shape())) * self._width(name) for name, value in self._values.items()),
        }

    def _width(self, name: str) -> int:
        return int(np.dtype(CACHE_DTYPES[self._caches[name].type]).itemsize)

    def _grow(self, needed: int) -> None:
        """Makes room for `needed` slots, keeping what is cached. Unused slots are zero: they must not hold NaN."""
        capacity = min(self.max_seq_len, -(-needed // CAPACITY_STEP) * CAPACITY_STEP)
        self._binding.clear_binding_outputs()
        self._bound, grown = None, {}
        try:
            for name, value in self._caches.items():
                _, heads, _, width = value.shape
                array = np.zeros((self._batch, heads, capacity, width), CACHE_DTYPES[value.type])
                if name in self._values:
                    array[:, :, : self._capacity] = self._to_numpy(name)
                grown[name] = self._to_ort(array, value.type)
        except Exception as error:  # MemoryError, or the CUDA provider's own
            raise FasaError(
                f"no memory for a cache of {self._batch} rows of {capacity} tokens: {_first_line(error)}",
                hint="fewer prompts at a time, or shorter ones",
            ) from None
        self._values, self._capacity = grown, capacity

    def _bind(self, first: int, count: int) -> None:
        """Binds rows of the cache, which is [rows, heads, capacity, width], as both input and output."""
        if (first, count) == self._bound:
            return
        for name, value in self._values.items():
            kind, (rows, *row) = self._caches[name].type, value.shape()
            assert first >= 0 and first + count <= rows
            element = BFLOAT16 if kind == "tensor(bfloat16)" else CACHE_DTYPES[kind]
            pointer = value.data_ptr() + first * int(np.prod(row)) * self._width(name)
            self._binding.bind_input(name, self._device, 0, element, (count, *row), pointer)
            self._binding.bind_output(f"present.{name}", self._device, 0, element, (count, *row), pointer)
        self._bound = first, count

    def _to_numpy(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = self._values[name].numpy()
        return array.view(CACHE_DTYPES[self._caches[name].type])

    def _to_ort(self, array: NDArray[Any], kind: str) -> ort.OrtValue:
        if kind == "tensor(bfloat16)":
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
        return ort.OrtValue.ortvalue_from_numpy(array, self._device)


def _providers(wanted: str | None) -> tuple[str, list[str]]:
    if wanted not in (None, "cpu", "cuda"):
        raise FasaError(f"unknown provider {wanted!r}", hint="cpu or cuda")
    cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    if wanted == "cuda" and not cuda:
        raise FasaError("onnxruntime has no CUDA provider here", hint="pip install fasa-trt[gpu]")
    if wanted == "cpu" or not cuda:
        return "cpu", ["CPUExecutionProvider"]
    return "cuda", ["CUDAExecutionProvider", "CPUExecutionProvider"]


def _session(file: Path, providers: list[str], threads: int | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 2
    if threads is not None:
        if threads < 1:
            raise FasaError(f"threads must be at least 1, not {threads}", hint="leave it out to use all cores")
        options.intra_op_num_threads = threads
    # Between steps the threads sleep: spinning, they slow down whatever else runs, another engine's step by half.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return ort.InferenceSession(file, options, providers=providers)
    except Exception as error:
        raise FasaError(f"onnxruntime cannot load {file}: {_first_line(error)}", hint="run fasa-trt doctor") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
