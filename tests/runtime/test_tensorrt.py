"""The TensorRT runtime from directory to tokens, with TensorRT and CUDA played on the host (`tests/fake_*.py`)."""

from __future__ import annotations

import _ctypes
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasa_trt.core.engine_dir import EngineDirectory, open_engine, write_engine
from fasa_trt.core.errors import FasaError
from fasa_trt.plugins import plugin_library
from fasa_trt.runtime import device_sampling
from fasa_trt.runtime.batcher import Failed, Request
from fasa_trt.runtime.cuda_graphs import batch_sizes
from fasa_trt.runtime.sampling import Sampling
from fasa_trt.runtime.sequence import Preempted, Token
from fasa_trt.runtime.tensorrt import TensorRTBackend, load_tensorrt
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import BATCH, BLOCK, HEAD_DIM, HEADS, LENGTH, PLAN, TOKENS, FakeTensorRT, config
from tests.simulated_engine import LAYERS, VOCAB, alone


@pytest.fixture
def directory(tmp_path: Path) -> EngineDirectory:
    facts = {
        "tensorrt": {"builder_version": "10.14.1.48", "architecture": "90"},
        "plugin": {"version": "1"},
    }
    with write_engine(tmp_path / "engine", force=False, facts=facts) as work:
        (work / "config.json").write_text(json.dumps(config()), "utf-8")
        (work / "rank0.engine").write_bytes(PLAN)
    return open_engine(tmp_path / "engine")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = fake  # type: ignore[attr-defined]
    for name, module in {"cuda": ModuleType("cuda"), "cuda.bindings": bindings}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return fake


