"""Requests through a played TensorRT-LLM that takes no argument which the real one would not."""

from __future__ import annotations

import _ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasa_trt.core.engine_dir import EngineDirectory
from fasa_trt.core.errors import FasaError
from fasa_trt.plugins import plugin_library
from fasa_trt.runtime import machine
from fasa_trt.runtime.batcher import Event, Failed, Request
from fasa_trt.runtime.sampling import Sampling
from fasa_trt.runtime.sequence import Token
from fasa_trt.runtime.tensorrt_llm import TensorRTLLMBackend, load_tensorrt_llm
from tests.fake_tensorrt import LENGTH, config
from tests.fake_tensorrt_llm import FakeTensorRTLLM, response


def answer(request: dict[str, Any]) -> list[int]:
    """Counts up from the prompt's sum, to the first stop word or max_tokens."""
    start, stops = sum(request["input_token_ids"]), request["stop_words"] or []
    tokens: list[int] = []
    while len(tokens) < request["max_tokens"] and [tokens[-1:]] not in [[stop] for stop in stops]:
        tokens.append((start + len(tokens)) % 11)
    return tokens


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRTLLM:
    fake = FakeTensorRTLLM(answer)
    fake.install(monkeypatch)
    monkeypatch.setattr(machine, "package_version", lambda module, *_: "1.2.1")
    monkeypatch.setattr(machine, "cuda", lambda: machine.Cuda("13.0", (machine.Gpu("H100", (9, 0), 80 << 30),)))
    monkeypatch.setenv("FASA_TRT_PLUGIN", _ctypes.__file__)
    monkeypatch.setattr(plugin_library, "_loaded", {})
    return fake


DIRECTORY = EngineDirectory(Path("engine"), config("tensorrt-llm"), {})


@pytest.fixture
def backend(fake: FakeTensorRTLLM) -> TensorRTLLMBackend:
    return load_tensorrt_llm(DIRECTORY, kv_fraction=0.5)


def run(backend: TensorRTLLMBackend) -> dict[int, list[Event]]:
    found: dict[int, list[Event]] = {}
    while (turn := backend.step()) is not None:
        for event in turn.events:
            found.setdefault(event.request, []).append(event)
    return found


def tokens(events: list[Event]) -> list[int]:
    return [event.token for event in events if isinstance(event, Token)]


def test_plugin_is_loaded_before_the_engine(backend: TensorRTLLMBackend, fake: FakeTensorRTLLM) -> None:
    assert [name for name, _ in fake.calls] == ["load_library", "from_dir"]
    assert fake.calls[1][1] == {
        "engine_dir": "engine",
        "rank": 0,
        "kv_cache_free_gpu_memory_fraction": 0.5,
        "kv_cache_enable_block_reuse": False,
        "enable_chunked_context": True,
    }
    facts = backend.describe()
    assert (facts["backend"], facts["version"], facts["plugin"]) == ("tensorrt-llm", "1.2.1", _ctypes.__file__)


def test_answers_of_a_batch(backend: TensorRTLLMBackend) -> None:
    first = backend.submit(Request([1, 2], 4))
    second = backend.submit(Request([5], 20, frozenset({8, 9})))
    events = run(backend)
    assert tokens(events[first]) == [3, 4, 5, 6] and tokens(events[second]) == [5, 6, 7, 8]
    for number, finish in ((first, "length"), (second, "eos")):
        ends = [event.finish for event in events[number] if isinstance(event, Token)]
        assert ends == [None, None, None, finish]
    assert backend.step() is None


def test_joining_between_steps(backend: TensorRTLLMBackend) -> None:
    first = backend.submit(Request([1], 6))
    backend.step()
    second = backend.submit(Request([2], 3))
    turn = backend.step()
    assert turn is not None and {event.request for event in turn.events} == {first, second}
    assert turn.decoded.tolist() == [2] and turn.decode_seconds > 0 == turn.prefill_seconds


def test_answer_ends_at_the_engine_s_length(backend: TensorRTLLMBackend, fake: FakeTensorRTLLM) -> None:
    number = backend.submit(Request([1] * (LENGTH - 3), 100))
    assert fake.executor.requests[number]["max_tokens"] == 3
    assert len(run(backend)[number]) == 3


def test_request_as_the_executor_gets_it(backend: TensorRTLLMBackend, fake: FakeTensorRTLLM) -> None:
    number = backend.submit(Request(np.array([1, 2]), 4, frozenset({7, 5})))  # type: ignore[arg-type]
    request = fake.executor.requests[number]
    assert request["input_token_ids"] == [1, 2] and type(request["input_token_ids"][0]) is int
    assert request["streaming"] and request["stop_words"] == [[5], [7]]
    assert request["output_config"] == {"exclude_input_from_output": True}
    assert request["sampling_config"] == {"top_k": 1}


