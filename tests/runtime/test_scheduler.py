"""Whatever is batched, preempted, reused or cancelled: every request gets the answer that it would get alone."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.blocks import BlockAllocator
from fasa_trt.runtime.scheduler import Limits, Scheduler
from fasa_trt.runtime.sequence import Preempted, Token
from fasa_trt.runtime.step import Step
from tests.simulated_engine import VOCAB, Client, Server, alone, check_answer


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[Limits, int, int, list[Client]]:
    """Limits, blocks, tokens a block, clients that fit the pool."""
    tokens_per_block = draw(st.sampled_from([1, 2, 4, 8]))
    num_blocks = draw(st.integers(1, 16))
    max_batch_size = draw(st.sampled_from([1, 2, 3, 6]))
    limits = Limits(
        max_batch_size,
        max_batch_size - 1 + tokens_per_block + draw(st.sampled_from([0, 1, 5, 40])),
        draw(st.sampled_from([2, 9, 30, 60])),
        VOCAB,
        preempt=draw(st.booleans()),
        reuse=draw(st.booleans()),
    )
    slots = min(limits.max_seq_len - 1, num_blocks * tokens_per_block)
    stems = draw(st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=slots), min_size=1, max_size=3))
    clients = []
    for _ in range(draw(st.integers(1, 9))):
        stem = draw(st.sampled_from(stems))[: draw(st.integers(0, slots // 2))]
        prompt = (stem + draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4)))[-slots:]
        room = slots - len(prompt) + 1
        client = Client(
            prompt,
            draw(st.sampled_from([1, room // 4 + 1, room, room])),
            draw(st.sampled_from([set(), set(), {0}, {3, 7}])),
            arrival=draw(st.sampled_from([0, 0, 1, 3, 12])),
        )
        if draw(st.integers(0, 3)) == 0:
            client.cancel, client.while_computed = client.arrival + draw(st.integers(0, 12)), draw(st.booleans())
        clients.append(client)
    return limits, num_blocks, tokens_per_block, clients


@settings(deadline=None, max_examples=300)
@given(scenarios(), st.booleans())
def test_every_request_gets_the_answer_it_gets_alone(
    scenario: tuple[Limits, int, int, list[Client]], failing: bool
) -> None:
    limits, num_blocks, tokens_per_block, clients = scenario
    server = Server(limits, num_blocks, tokens_per_block)
    server.run(clients, failing=failing)
    preemptions = sum(client.preempted for client in clients)
    event(f"preemptions: {min(preemptions, 3)}")
    event(f"reused: {server.scheduler.allocator.counters.reused > 0}")
    assert limits.preempt or preemptions == 0
    assert limits.reuse or server.scheduler.allocator.counters.reused == 0
    for client in clients:
        check_answer(client, limits)


def random_clients(rng: random.Random, count: int) -> list[Client]:
    stems = [[rng.randrange(VOCAB) for _ in range(40)] for _ in range(4)]
    return [
        Client(
            rng.choice(stems)[: rng.randrange(40)] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))],
            rng.randint(1, 30),
            arrival=rng.randrange(150),
            cancel=rng.choice([None, None, None, rng.randrange(200)]),
            while_computed=rng.random() < 0.5,
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("preempt", [True, False])
def test_busy_server(preempt: bool) -> None:
    """Much longer than what hypothesis draws: hundreds of requests through a pool that is always too small."""
    limits = Limits(8, 40, 100, VOCAB, preempt=preempt)
    server = Server(limits, 30, 4)
    clients = random_clients(random.Random(8), 250)
    server.run(clients, failing=True)
    for client in clients:
        check_answer(client, limits)
    done = Counter(client.finish for client in clients)
    assert min(done["length"], done["cancelled"]) > 40
    assert server.scheduler.allocator.counters.reused > 300
    assert server.scheduler.allocator.counters.evicted > 300
    preemptions = sum(client.preempted for client in clients)
    assert preemptions > 20 if preempt else preemptions == 0


def test_same_calls_give_the_same_steps() -> None:
    def record() -> list[tuple[tuple[int, ...], bytes, bytes]]:
        server = Server(Limits(8, 40, 100, VOCAB), 30, 4)
        steps = []
        choose = server.scheduler.step

        def recorded() -> Step | None:
            if (step := choose()) is not None:
                steps.append((step.requests, step.input_ids.tobytes(), step.kv_cache_block_offsets.tobytes()))
            return step

        server.scheduler.step = recorded  # type: ignore[method-assign]
        server.run(random_clients(random.Random(2), 60))
        return steps

    assert record() == record()


def test_step_by_step() -> None:
    """A prompt in chunks beside a decoding row, array by array."""
    server = Server(Limits(2, 7, 20, VOCAB), 8, 4)
    scheduler = server.scheduler
    first = scheduler.submit([1, 2, 3], max_new_tokens=5)
    step = scheduler.step()
    assert step is not None
    assert step.requests == (first,)
    assert step.input_ids.tolist() == [1, 2, 3]
    assert scheduler.advance([9]) == [Token(first, 9)]
    second = scheduler.submit([5, 6, 7, 8, 9, 10], max_new_tokens=2)
    step = scheduler.step()
    assert step is not None
    assert step.requests == (second, first)
    assert step.input_ids.tolist() == [5, 6, 7, 8, 9, 10, 9]
    assert step.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 3]
    assert step.last_token_ids.tolist() == [6, 7]
    assert step.context_lengths.tolist() == [6, 3]
    assert step.sequence_length.tolist() == [6, 4]
    assert step.host_past_key_value_lengths.tolist() == [6, 3]
    assert step.host_request_types.tolist() == [0, 1]
    assert step.logit_rows.tolist() == [0, 1]
    assert (step.kv_cache_block_offsets[0, :, 0] // 6).tolist() == [[1, 2, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert scheduler.advance([4, 5]) == [Token(second, 4), Token(first, 5)]
    assert scheduler.cancel(first)
    third = scheduler.submit([1] * 9, max_new_tokens=1)
    step = scheduler.step()
    assert step is not None
    assert step.requests == (third, second)
    assert step.context_lengths.tolist() == [4, 6]  # six tokens are left, one full block of them is taken
    assert step.logit_rows.tolist() == [1]
    assert scheduler.advance([3]) == [Token(second, 3, "length")]
    step = scheduler.step()
    assert step is not None
    assert (step.requests, step.context_lengths.tolist(), step.sequence_length.tolist()) == ((third,), [5], [9])
    assert step.host_past_key_value_lengths.tolist() == [9]
    assert scheduler.advance([2]) == [Token(third, 2, "length")]
    assert scheduler.step() is None


def test_youngest_is_preempted_when_the_pool_is_full() -> None:
    server = Server(Limits(3, 64, 40, VOCAB, reuse=False), 6, 4)
    clients = [Client([i, i + 1, i + 2, i + 3], 16) for i in range(3)]
    server.run(clients)
    assert clients[0].preempted == 0
    assert clients[1].preempted <= clients[2].preempted
    assert clients[2].preempted >= 1
    for client in clients:
        check_answer(client, server.scheduler.limits)


def test_newcomer_leaves_a_block_to_each_that_runs() -> None:
    """Otherwise its prompt would be computed only to be thrown away with the next block that an older one needs."""
    server = Server(Limits(2, 64, 40, VOCAB), 4, 4)
    clients = [Client([1] * 6, 5), Client([2] * 8, 2)]
    server.run(clients)
    assert [client.preempted for client in clients] == [0, 0]
    assert server.engine.computed == (6 + 4) + (8 + 1)


def test_preempted_request_waits_before_younger_ones() -> None:
    server = Server(Limits(2, 64, 40, VOCAB), 5, 4)
    requests = [server.submit(Client([i] * 4, 15)) for i in range(3)]
    while not server.clients[1].preempted:
        server.turn()
    assert [sequence.id for sequence in server.scheduler.running] == requests[:1]
    assert [sequence.id for sequence in server.scheduler.waiting] == requests[1:]


def test_without_preemption_a_request_waits_until_it_fits_to_its_end() -> None:
    server = Server(Limits(2, 64, 40, VOCAB, preempt=False), 5, 4)
    clients = [Client([i] * 4, 9) for i in range(2)]  # three blocks each, in the end
    for client in clients:
        server.submit(client)
    while clients[0].finish is None:
        server.turn()
        assert not clients[1].answer
    while server.turn():
        pass
    for client in clients:
        check_answer(client, server.scheduler.limits)


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("while_computed", [False, True])
def test_cancellation_frees_everything(turns: int, while_computed: bool) -> None:
    """While it waits, in the middle of its prompt, while it decodes; and in the middle of a step."""
    server = Server(Limits(1, 8, 40, VOCAB), 10, 4)
    server.run([Client([3] * 20, 10, cancel=turns, while_computed=while_computed)])
    assert server.scheduler.allocator.sequences == set()
    assert not server.scheduler.cancel(0)
    assert not server.scheduler.cancel(17)


def test_cancelled_request_leaves_the_queue_to_others() -> None:
    server = Server(Limits(1, 8, 40, VOCAB), 10, 4)
    clients = [Client([i], 4) for i in range(3)]
    clients[1].cancel = 1
    server.run(clients)
    assert [client.finish for client in clients] == ["length", "cancelled", "length"]
    assert not clients[1].answer


def fail_when_preempting() -> tuple[Server, int, int]:
    """A server whose engine fails in the step that sends the second of two requests back."""
    server = Server(Limits(2, 64, 40, VOCAB), 3, 4)
    first, second = (server.submit(Client([i] * 3, 9)) for i in range(2))
    while (step := server.scheduler.step()) is not None and not server.scheduler.waiting:
        server.take(server.scheduler.advance(server.engine(step)))
    server.scheduler.abandon()
    return server, first, second


def test_preemption_is_told_although_its_step_failed() -> None:
    server, first, second = fail_when_preempting()
    step = server.scheduler.step()
    assert step is not None
    assert step.requests == (first,)
    assert server.scheduler.advance([1]) == [Preempted(second), Token(first, 1)]
    step = server.scheduler.step()
    assert step is not None
    assert server.scheduler.advance([1]) == [Token(first, 1)]


def test_preemption_of_a_cancelled_request_is_not_told() -> None:
    server, first, second = fail_when_preempting()
    server.scheduler.cancel(second)
    step = server.scheduler.step()
    assert step is not None
    assert server.scheduler.advance([1]) == [Token(first, 1)]


def test_preempted_request_goes_on_when_the_other_is_cancelled_after_a_failure() -> None:
    server, first, second = fail_when_preempting()
    server.scheduler.cancel(first)
    while server.turn():
        pass
    assert server.clients[second].preempted == 1
    check_answer(server.clients[second], server.scheduler.limits)


@pytest.mark.parametrize("preempt", [True, False])
def test_long_request_is_not_starved_by_short_ones(preempt: bool) -> None:
    """Short requests never stop coming; one that needs the whole pool is served within those that came before it."""
    server = Server(Limits(4, 16, 70, VOCAB, preempt=preempt), 16, 4)
    for i in range(8):
        server.submit(Client([i] * 6, 6))
    long = Client([1] * 50, 15)
    server.submit(long)
    for turn in range(200):
        server.submit(Client([turn % VOCAB] * 6, 6))
        server.turn()
        if long.finish:
            break
    assert turn < 80
    check_answer(long, server.scheduler.limits)


def test_prefill_goes_on_beside_a_full_batch_of_decoding_rows() -> None:
    """With the fewest tokens a step that the scheduler accepts, each step computes a block of the prompt."""
    server = Server(Limits(4, 7, 80, VOCAB), 60, 4)
    for i in range(3):
        server.submit(Client([i], 60))
    server.turn()
    server.submit(Client([5] * 16, 1))
    for _ in range(3):
        server.turn()
        assert server.clients[3].finish is None
    server.turn()
    assert server.clients[3].finish == "length"


def test_shared_prefix_is_computed_once() -> None:
    prefix = [i % VOCAB for i in range(32)]
    computed = {}
    for reuse in (True, False):
        limits = Limits(4, 64, 60, VOCAB, reuse=reuse)
        server = Server(limits, 60, 4)
        clients = [Client([*prefix, i, i], 5, arrival=3 * i) for i in range(5)]
        server.run(clients)
        for client in clients:
            check_answer(client, limits)
        computed[reuse] = server.engine.computed
        assert server.scheduler.allocator.counters.reused == (4 * 8 if reuse else 0)
    assert computed[False] - computed[True] == 4 * 32


def test_whole_prompt_in_the_cache_leaves_its_last_block_to_compute() -> None:
    server = Server(Limits(1, 64, 60, VOCAB), 60, 4)
    server.run([Client([5] * 16, 1)])
    server.run([Client([5] * 16, 1)])
    assert server.engine.computed == 16 + 4
    assert server.clients[0].answer == server.clients[1].answer


def test_decoded_tokens_are_not_reused() -> None:
    """Their keys and values come from sparse attention: a prompt that holds them is computed densely."""
    server = Server(Limits(1, 64, 60, VOCAB), 60, 4)
    first = Client([5] * 6, 20)
    server.run([first])
    computed = server.engine.computed
    server.run([Client([*first.prompt, *first.answer], 1)])
    assert server.engine.computed - computed == 6 + 20 - 4


def test_answer_ends_with_the_engines_length() -> None:
    server = Server(Limits(1, 64, 12, VOCAB), 60, 4)
    client = Client([5] * 6, 1000)
    server.run([client])
    assert (len(client.answer), client.finish) == (6, "length")


def test_stop_id_is_the_last_token() -> None:
    prompt = [5] * 6
    answer = alone(prompt, 20, set(), 60)
    client = Client(prompt, 20, {answer[4]})
    Server(Limits(1, 64, 60, VOCAB), 60, 4).run([client])
    assert client.finish == "eos"
    assert client.answer == answer[: answer.index(answer[4]) + 1]


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens", "message"),
    [
        ([], 1, "prompt is empty"),
        ([1], 0, "at least 1"),
        ([1, VOCAB], 1, "from 0 to 10"),
        ([1, -1], 1, "from 0 to 10"),
        ([1] * 50, 1, "50 tokens, this engine holds 50"),
        ([1] * 41, 1, "41 tokens of KV cache, the pool holds 40"),
        ([1] * 30, 12, "41 tokens of KV cache, the pool holds 40"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(prompt: list[int], max_new_tokens: int, message: str) -> None:
    server = Server(Limits(2, 64, 50, VOCAB), 10, 4)
    with pytest.raises(FasaError, match=message):
        server.scheduler.submit(prompt, max_new_tokens=max_new_tokens)
    assert server.scheduler.step() is None
    largest = Client([1] * 30, 11)
    server.run([largest])
    check_answer(largest, server.scheduler.limits)


def test_too_few_tokens_a_step_are_refused() -> None:
    with pytest.raises(FasaError, match="at least 11"):
        Scheduler(Limits(8, 10, 50), BlockAllocator(10, 4))
    Scheduler(Limits(8, 11, 50), BlockAllocator(10, 4))


def test_prompt_may_be_an_array() -> None:
    server = Server(Limits(1, 64, 60, VOCAB), 60, 4)
    scheduler = server.scheduler
    scheduler.submit(np.asarray([1, 2, 3]), max_new_tokens=1)  # type: ignore[arg-type]
    step = scheduler.step()
    assert step is not None
    assert scheduler.advance(np.asarray([4])) == [Token(0, 4, "length")]  # type: ignore[arg-type]


def test_mistakes_of_the_caller() -> None:
    scheduler = Server(Limits(1, 64, 60, VOCAB), 60, 4).scheduler
    with pytest.raises(ValueError, match="0 tokens for a step"):
        scheduler.advance([])
    scheduler.submit([1], max_new_tokens=3)
    scheduler.step()
    with pytest.raises(ValueError, match="not finished"):
        scheduler.step()
    with pytest.raises(ValueError, match="2 tokens for a step that asks for 1"):
        scheduler.advance([1, 2])
    assert scheduler.advance([1]) == [Token(0, 1)]
