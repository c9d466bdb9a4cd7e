"""The cache that grows, the limits of an engine, and files that cannot be loaded."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from fasa_trt.core.engine_dir import EngineDirectory
from fasa_trt.core.errors import FasaError
from fasa_trt.core.spec import SparseSpec
from fasa_trt.runtime import onnxruntime
from fasa_trt.runtime.onnxruntime import OnnxRuntimeBackend
from tests.engines import MAX_SEQ_LEN, Exported, decode_steps, export, prefill, relative

Array = NDArray[Any]
SPEC = SparseSpec(budget=16, n_tip=4, sink=2, recent=4, dense_layers=())
PROMPT = 30


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export("llama", tmp_path_factory.mktemp("llama"), SPEC)


@pytest.fixture
def backend(exported: Exported) -> OnnxRuntimeBackend:
    return exported.backend


def tokens(batch: int, length: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(2, 97, (batch, length))


def step(backend: OnnxRuntimeBackend, ids: Array, position: int) -> Array:
    zero = np.zeros(len(ids), np.int64)
    return backend.step(ids, zero + position, zero, np.full((len(ids), 1), ids.shape[1] - 1))


# --- the cache ---


@pytest.mark.parametrize("sparse", [True, False])
def test_growing_keeps_what_is_cached(
    sparse: bool, backend: OnnxRuntimeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same steps with room for everything from the start."""
    ids = tokens(2, 80)
    prefill(backend, ids[:, :PROMPT])
    assert backend.capacity == MAX_SEQ_LEN
    wanted = decode_steps(backend, ids, PROMPT, sparse=sparse)

    monkeypatch.setattr(onnxruntime, "CAPACITY_STEP", 8)
    prefill(backend, ids[:, :PROMPT])
    capacities = []
    zero = np.zeros(2, np.int64)
    for t in range(PROMPT, 80):
        got = backend.step(ids[:, t : t + 1], zero + t, zero, zero[:, None], sparse=sparse)
        assert relative(got[:, 0], wanted[:, t - PROMPT]) < 1e-5
        capacities.append(backend.capacity)
    assert capacities == [-(-(t + 1) // 8) * 8 for t in range(PROMPT, 80)]


def test_growing_in_the_middle_of_a_prefill(backend: OnnxRuntimeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(2, 50)
    wanted = prefill(backend, ids, sparse=False)
    monkeypatch.setattr(onnxruntime, "CAPACITY_STEP", 1)
    assert relative(prefill(backend, ids, chunk=7, sparse=False), wanted) < 1e-5
    assert backend.capacity == 50


def test_capacity_ends_at_the_engine_s_limit(backend: OnnxRuntimeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "CAPACITY_STEP", 100)
    backend.allocate(1)
    step(backend, tokens(1, 100), 0)
    assert backend.capacity == 100
    step(backend, tokens(1, 1), 100)
    assert backend.capacity == MAX_SEQ_LEN


def test_starting_over_forgets_everything(backend: OnnxRuntimeBackend) -> None:
    ids = tokens(3, 40)
    wanted = prefill(backend, ids[:1])
    prefill(backend, tokens(3, 100, seed=1))
    assert backend.describe()["cache_bytes"] == 3 * prefill_bytes(backend, ids[:1])
    np.testing.assert_array_equal(prefill(backend, ids[:1]), wanted)


def prefill_bytes(backend: OnnxRuntimeBackend, ids: Array) -> int:
    prefill(backend, ids)
    return int(backend.describe()["cache_bytes"])


def test_steps_are_sparse_unless_told_otherwise(backend: OnnxRuntimeBackend) -> None:
    ids, zero = tokens(1, 60), np.zeros(1, np.int64)
    results = []
    for options in ({}, {"sparse": True}, {"sparse": False}):
        prefill(backend, ids[:, :-1])
        results.append(backend.step(ids[:, -1:], zero + 59, zero, zero[:, None], **options))
    np.testing.assert_array_equal(results[0], results[1])
    assert relative(results[0], results[2]) > 1e-3


def test_one_token_to_begin_with(backend: OnnxRuntimeBackend) -> None:
    ids = tokens(2, 3)
    wanted = prefill(backend, ids)
    assert relative(prefill(backend, ids, chunk=1), wanted) < 1e-5


def test_going_back_overwrites(backend: OnnxRuntimeBackend) -> None:
    """Slots at and after the position are written anew, whatever was there."""
    ids, other = tokens(2, 60), tokens(2, 60, seed=1)
    wanted = prefill(backend, ids)
    prefill(backend, np.concatenate([ids[:, :20], other[:, 20:]], axis=1))
    assert relative(step(backend, ids[:, 20:], 20)[:, 0], wanted[:, -1]) < 1e-5


def test_describe_counts_the_cache(backend: OnnxRuntimeBackend) -> None:
    facts = backend.describe()
    assert (facts["backend"], facts["version"]) == ("onnxruntime", ort.__version__)
    assert facts["provider"] == "CPUExecutionProvider"
    layers, kv_heads, head_dim, bytes_each = 3, 2, 32, 4
    expected = 2 * layers * kv_heads * head_dim * bytes_each * MAX_SEQ_LEN * 5
    assert prefill_bytes(backend, tokens(5, 10)) == expected


# --- limits ---


@pytest.mark.parametrize("batch", [0, 9])
def test_batch_out_of_range(batch: int, backend: OnnxRuntimeBackend) -> None:
    message = rf"{batch} sequences at once: .* built for 1 to 8 \(build with a larger --max-batch-size\)"
    with pytest.raises(FasaError, match=message):
        backend.allocate(batch)


def test_beyond_the_last_slot(backend: OnnxRuntimeBackend) -> None:
    backend.allocate(2)
    step(backend, tokens(2, MAX_SEQ_LEN), 0)
    step(backend, tokens(2, 1), MAX_SEQ_LEN - 1)
    with pytest.raises(FasaError, match=rf"{MAX_SEQ_LEN + 1} tokens do not fit: this engine holds {MAX_SEQ_LEN} "):
        step(backend, tokens(2, 1), MAX_SEQ_LEN)
    with pytest.raises(FasaError, match="--max-seq-len"):
        backend.step(tokens(2, 3), np.array([0, MAX_SEQ_LEN - 2]), np.zeros(2, np.int64), np.zeros((2, 1), np.int64))


# --- loading ---


def engine(directory: Path, dtype: str = "float32", model_file: str = "model.onnx") -> EngineDirectory:
    config = {
        "pretrained_config": {"dtype": dtype},
        "build_config": {"max_seq_len": MAX_SEQ_LEN, "max_batch_size": 8},
        "fasa": {"target": "onnxruntime", "model_file": model_file, "sparse": SPEC.to_json()},
    }
    return EngineDirectory(directory, config, {})


def refused(directory: Path, *words: str, **options: Any) -> None:
    with pytest.raises(FasaError) as caught:
        OnnxRuntimeBackend(engine(directory), **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("content", [b"", b"not onnx", bytes(1000)])
def test_corrupt_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    refused(tmp_path, f"onnxruntime cannot load {tmp_path / 'model.onnx'}: ", "fasa-trt doctor")


def test_truncated_model(exported: Exported, tmp_path: Path) -> None:
    data = next(exported.checkpoint.path.parent.glob("*.onnx")).read_bytes()
    (tmp_path / "model.onnx").write_bytes(data[: len(data) // 2])
    refused(tmp_path, "onnxruntime cannot load")


def test_model_without_its_weights(exported: Exported, tmp_path: Path) -> None:
    data = next(exported.checkpoint.path.parent.glob("*.onnx")).read_bytes()
    (tmp_path / "model.onnx").write_bytes(data)
    refused(tmp_path, "onnxruntime cannot load")


def test_missing_model(tmp_path: Path) -> None:
    refused(tmp_path, "onnxruntime cannot load", "model.onnx")


def test_bfloat16_on_the_cpu(tmp_path: Path) -> None:
    """Refused before the file is looked at."""
    with pytest.raises(FasaError, match=r"no bfloat16 kernels for the CPU \(build with --dtype float32, or use a GPU"):
        OnnxRuntimeBackend(engine(tmp_path, "bfloat16"), provider="cpu")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_bfloat16_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is not refused: only the file is missing here."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(FasaError, match="onnxruntime cannot load"):
        OnnxRuntimeBackend(engine(tmp_path, "bfloat16"))


def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])


def test_cuda_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_cuda(monkeypatch)
    refused(tmp_path, "onnxruntime has no CUDA provider here", "fasa-trt[gpu]", provider="cuda")


def test_unknown_provider(tmp_path: Path) -> None:
    refused(tmp_path, "unknown provider 'tpu'", "cpu or cuda", provider="tpu")


@pytest.mark.parametrize(
    ("wanted", "cuda", "device"),
    [(None, True, "cuda"), (None, False, "cpu"), ("cuda", True, "cuda"), ("cpu", True, "cpu"), ("cpu", False, "cpu")],
)
def test_choice_of_provider(wanted: str | None, cuda: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: known if cuda else known[1:])
    assert onnxruntime._providers(wanted) == (device, known if device == "cuda" else known[1:])


@pytest.mark.parametrize("threads", [0, -1])
def test_impossible_threads(threads: int, tmp_path: Path) -> None:
    refused(tmp_path, f"threads must be at least 1, not {threads}", threads=threads)


def test_threads_rest_between_steps(exported: Exported) -> None:
    """Waiting costs no processor time, with a pool of threads that would spin for it."""
    directory = exported.checkpoint.path.parent
    file = engine(directory, model_file=next(directory.glob("*.onnx")).name)
    backend = OnnxRuntimeBackend(file, threads=4, provider="cpu")
    busy = []
    for _ in range(3):  # the least counts: this process may have other things to do
        prefill(backend, np.full((1, 8), 5))
        before = time.process_time()
        time.sleep(0.2)
        busy.append(time.process_time() - before)
    assert min(busy) < 0.01


def test_threads(exported: Exported) -> None:
    directory = exported.checkpoint.path.parent
    name = next(directory.glob("*.onnx")).name
    ids = tokens(1, 20)
    two = OnnxRuntimeBackend(engine(directory, model_file=name), threads=2, provider="cpu")
    assert relative(prefill(two, ids), prefill(exported.backend, ids)) < 1e-5
    assert two._session.get_session_options().intra_op_num_threads == 2
