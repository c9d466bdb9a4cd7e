"""Rows join and leave at any time, and each gets the answer that it gets alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime import rows
from fasa_trt.runtime.batcher import Failed, Request
from fasa_trt.runtime.rows import RowBatcher
from fasa_trt.runtime.sequence import Token
from tests.simulated_engine import VOCAB, alone
from tests.simulated_rows import SimulatedRows

LENGTH = 30


@st.composite
def clients(draw: st.DrawFn) -> list[tuple[int, int | None, Request]]:
    """When each joins, after how many tokens it is cancelled, and what it asks for."""
    found = []
    for _ in range(draw(st.integers(1, 8))):
        prompt = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=LENGTH - 1))
        stop = draw(st.sampled_from([frozenset[int](), frozenset({0, 4})]))
        request = Request(prompt, draw(st.integers(1, 12)), stop, dense=draw(st.booleans()))
        found.append((draw(st.sampled_from([0, 0, 2, 7])), draw(st.sampled_from([None, None, 1, 3])), request))
    return found


@settings(deadline=None, max_examples=200)
@given(clients(), st.integers(1, 4), st.sampled_from([1, 4, 512]))
def test_every_request_gets_the_answer_it_gets_alone(
    clients: list[tuple[int, int | None, Request]], max_batch_size: int, chunk: int
) -> None:
    batcher = RowBatcher(SimulatedRows(max_batch_size, LENGTH))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "PREFILL_CHUNK", chunk)
        answers: dict[int, list[int]] = {}
        finish: dict[int, str | None] = {}
        numbers: dict[int, int] = {}
        for turn in range(10_000):
            for i, (arrival, _, request) in enumerate(clients):
                if arrival == turn:
                    numbers[batcher.submit(request)] = i
            done = batcher.step()
            assert len(batcher.running) <= max_batch_size
            if done is None and len(numbers) == len(clients):
                break
            for event in done.events if done else ():
                assert isinstance(event, Token)
                i = numbers[event.request]
                answers.setdefault(i, []).append(event.token)
                finish[i] = event.finish
                if clients[i][1] == len(answers[i]) and not event.finish:
                    assert batcher.cancel(event.request)
        assert not batcher.running and not batcher.waiting
    for i, (_, cancel, request) in enumerate(clients):
        wanted = alone(list(request.prompt), request.max_new_tokens, set(request.stop_ids), LENGTH)
        if cancel is not None and cancel < len(wanted):
            assert answers[i] == wanted[:cancel] and finish[i] is None
        else:
            assert answers[i] == wanted
            assert finish[i] == ("eos" if wanted[-1] in request.stop_ids else "length")


def test_decoding_goes_on_between_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PREFILL_CHUNK", 4)
    backend = SimulatedRows(2, LENGTH)
    batcher = RowBatcher(backend)
    batcher.submit(Request([1], 20))
    assert batcher.step() is not None
    batcher.submit(Request([2] * 12, 20))
    for _ in range(6):
        batcher.step()
    widths = [count for _, count, _ in backend.steps[1:]]
    assert sorted(widths) == [1, 1, 1, 4, 4, 4] and widths[:2] != [4, 4]


def test_steps_cover_rows_in_use_only() -> None:
    backend = SimulatedRows(8, LENGTH)
    batcher = RowBatcher(backend)
    for count in (3, 20, 20):
        batcher.submit(Request([1, 2], count))
    while batcher.step() is not None:
        pass
    batches = [batch for batch, count, _ in backend.steps if count == 1]
    assert max(batches) == 3 and batches[-1] == 2, "the first row is left out when it has ended"


def test_dense_and_sparse_rows_take_turns() -> None:
    backend = SimulatedRows(4, LENGTH)
    batcher = RowBatcher(backend)
    for dense in (True, False, True):
        batcher.submit(Request([1, 2], 5, dense=dense))
    sparse = []
    while (turn := batcher.step()) is not None:
        if len(turn.decoded):
            sparse.append((turn.sparse, len(turn.decoded)))
    assert {count for kind, count in sparse if kind} == {1}
    assert max(count for kind, count in sparse if not kind) == 2


def test_failing_step_ends_its_own_requests() -> None:
    backend = SimulatedRows(4, LENGTH)
    batcher = RowBatcher(backend)
    first = batcher.submit(Request([1], 9))
    batcher.step()
    backend.fail = 1
    turn = batcher.step()
    assert turn is not None
    (event,) = turn.events
    assert isinstance(event, Failed) and event.request == first and str(event.error) == "the engine broke"
    backend.fail = None
    batcher.submit(Request([1], 2))
    while (turn := batcher.step()) is not None:
        assert all(isinstance(event, Token) for event in turn.events)


def test_no_memory_fails_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SimulatedRows(4, LENGTH)

    def allocate(batch: int) -> None:
        raise FasaError("no memory")

    monkeypatch.setattr(backend, "allocate", allocate)
    batcher = RowBatcher(backend)
    batcher.submit(Request([1], 2))
    turn = batcher.step()
    assert turn is not None and [type(event) for event in turn.events] == [Failed]
    assert batcher.step() is None


def test_row_that_overflows_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SimulatedRows(4, LENGTH)
    step = backend.step

    def overflowing(*arguments: Any, **options: Any) -> Any:
        logits = step(*arguments, **options)
        if len(logits) == 2:
            logits[1] = np.inf
        return logits

    monkeypatch.setattr(backend, "step", overflowing)
    batcher = RowBatcher(backend)
    good, bad = (batcher.submit(Request([1, 2], 5)) for _ in range(2))
    failed: list[int] = []
    tokens: list[int] = []
    while (turn := batcher.step()) is not None:
        for event in turn.events:
            (failed if isinstance(event, Failed) else tokens).append(event.request)
    assert failed == [bad] and tokens.count(good) == 5


def test_refused_and_unknown() -> None:
    batcher = RowBatcher(SimulatedRows(2, LENGTH))
    for prompt, count, message in (
        ([], 1, "the prompt is empty"),
        ([1], 0, "max-new-tokens must be at least 1, not 0"),
        ([VOCAB], 1, "token ids go from 0 to 10"),
        ([1] * LENGTH, 1, "the prompt has 30 tokens, this engine holds 30"),
    ):
        with pytest.raises(FasaError, match=message):
            batcher.submit(Request(prompt, count))
    assert not batcher.cancel(5)
    waiting = batcher.submit(Request([1], 1))
    assert batcher.cancel(waiting) and batcher.step() is None
