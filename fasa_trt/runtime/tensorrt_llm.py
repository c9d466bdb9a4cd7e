"""Plugin engines in TensorRT-LLM 1.2.x: its own runtime batches, keeps the KV cache and samples.

`ModelRunnerCpp` loads the engine; requests go straight to the executor inside it, since the runner's own `generate`
takes one batch with one set of sampling parameters and lets nobody join.
`tensorrt_llm/runtime/model_runner_cpp.py` and `cpp/tensorrt_llm/nanobind/executor/` of TensorRT-LLM 1.2.
"""

from __future__ import annotations

import importlib
import re
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np

from fasa_trt.core.contract import TRTLLM_VERSION
from fasa_trt.core.engine_dir import EngineDirectory
from fasa_trt.core.errors import FasaError
from fasa_trt.plugins import plugin_library
from fasa_trt.runtime import machine
from fasa_trt.runtime.batcher import Event, Failed, Request, Turn
from fasa_trt.runtime.sampling import Sampling
from fasa_trt.runtime.sequence import FinishReason, Token, check_prompt

PATIENCE = timedelta(milliseconds=100)  # how long a step waits for responses; cancellations wait as long
WANTED = ".".join(map(str, TRTLLM_VERSION))


@dataclass
class Running:
    """A request that the executor has. length: tokens of prompt and answer so far; limit: at most."""

    request: Request
    length: int
    limit: int

    @property
    def started(self) -> bool:
        return self.length > len(self.request.prompt)


class TensorRTLLMBackend:
    """A `Backend` that is its own batcher. The numbers of requests are the executor's.

    Draws are TensorRT-LLM's own: a seed gives the same answer every time, but not that of the other backends.
    """

    def __init__(self, directory: EngineDirectory, trtllm: Any, runner: Any, plugin: str) -> None:
        """trtllm: the module `tensorrt_llm`. runner: its ModelRunnerCpp of this engine."""
        self.max_seq_len, self.max_batch_size = directory.max_seq_len, directory.max_batch_size
        self._vocab_size = int(directory.config["pretrained_config"]["vocab_size"])
        self._version, self._plugin = str(trtllm.__version__), plugin
        self._bindings, self._executor = trtllm.bindings.executor, runner.executor
        self._running: dict[int, Running] = {}

    def batcher(self, rows: int | None = None) -> TensorRTLLMBackend:
        return self

    def describe(self) -> dict[str, Any]:
        return {
            "backend": "tensorrt-llm",
            "version": self._version,
            "plugin": self._plugin,
            "sampling": "gpu (TensorRT-LLM)",
        }

    def check(self, request: Request) -> None:
        if request.dense:
            raise FasaError(
                "an engine of the plugin lowering cannot attend densely on request",
                hint="build a second engine whose --dense-layers are all layers",
            )
        check_prompt(request.prompt, request.max_new_tokens, max_seq_len=self.max_seq_len, vocab_size=self._vocab_size)

    def submit(self, request: Request) -> int:
        self.check(request)
        assert request.generator is not None
        prompt = [int(token) for token in request.prompt]
        limit = min(len(prompt) + request.max_new_tokens, self.max_seq_len)
        seed = int(request.generator.integers(2**63)) if request.sampling.temperature else None
        try:
            made = self._bindings.Request(
                input_token_ids=prompt,
                max_tokens=limit - len(prompt),
                streaming=True,
                sampling_config=self._bindings.SamplingConfig(**sampling_arguments(request.sampling, seed)),
                output_config=self._bindings.OutputConfig(exclude_input_from_output=True),
                # Stop words and not end_id, of which there is only one.
                stop_words=[[token] for token in sorted(request.stop_ids)] or None,
            )
            number = int(self._executor.enqueue_request(made))
        except Exception as error:
            raise FasaError(f"TensorRT-LLM refuses the request: {_first_line(error)}") from None
        self._running[number] = Running(request, len(prompt), limit)
        return number

    def cancel(self, request: int) -> bool:
        if self._running.pop(request, None) is None:
            return False
        self._executor.cancel_request(request)
        return True

    def step(self) -> Turn | None:
        """Waits for tokens, a tenth of a second at most."""
        if not self._running:
            return None
        decoding = any(running.started for running in self._running.values())
        started = time.perf_counter()
        try:
            responses = self._executor.await_responses(timeout=PATIENCE)
        except Exception as error:
            failure = FasaError(f"TensorRT-LLM has stopped: {_first_line(error)}")
            failed: list[Event] = [Failed(number, failure) for number in self._running]
            self._running.clear()
            return Turn(failed)
        seconds = time.perf_counter() - started
        events: list[Event] = []
        lengths: list[int] = []
        for response in responses:
            if response.request_id in self._running:  # and has not been cancelled
                self._take(response, events, lengths)
        return Turn(
            events,
            prefill_seconds=0.0 if decoding else seconds,
            decode_seconds=seconds if decoding else 0.0,
            decoded=np.asarray(lengths, np.int64),
        )

    def _take(self, response: Any, events: list[Event], lengths: list[int]) -> None:
        """The events of a response, and the cached tokens of each decode step in it."""
        number, running = response.request_id, self._running[response.request_id]
        if response.has_error():
            events.append(Failed(number, FasaError(f"TensorRT-LLM: {_first_line(response.error_msg)}")))
            del self._running[number]
            return
        for token in response.result.output_token_ids[0]:
            if running.started:
                lengths.append(running.length)
            running.length += 1
            finish: FinishReason | None = "length" if running.length >= running.limit else None
            finish = "eos" if token in running.request.stop_ids else finish
            events.append(Token(number, int(token), finish))
            if finish:
                del self._running[number]
                return
        if response.result.is_final:
            reason = ", ".join(str(reason) for reason in response.result.finish_reasons)
            events.append(Failed(number, FasaError(f"TensorRT-LLM ended the request early: {reason}")))
            del self._running[number]