def test_sampling_options(backend: TensorRTLLMBackend, fake: FakeTensorRTLLM) -> None:
    def config_of(sampling: Sampling) -> dict[str, Any]:
        found: dict[str, Any] = fake.executor.requests[backend.submit(Request([1], 2, sampling=sampling))]
        return dict(found["sampling_config"])

    full = config_of(Sampling(0.7, top_k=5, top_p=0.9, min_p=0.1, seed=3))
    seed = full.pop("seed")
    assert full == {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1}
    assert type(seed) is int and 0 <= seed < 2**63
    plain = config_of(Sampling(1.0, seed=3))
    assert plain == {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": seed}
    assert config_of(Sampling(1.0, seed=4))["seed"] != seed


def test_cancelled_request_is_not_heard_of_again(backend: TensorRTLLMBackend, fake: FakeTensorRTLLM) -> None:
    stays, leaves = (backend.submit(Request([1], 5)) for _ in range(2))
    backend.step()
    assert backend.cancel(leaves) and not backend.cancel(leaves) and not backend.cancel(7)
    assert fake.executor.cancelled == [leaves]
    fake.executor.extra.append(response(leaves, [1], final=True, reason="CANCELLED"))
    assert set(run(backend)) == {stays}


def failure(events: list[Event]) -> str:
    assert isinstance(events[-1], Failed)
    return str(events[-1].error)


def test_errors_of_one_request(backend: TensorRTLLMBackend, fake: FakeTensorRTLLM) -> None:
    bad, good, early = (backend.submit(Request([1], 3)) for _ in range(3))
    fake.executor.extra.append(response(bad, [], final=True, error="no blocks left\nmore"))
    fake.executor.extra.append(response(early, [], final=True, reason="TIMED_OUT"))
    events = run(backend)
    assert failure(events[bad]) == "TensorRT-LLM: no blocks left"
    assert failure(events[early]) == "TensorRT-LLM ended the request early: FinishReason.TIMED_OUT"
    assert tokens(events[good]) == [1, 2, 3]


def test_executor_that_stops(backend: TensorRTLLMBackend, fake: FakeTensorRTLLM) -> None:
    numbers = [backend.submit(Request([1], 3)) for _ in range(2)]
    fake.executor.fail.add("await_responses")
    events = run(backend)
    assert [failure(events[number]) for number in numbers] == ["TensorRT-LLM has stopped: Executor is shut down"] * 2


def test_refused_requests(backend: TensorRTLLMBackend, fake: FakeTensorRTLLM) -> None:
    for request, message in (
        (Request([], 1), "the prompt is empty"),
        (Request([1], 1, dense=True), "cannot attend densely"),
        (Request([1] * LENGTH, 1), "this engine holds 60"),
    ):
        with pytest.raises(FasaError, match=message):
            backend.submit(request)
    fake.executor.fail.add("enqueue_request")
    with pytest.raises(FasaError, match="TensorRT-LLM refuses the request: Prompt length exceeds") as caught:
        backend.submit(Request([1], 1))
    assert "\n" not in str(caught.value)
    assert backend.step() is None


# --- what does not load ---


def refused(message: str, **options: Any) -> None:
    with pytest.raises(FasaError, match=message) as caught:
        load_tensorrt_llm(DIRECTORY, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["1.1.0", "1.3.0rc20", "0.21.0"])
def test_other_versions(version: str, fake: FakeTensorRTLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "package_version", lambda module, *_: version)
    refused(rf"TensorRT-LLM {version} does not run these engines, 1.2.1 does \(pip install tensorrt-llm==1.2.1")
    assert not fake.calls


def test_what_is_missing(fake: FakeTensorRTLLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refused("kv-fraction 2 is out of range", kv_fraction=2)
    fake.load = RuntimeError("Assertion failed: plugin\n1 0x7f")
    refused(r"TensorRT-LLM cannot load engine: Assertion failed: plugin \(run fasa-trt doctor")
    fake.ranks = 2
    refused(r"runs on one GPU, not in 2 processes \(start it without mpirun")
    monkeypatch.delenv("FASA_TRT_PLUGIN")
    monkeypatch.setenv("FASA_TRT_CACHE", str(tmp_path))
    refused("plugin library for sm_90 and head_dim 64 is not built")
    monkeypatch.setattr(machine, "cuda", lambda: machine.Cuda(None, ()))
    refused("there is no NVIDIA GPU here")
    monkeypatch.setattr(machine, "package_version", lambda module, *_: None)
    refused(r"TensorRT-LLM is not installed \(pip install \"fasa-trt\[trtllm\]\"")


def test_broken_installation(fake: FakeTensorRTLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_llm", None)
    refused("tensorrt_llm does not load: ")