@pytest.fixture
def trt(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT(cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setenv("FASA_TRT_PLUGIN", _ctypes.__file__)  # any library will load
    monkeypatch.setattr(plugin_library, "_loaded", {})
    return fake


def serve(
    backend: TensorRTBackend, requests: list[Request], *, arrivals: list[int] | None = None, cancel: int = 0
) -> tuple[list[list[int]], list[str | None], int]:
    """Answers, reasons to finish, preemptions. Request number n joins at its arrival; every `cancel`-th is cancelled
    after three tokens."""
    batcher = backend.batcher()
    answers: list[list[int]] = [[] for _ in requests]
    reasons: list[str | None] = [None] * len(requests)
    numbers: dict[int, int] = {}
    preempted = turn = 0
    while True:
        for i, request in enumerate(requests):
            if i not in numbers.values() and (arrivals is None or arrivals[i] <= turn):
                numbers[batcher.submit(request)] = i
        done = batcher.step()
        turn += 1
        if done is None:
            if len(numbers) == len(requests):
                return answers, reasons, preempted
            continue
        for event in done.events:
            i = numbers[event.request]
            if isinstance(event, Preempted):
                preempted += 1
            elif isinstance(event, Failed):
                reasons[i] = str(event.error)
            else:
                answers[i].append(event.token)
                reasons[i] = event.finish
                if cancel and i % cancel == 0 and len(answers[i]) == 3 and not event.finish:
                    assert batcher.cancel(event.request)
                    reasons[i] = "cancelled"


def random_requests(count: int, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    stem = [rng.randrange(VOCAB) for _ in range(40)]
    prompts = [[*stem[: rng.randrange(40)], rng.randrange(VOCAB)] for _ in range(count)]
    return [
        Request(prompt, rng.randint(1, 25), frozenset({3}) if rng.random() < 0.3 else frozenset()) for prompt in prompts
    ]


def expected(request: Request) -> list[int]:
    return alone(list(request.prompt), request.max_new_tokens, set(request.stop_ids), LENGTH)


# --- the whole path ---


def test_every_request_gets_the_answer_it_gets_alone(
    directory: EngineDirectory, trt: FakeTensorRT, cuda: FakeCuda
) -> None:
    """Joins, leaves, chunks (prompts exceed a step's tokens), cancellations, graphs; the pool holds a full batch."""
    backend = load_tensorrt(directory)
    requests = random_requests(60)
    assert max(len(request.prompt) for request in requests) > TOKENS
    answers, reasons, preempted = serve(backend, requests, arrivals=[3 * (i // 4) for i in range(60)], cancel=7)
    for request, answer, reason in zip(requests, answers, reasons, strict=True):
        wanted = expected(request)
        if reason == "cancelled":
            assert answer == wanted[:3]
        else:
            assert answer == wanted and reason == ("eos" if wanted[-1] in request.stop_ids else "length")
    assert reasons.count("cancelled") > 3 and reasons.count("eos") > 3 and preempted == 0
    assert backend.batcher().scheduler.allocator.counters.reused > 0
    sizes = batch_sizes(BATCH)
    assert 0 < cuda.calls["cudaGraphInstantiate"] <= len(sizes)
    assert cuda.calls["cudaGraphLaunch"] > 20
    assert backend.describe()["cuda_graphs"] == f"{cuda.calls['cudaGraphInstantiate']} batch sizes captured"
    assert len(trt.contexts) == 1 + cuda.calls["cudaGraphInstantiate"]


def test_full_pool_preempts(directory: EngineDirectory, trt: FakeTensorRT, cuda: FakeCuda) -> None:
    """A pool of one long sequence for six rows."""
    used_without_pool = 4096 + 2**13
    block = sum(2 * layers * heads * BLOCK * HEAD_DIM * 2 for layers, heads in zip(LAYERS, HEADS, strict=True))
    cuda.total = used_without_pool + 14 * block
    backend = load_tensorrt(directory, kv_fraction=0.8)
    assert backend.pool.num_blocks < 12
    requests = random_requests(30, seed=2)
    answers, _, preempted = serve(backend, requests)
    assert answers == [expected(request) for request in requests]
    assert preempted > 0


def test_one_synchronisation_a_step_and_no_allocation(
    directory: EngineDirectory, trt: FakeTensorRT, cuda: FakeCuda
) -> None:
    backend = load_tensorrt(directory)
    serve(backend, [Request([1, 2, 4], 10)])  # captures
    before = cuda.calls.copy()
    serve(backend, [Request([1, 2, 4], 10)])
    calls = cuda.calls - before
    assert calls["cudaStreamSynchronize"] == 10 and calls["cudaGraphLaunch"] == 9
    assert not {"cudaMalloc", "cudaHostAlloc", "cudaGraphInstantiate"} & calls.keys()


def test_graphs_are_switched_off_when_a_capture_fails(
    directory: EngineDirectory, trt: FakeTensorRT, cuda: FakeCuda
) -> None:
    trt.fail.add("capture")
    backend = load_tensorrt(directory)
    requests = random_requests(12)
    answers, _, _ = serve(backend, requests)
    assert answers == [expected(request) for request in requests]
    assert cuda.calls["cudaGraphLaunch"] == 0 and cuda.calls["cudaStreamBeginCapture"] == 1
    assert backend.describe()["cuda_graphs"].startswith("off: TensorRT cannot run this step: Error Code 1")


def test_batch_sizes() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(6) == [1, 2, 4, 6]
    assert batch_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert batch_sizes(100)[-4:] == [64, 80, 96, 100]


def test_memory_is_given_back(directory: EngineDirectory, trt: FakeTensorRT, cuda: FakeCuda) -> None:
    backend = load_tensorrt(directory)
    serve(backend, random_requests(5))
    assert cuda.device_memory and cuda.host_memory
    backend.close()
    assert not cuda.device_memory and not cuda.host_memory


def test_describe(directory: EngineDirectory, trt: FakeTensorRT) -> None:
    backend = load_tensorrt(directory)
    facts = backend.describe()
    assert facts["backend"] == "tensorrt" and facts["version"] == "10.14.1.48"
    assert facts["cache_tokens"] == BATCH * 8 * BLOCK, "more than a full batch can use"
    assert facts["sampling"] == "host"
    assert facts["plugin"] == _ctypes.__file__


def test_tensorrt_for_rtx(tmp_path: Path, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same but for the name of the module."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", FakeTensorRT(trt.cuda, name="tensorrt_rtx"))
    monkeypatch.delitem(sys.modules, "tensorrt")
    (tmp_path / "rank0.engine").write_bytes(PLAN)
    backend = load_tensorrt(EngineDirectory(tmp_path, config("tensorrt-rtx"), {}))
    requests = random_requests(8)
    assert serve(backend, requests)[0] == [expected(request) for request in requests]


# --- sampling ---


def test_seeded_draws_repeat_and_do_not_depend_on_neighbours(directory: EngineDirectory, trt: FakeTensorRT) -> None:
    backend = load_tensorrt(directory)

    def seeded(seed: int) -> Request:
        return Request([1, 2, 4], 12, sampling=Sampling(temperature=3.0, seed=seed))

    together, _, _ = serve(backend, [seeded(1), seeded(2), *random_requests(6)])
    assert together[0] == serve(backend, [seeded(1)])[0][0]
    assert together[1] == serve(backend, [seeded(2)])[0][0]
    assert together[0] != together[1]
    assert together[0] != expected(seeded(1))


def test_rows_that_overflow_fail_alone(directory: EngineDirectory, trt: FakeTensorRT) -> None:
    trt.not_finite.add(5)
    backend = load_tensorrt(directory)
    requests = random_requests(20)
    answers, reasons, _ = serve(backend, requests)
    failed = 0
    for request, answer, reason in zip(requests, answers, reasons, strict=True):
        wanted = expected(request)
        if 5 in wanted:
            failed += 1
            assert answer == wanted[: wanted.index(5)]
            assert reason is not None and reason.startswith("the model's logits are not finite numbers")
        else:
            assert answer == wanted
    assert 0 < failed < 20


# --- what goes wrong while it serves ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("execute_async_v3", "TensorRT cannot run this step: Error Code 1: Cuda Runtime (out of memory)"),
        ("set_input_shape", "TensorRT does not take "),
        ("cudaMemcpyAsync", "CUDA's cudaMemcpyAsync failed: an illegal memory access was encountered"),
        ("cudaStreamSynchronize", "CUDA's cudaStreamSynchronize failed: "),
        ("cudaGraphLaunch", "CUDA's cudaGraphLaunch failed: "),
    ],
)
def test_failing_step_ends_its_requests_with_one_line(
    call: str, message: str, directory: EngineDirectory, trt: FakeTensorRT, cuda: FakeCuda
) -> None:
    backend = load_tensorrt(directory)
    serve(backend, [Request([1, 2], 6)])
    cuda.fail = {call: 0}
    trt.fail = {call}
    reasons = serve(backend, [Request([1, 2], 6), Request([4, 4, 4, 4], 6)])[1]
    for reason in reasons:
        assert reason is not None and reason.startswith(message) and "\n" not in reason
    assert backend.batcher().step() is None
    scheduler = backend.batcher().scheduler
    scheduler.check()
    assert scheduler.allocator.free_blocks == scheduler.allocator.num_blocks
    cuda.fail, trt.fail = {}, set()
    cuda.pending.clear()
    assert serve(backend, [Request([1, 2], 6)])[0] == [expected(Request([1, 2], 6))], "it did not recover"


def test_requests_that_can_never_be_served(directory: EngineDirectory, trt: FakeTensorRT) -> None:
    batcher = load_tensorrt(directory).batcher()
    for request, message in (
        (Request([], 3), "the prompt is empty"),
        (Request([1] * LENGTH, 3), "the prompt has 60 tokens, this engine holds 60"),
        (Request([VOCAB], 3), "token ids go from 0 to 10"),
        (Request([1], 3, dense=True), "cannot attend densely on request .*--dense-layers"),
    ):
        with pytest.raises(FasaError, match=message):
            batcher.submit(request)


# --- what does not load ---


def change(directory: EngineDirectory, **manifest: Any) -> None:
    directory.manifest.update(manifest)


BAD: dict[str, tuple[Callable[[EngineDirectory, FakeTensorRT, FakeCuda], Any], str]] = {
    "version": (
        lambda d, t, c: setattr(t, "__version__", "10.15.0.1"),
        r"was built with tensorrt 10.14.1.48, here is 10.15.0.1 \(pip install tensorrt==10.14.1.48, or build",
    ),
    "architecture": (
        lambda d, t, c: setattr(c, "compute_capability", (8, 9)),
        r"was built for GPU architecture sm_90, this GPU is sm_89 \(build it again",
    ),
    "no gpu": (lambda d, t, c: setattr(c, "gpus", 0), "there is no NVIDIA GPU here"),
    "driver": (lambda d, t, c: c.fail.update(cudaGetDeviceCount=0), "CUDA's cudaGetDeviceCount failed: "),
    "weights": (lambda d, t, c: setattr(c, "total", 2), "the weights take .* the GPU has .* free"),
    "workspace": (lambda d, t, c: c.fail.update(cudaMalloc=0), "the GPU has no 0 MiB for the engine's working memory"),
    "pool": (lambda d, t, c: c.fail.update(cudaMalloc=1), "the GPU has no . MiB for the KV cache"),
    "small pool": (
        lambda d, t, c: setattr(c, "total", 80_000),
        "a KV cache for one sequence of 60 tokens takes . MiB, 0 MiB of the GPU are left for it .*--kv-fraction",
    ),
    "pinned": (lambda d, t, c: c.fail.update(cudaHostAlloc=2), "CUDA's cudaHostAlloc failed"),
    "plugin version": (lambda d, t, c: change(d, plugin={"version": "2"}), "needs version 2 of FasaAttention, this is"),
    "plugin": (lambda d, t, c: t.fail.add("load_library"), "has no TensorRT plugin FasaAttention"),
    "corrupt": (
        lambda d, t, c: d.model_file.write_bytes(b"no plan"),
        "TensorRT cannot load .*rank0.engine: Error Code 1: Serialization \\(build the engine again",
    ),
    "context": (lambda d, t, c: t.fail.add("create_execution_context"), "TensorRT makes no execution context: "),
    "address": (lambda d, t, c: t.fail.add("set_tensor_address"), "TensorRT does not take the memory of input_ids"),
    "other tensors": (lambda d, t, c: t.tensors.update(mystery="INT32"), "is no FASA engine .*: it has mystery"),
    "no logits": (lambda d, t, c: t.tensors.pop("logits"), "is no FASA engine .*: it has no logits"),
    "dtype": (lambda d, t, c: t.tensors.update(logits="HALF"), "has logits of type HALF, not float32"),
    "config": (lambda d, t, c: d.config["pretrained_config"].pop("head_size"), "does not describe a paged KV cache"),
    "limits": (lambda d, t, c: d.config["build_config"].pop("max_num_tokens"), "lacks an engine's limits"),
}


@pytest.mark.parametrize("case", BAD)
def test_engine_that_does_not_fit(case: str, directory: EngineDirectory, trt: FakeTensorRT, cuda: FakeCuda) -> None:
    change_it, message = BAD[case]
    change_it(directory, trt, cuda)
    with pytest.raises(FasaError, match=message) as caught:
        load_tensorrt(directory)
    assert "\n" not in str(caught.value)
    assert not cuda.device_memory and not cuda.host_memory, "memory was left behind"


@pytest.mark.parametrize("fraction", [0, -1, 1.5])
def test_impossible_fraction(fraction: float, directory: EngineDirectory, trt: FakeTensorRT) -> None:
    with pytest.raises(FasaError, match="kv-fraction .* is out of range"):
        load_tensorrt(directory, kv_fraction=fraction)


def test_without_tensorrt(directory: EngineDirectory, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(FasaError, match=r"tensorrt (is not installed|does not load).*fasa-trt\[tensorrt\]"):
        load_tensorrt(directory)


def test_without_cuda_bindings(directory: EngineDirectory, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(FasaError, match="CUDA's Python bindings are not installed .*pip install cuda-bindings"):
        load_tensorrt(directory)


def test_without_plugin_library(
    directory: EngineDirectory, trt: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASA_TRT_PLUGIN")
    monkeypatch.setenv("FASA_TRT_CACHE", str(tmp_path))
    with pytest.raises(FasaError, match=r"for sm_90 and head_dim 64 is not built \(fasa-trt plugin build"):
        load_tensorrt(directory)


def test_torch_samples_where_it_has_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(device_sampling, "TorchSampler", lambda *arguments: made.append(arguments))
    device_sampling.new_sampler("device", 5, (2, 3))  # type: ignore[arg-type]
    assert made == [("device", 5, (2, 3))]


def test_events_are_tokens(directory: EngineDirectory, trt: FakeTensorRT) -> None:
    """Time and lengths of a step, for the accounts."""
    batcher = load_tensorrt(directory).batcher()
    batcher.submit(Request([1, 2, 4], 3))
    first = batcher.step()
    assert first is not None and first.decode_seconds == 0 and not len(first.decoded) and first.prefill_seconds > 0
    second = batcher.step()
    assert second is not None and second.decoded.tolist() == [4] and second.prefill_seconds == 0
    assert isinstance(second.events[0], Token)