def sampling_arguments(sampling: Sampling, seed: int | None) -> dict[str, Any]:
    """For `SamplingConfig`. top_k 0 keeps all where top_p is given; greedy is the likeliest of one."""
    if sampling.temperature == 0:
        return {"top_k": 1}
    arguments = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p, "seed": seed}
    return {**arguments, "min_p": sampling.min_p} if sampling.min_p else arguments


def load_tensorrt_llm(directory: EngineDirectory, *, kv_fraction: float = 0.9) -> TensorRTLLMBackend:
    """kv_fraction: share of the free GPU memory for the KV cache. Raises FasaError when this machine cannot run it.

    Blocks are not reused between requests: TensorRT-LLM would also reuse those that were decoded sparsely, and answers
    would depend on earlier requests.
    """
    if not 0 < kv_fraction <= 1:
        raise FasaError(f"kv-fraction {kv_fraction} is out of range", hint="above 0, at most 1")
    check_version()
    gpus = machine.cuda().gpus
    if not gpus:
        raise FasaError("there is no NVIDIA GPU here", hint="build with --target onnxruntime")
    architecture = machine.architecture(gpus[0].compute_capability)
    head_dim = int(directory.config["pretrained_config"]["head_size"])
    plugin = plugin_library.find(head_dim, architecture)
    if plugin is None:
        raise FasaError(
            f"the plugin library for sm_{architecture} and head_dim {head_dim} is not built",
            hint=f"fasa-trt plugin build --kind tensorrt --arch {architecture} --head-dim {head_dim}",
        )
    trtllm = _import("tensorrt_llm")
    if (ranks := int(trtllm.mpi_world_size())) != 1:
        raise FasaError(f"{directory.path} runs on one GPU, not in {ranks} processes", hint="start it without mpirun")
    plugin_library.load(_import("tensorrt"), plugin)  # in the process of each rank, before the engine asks for it
    try:
        runner = _import("tensorrt_llm.runtime").ModelRunnerCpp.from_dir(
            str(directory.path),
            rank=int(trtllm.mpi_rank()),
            kv_cache_free_gpu_memory_fraction=kv_fraction,
            kv_cache_enable_block_reuse=False,
            enable_chunked_context=True,
        )
    except Exception as error:
        raise FasaError(
            f"TensorRT-LLM cannot load {directory.path}: {_first_line(error)}", hint="run fasa-trt doctor"
        ) from None
    return TensorRTLLMBackend(directory, trtllm, runner, str(plugin))


def check_version() -> None:
    """Raises FasaError unless TensorRT-LLM is of the series that runs engines. Does not import it."""
    version = machine.package_version("tensorrt_llm", "tensorrt-llm")
    if version is None:
        raise FasaError("TensorRT-LLM is not installed", hint='pip install "fasa-trt[trtllm]", or use its container')
    if [int(part) for part in re.findall(r"\d+", version)[:2]] != list(TRTLLM_VERSION[:2]):
        raise FasaError(
            f"TensorRT-LLM {version} does not run these engines, {WANTED} does",
            hint=f"pip install tensorrt-llm=={WANTED}",
        )


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # it fails in many ways where its libraries do not fit
        raise FasaError(
            f"{module} does not load: {_first_line(error)}", hint=f"install TensorRT-LLM {WANTED}, or use its container"
        ) from None


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
