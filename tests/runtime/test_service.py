"""Requests from several threads, over both kinds of batching."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasa_trt.core.engine_dir import EngineDirectory
from fasa_trt.core.errors import FasaError
from fasa_trt.core.spec import SparseSpec
from fasa_trt.runtime.backend import Backend
from fasa_trt.runtime.blocks import BlockAllocator
from fasa_trt.runtime.generate import Engine
from fasa_trt.runtime.paged import PagedBatcher
from fasa_trt.runtime.sampling import Draw, Sampling
from fasa_trt.runtime.scheduler import Limits, Scheduler
from fasa_trt.runtime.service import Item, Service
from fasa_trt.runtime.step import Step
from tests.simulated_engine import LAYERS, VOCAB, alone
from tests.simulated_engine import Engine as SimulatedEngine
from tests.simulated_rows import SimulatedRows

LENGTH, EOS = 48, 3
Requests = list[tuple[list[int], int]]


class Letters:
    """A tokenizer: token 0 is "a", token 1 is "b"."""

    chat_template = None

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoded", (), {"input_ids": [ord(letter) - ord("a") for letter in text]})

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(chr(ord("a") + token) for token in tokens)


class SimulatedPages:
    """A backend of the paged kind. gate: closed, it holds the next step up. fail: the next step breaks with it."""

    max_seq_len, max_batch_size = LENGTH, 4

    def __init__(self) -> None:
        limits = Limits(self.max_batch_size, 16, LENGTH, VOCAB)
        scheduler = Scheduler(limits, BlockAllocator(16, 4, layers_in_pool=LAYERS))
        self.engine, self.paged = SimulatedEngine(scheduler), PagedBatcher(scheduler, self)
        self.gate = threading.Event()
        self.gate.set()
        self.fail: Exception | None = None

    def batcher(self, rows: int | None = None) -> PagedBatcher:
        return self.paged

    def describe(self) -> dict[str, Any]:
        return {"backend": "simulated"}

    def run(self, step: Step, draws: Sequence[Draw]) -> list[int]:
        assert self.gate.wait(10)
        if self.fail is not None:
            raise self.fail
        return self.engine(step)


def engine_of(backend: Backend) -> Engine:
    config = {
        "pretrained_config": {"num_key_value_heads": 1, "head_size": 8},
        "build_config": {"max_seq_len": LENGTH, "max_batch_size": 4},
        "fasa": {
            "sparse": SparseSpec(budget=8, n_tip=2, sink=1, recent=1).to_json(),
            "layers": [{"n_tip": 2, "window": None}],
            "eos_token_ids": [EOS],
        },
    }
    return Engine(EngineDirectory(Path(), config, {}), backend, Letters())


@pytest.fixture(params=["pages", "rows"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return engine_of(SimulatedPages() if request.param == "pages" else SimulatedRows(4, LENGTH))


@pytest.fixture
def pages() -> SimulatedPages:
    return SimulatedPages()


@pytest.fixture
def service(pages: SimulatedPages) -> Iterator[Service]:
    with Service(engine_of(pages)) as service:
        yield service
        pages.gate.set()


def some(count: int) -> Requests:
    return [([(i * 5 + j) % VOCAB for j in range(1 + i % 17)], 1 + (i * 7) % 20) for i in range(count)]


def expected(prompt: list[int], count: int) -> str:
    tokens = alone(prompt, count, {EOS}, LENGTH)
    return Letters().decode(tokens[:-1] if tokens[-1] == EOS else tokens)


def test_many_threads(engine: Engine) -> None:
    service = Service(engine)

    def ask(request: tuple[list[int], int]) -> str:
        prompt, count = request
        stream = service.submit(prompt, max_new_tokens=count)
        text = "".join(stream)
        assert stream.result().text == text
        return text

    with service, ThreadPoolExecutor(12) as threads:
        assert list(threads.map(ask, some(60))) == [expected(*request) for request in some(60)]
        assert service.num_requests == 0


def test_generate_agrees_between_backends() -> None:
    """One front: the same options, the same results, whichever way the backend batches."""
    prompts = [Letters().decode(prompt) for prompt, _ in some(9)]
    for options in (
        {"max_new_tokens": 12},
        {"max_new_tokens": 40, "stop": ["b", "ca"]},
        {"max_new_tokens": 9, "sampling": Sampling(0.0, seed=4)},
    ):
        paged = engine_of(SimulatedPages()).generate(prompts, **options)
        rows = engine_of(SimulatedRows(4, LENGTH)).generate(prompts, **options)
        assert paged == rows
    assert {completion.finish_reason for completion in rows} == {"length", "eos"}


def test_statistics_agree_between_backends() -> None:
    prompts = [Letters().decode(prompt) for prompt, _ in some(9)]
    found = []
    for backend in (SimulatedPages(), SimulatedRows(4, LENGTH)):
        engine = engine_of(backend)
        engine.generate(prompts, max_new_tokens=12)
        stats = engine.statistics
        assert stats.prefill_seconds > 0 and stats.decode_seconds > 0
        found.append((stats.prompt_tokens, stats.new_tokens, stats.decoded_tokens, stats.kv_read, stats.kv_dense))
    assert found[0] == found[1]


def test_text_streams_while_the_answer_grows(service: Service, pages: SimulatedPages) -> None:
    stream = iter(service.submit([1, 2], max_new_tokens=6))
    first = next(stream)
    assert first and expected([1, 2], 6).startswith(first)
    assert first + "".join(stream) == expected([1, 2], 6)


def test_stop_string_ends_the_request(service: Service, pages: SimulatedPages) -> None:
    text = expected([1, 2], 20)
    stream = service.submit([1, 2], max_new_tokens=20, stop=[text[3]])
    completion = stream.result()
    assert (completion.text, completion.finish_reason) == (text.split(text[3])[0], "stop")
    assert service.num_requests == 0
    service.submit([4], max_new_tokens=1).result()  # a step later, the first request has left the batch
    assert not pages.paged.scheduler.running


def test_stop_string_ends_a_row_of_a_batch(pages: SimulatedPages) -> None:
    engine, text = engine_of(pages), expected([1, 2], 20)
    prompts = [Letters().decode([1, 2]), Letters().decode([4])]
    engine.generate(prompts, max_new_tokens=20, stop=[text[3]])
    steps = pages.engine.steps
    assert engine.completions[0].finish_reason == "stop"
    assert steps < 25 and not pages.paged.scheduler.running
    assert engine.completions[0].tokens == alone([1, 2], 20, {EOS}, LENGTH)[: text.index(text[3]) + 1]
    assert len(engine.completions[1].tokens) > len(engine.completions[0].tokens), "it had no time to go on"


def test_cancel(service: Service, pages: SimulatedPages) -> None:
    pages.gate.clear()
    stays, leaves, waits = (service.submit([1, 2], max_new_tokens=30) for _ in range(3))
    leaves.cancel()
    leaves.cancel()
    waits.cancel()
    pages.gate.set()
    for cancelled in (leaves, waits):
        assert expected([1, 2], 30).startswith(cancelled.result().text) and len(cancelled.result().tokens) <= 2
    assert stays.result().text == expected([1, 2], 30)
    stays.cancel()  # it is over
    assert service.submit([1, 2], max_new_tokens=5).result().text == expected([1, 2], 5)
    assert pages.paged.scheduler.allocator.free_blocks == 16


def test_cancelled_answer_ends_where_it_is(service: Service, pages: SimulatedPages) -> None:
    stream = service.submit([1, 2], max_new_tokens=30)
    pieces = iter(stream)
    text = next(pieces)
    stream.cancel()
    text += "".join(pieces)
    assert stream.result().text == text and expected([1, 2], 30).startswith(text)


def test_listener_hears_what_iterating_would_yield(service: Service, pages: SimulatedPages) -> None:
    heard: queue.SimpleQueue[Item] = queue.SimpleQueue()
    stream = service.submit([1, 2], max_new_tokens=6, listener=heard.put)
    items = list(iter(lambda: heard.get(timeout=10), None))
    assert "".join(str(item) for item in items) == expected([1, 2], 6) == stream.answer.completion.text
    pages.fail = FasaError("the GPU is lost")
    service.submit([1, 2], listener=heard.put)
    assert heard.get(timeout=10) is pages.fail


def test_ignored_eos_ends_nothing(service: Service) -> None:
    prompt = next(prompt for prompt, _ in some(60) if EOS in alone(prompt, 20, set(), LENGTH)[:10])
    tokens = alone(prompt, 20, set(), LENGTH)
    assert service.submit(prompt, max_new_tokens=20).result().tokens == tokens[: tokens.index(EOS) + 1]
    assert service.submit(prompt, max_new_tokens=20, ignore_eos=True).result().tokens == tokens


def test_draws_come_from_the_generator_given() -> None:
    """Rows of one-hot logits give every draw the same token, so what is drawn is looked at."""
    generator, same = (np.random.default_rng(5) for _ in range(2))
    with Service(engine_of(SimulatedRows(4, LENGTH))) as service:
        service.submit([1, 2], max_new_tokens=3, sampling=Sampling(1.0, seed=1), generator=generator).result()
    same.random(3)
    assert generator.random() == same.random()


def test_bad_requests_are_refused_at_once(service: Service) -> None:
    for prompt, options, message in (
        ("", {}, "the prompt is empty"),
        ([1] * LENGTH, {}, "the prompt has 48 tokens"),
        ([99], {}, "token ids go from 0 to 10"),
        ([1], {"max_new_tokens": 0}, "max-new-tokens must be at least 1"),
        ([1], {"dense": True}, "cannot attend densely"),
        ("ab", {"chat": True}, "no chat template"),
    ):
        with pytest.raises(FasaError, match=message):
            service.submit(prompt, **options)
    assert service.num_requests == 0


def test_failing_step_fails_its_requests_and_no_others(service: Service, pages: SimulatedPages) -> None:
    pages.fail = FasaError("the GPU is lost")
    with pytest.raises(FasaError, match="the GPU is lost"):
        service.submit([1, 2]).result()
    pages.fail = None
    assert service.submit([1, 2], max_new_tokens=5).result().text == expected([1, 2], 5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_mistake_in_the_code_leaves_nobody_waiting(pages: SimulatedPages) -> None:
    service = Service(engine_of(pages))
    pages.gate.clear()
    streams = [service.submit([1, 2]) for _ in range(3)]
    pages.fail = KeyError("oh")
    assert service.error is None
    pages.gate.set()
    for stream in streams:
        with pytest.raises(FasaError, match="the service broke: KeyError: 'oh'"):
            stream.result()
    assert "the service broke" in str(service.error)
    with pytest.raises(FasaError, match="the service broke"):
        service.submit([1, 2])
    service.close()


def test_close_ends_everything(pages: SimulatedPages) -> None:
    service = Service(engine_of(pages))
    pages.gate.clear()
    stream = service.submit([1, 2], max_new_tokens=40)
    closing = threading.Thread(target=service.close)
    closing.start()
    while service.error is None:
        time.sleep(0.001)
    pages.gate.set()
    closing.join(10)
    assert not closing.is_alive() and not service._thread.is_alive()
    with pytest.raises(FasaError, match="the service was closed"):
        stream.result()
    with pytest.raises(FasaError, match="the service was closed"):
        service.submit([1])
    assert pages.paged.scheduler.allocator.free_blocks == 16
