"""A simulated engine with a real paged pool, and a server around scheduler and engine.

A slot holds a number that depends on its token and on the slot before it, as keys and values do; the next token depends
on every slot that the block table shows. A wrong block, position or length, or a slot that is reused but was not
computed, gives another answer.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fasa_trt.core.contract import INPUTS
from fasa_trt.runtime.blocks import BlockAllocator
from fasa_trt.runtime.scheduler import Limits, Scheduler
from fasa_trt.runtime.sequence import Event, Preempted
from fasa_trt.runtime.step import Step

VOCAB = 11
MODULUS = 2**31 - 1
LAYERS = (3, 2)  # two memory pools


def cell(before: int, token: int) -> int:
    """What a slot holds."""
    return (before * 1_000_003 + token + 1) % MODULUS


def attend(cells: list[int]) -> int:
    """The next token."""
    return sum((i + 1) * value for i, value in enumerate(cells)) % 7919 % VOCAB


def alone(prompt: list[int], max_new_tokens: int, stop_ids: set[int], max_seq_len: int) -> list[int]:
    """The answer of one request without a scheduler."""
    cells = list(itertools.accumulate(prompt, cell, initial=0))[1:]
    answer: list[int] = []
    while True:
        answer.append(attend(cells))
        if answer[-1] in stop_ids or len(answer) == max_new_tokens or len(prompt) + len(answer) == max_seq_len:
            return answer
        cells.append(cell(cells[-1], answer[-1]))


class Engine:
    """Runs steps over its pool, and checks each against the limits and the contract."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.limits, allocator = scheduler.limits, scheduler.allocator
        self.tokens_per_block, self.num_blocks = allocator.tokens_per_block, allocator.num_blocks
        self.pool = np.random.default_rng(1).integers(0, MODULUS, (self.num_blocks, self.tokens_per_block))
        self.computed = self.steps = 0

    def __call__(self, step: Step) -> list[int]:
        self.check(step)
        before = self.pool.copy()  # what is reused must have been there before the step
        rows: list[tuple[tuple[Any, ...], list[int]]] = []
        for s, tokens in enumerate(np.split(step.input_ids, step.last_token_ids[:-1])):
            past = int(step.sequence_length[s]) - len(tokens)
            blocks = step.kv_cache_block_offsets[0, s, 0] // (2 * LAYERS[0])
            slots = np.arange(past + len(tokens))
            where = blocks[slots // self.tokens_per_block], slots % self.tokens_per_block
            cells = before[where][:past].tolist()
            cells += list(itertools.accumulate(tokens.tolist(), cell, initial=cells[-1] if past else 0))[1:]
            self.pool[where[0][past:], where[1][past:]] = cells[past:]
            rows.append((where, cells))
        for where, cells in rows:
            assert self.pool[where].tolist() == cells, "a row wrote where another one reads"
        self.computed += len(step.input_ids)
        self.steps += 1
        return [attend(rows[s][1]) for s in step.logit_rows]

    def check(self, step: Step) -> None:
        size, total = len(step.requests), len(step.input_ids)
        for name, value in vars(step).items():
            if name not in ("requests", "logit_rows"):
                assert value.dtype == INPUTS[name].dtype and value.ndim == len(INPUTS[name].shape), name
        assert 1 <= size <= self.limits.max_batch_size
        assert size <= total <= self.limits.max_num_tokens
        assert len(set(step.requests)) == size
        kinds, context = step.host_request_types, step.num_context_rows
        assert kinds.tolist() == [0] * context + [1] * (size - context)
        counts = np.diff(step.last_token_ids, prepend=0)
        assert (counts >= 1).all() and (counts[context:] == 1).all() and step.last_token_ids[-1] == total
        assert (step.context_lengths[:context] == counts[:context]).all()
        assert (step.context_lengths[context:] < step.sequence_length[context:]).all()
        assert (step.host_past_key_value_lengths == step.sequence_length - kinds).all()
        assert (step.sequence_length < self.limits.max_seq_len).all()
        for positions, end in zip(
            np.split(step.position_ids, step.last_token_ids[:-1]), step.sequence_length, strict=True
        ):
            assert positions.tolist() == list(range(end - len(positions), end))
        assert set(range(context, size)) <= set(step.logit_rows.tolist())
        for s in set(range(context)) - set(step.logit_rows.tolist()):
            assert step.sequence_length[s] % self.tokens_per_block == 0, "a chunk ends within a block"
        columns = -(-self.limits.max_seq_len // self.tokens_per_block)
        assert step.kv_cache_block_offsets.shape == (len(LAYERS), size, 2, columns)
        for s, length in enumerate(step.sequence_length):
            offsets = step.kv_cache_block_offsets[:, s, :, : -(-length // self.tokens_per_block)]
            blocks = offsets[0, 0] // (2 * LAYERS[0])
            assert len(set(blocks.tolist())) == len(blocks) and (blocks < self.num_blocks).all()
            for pool, layers in enumerate(LAYERS):
                assert (offsets[pool] == blocks * 2 * layers + [[0], [1]]).all()


@dataclass
class Client:
    """A request, when it comes and goes (in steps), and what came back."""

    prompt: list[int]
    max_new_tokens: int = 8
    stop_ids: set[int] = field(default_factory=set)
    arrival: int = 0
    cancel: int | None = None
    while_computed: bool = False  # cancelled between step and advance
    answer: list[int] = field(default_factory=list)
    finish: str | None = None
    preempted: int = 0


class Server:
    """Drives a scheduler and an engine as a runtime does, and hands the events to the clients."""

    def __init__(self, limits: Limits, num_blocks: int, tokens_per_block: int) -> None:
        self.scheduler = Scheduler(limits, BlockAllocator(num_blocks, tokens_per_block, layers_in_pool=LAYERS))
        self.engine = Engine(self.scheduler)
        self.clients: dict[int, Client] = {}
        self.rng = random.Random(3)

    def submit(self, client: Client) -> int:
        request = self.scheduler.submit(
            client.prompt, max_new_tokens=client.max_new_tokens, stop_ids=frozenset(client.stop_ids)
        )
        self.clients[request] = client
        return request

    def cancel(self, now: int, *, while_computed: bool) -> None:
        for request, client in self.clients.items():
            if client.cancel is not None and client.cancel <= now and client.while_computed == while_computed:
                alive = client.finish is None
                assert self.scheduler.cancel(request) == alive
                client.finish = client.finish or "cancelled"

    def turn(self, now: int = 0, *, failing: bool = False) -> bool:
        """One step; False when there is nothing to do. failing: the engine fails at first, now and then."""
        self.cancel(now, while_computed=False)
        step = self.scheduler.step()
        self.scheduler.check()
        if step is not None and failing and self.rng.random() < 0.2:
            self.engine(step)  # whatever it got done
            self.scheduler.abandon()
            step = self.scheduler.step()
        if step is None:
            assert not self.scheduler.running and not self.scheduler.waiting
            return False
        tokens = self.engine(step)
        self.cancel(now, while_computed=True)
        self.take(self.scheduler.advance(tokens))
        self.scheduler.check()
        return True

    def take(self, events: list[Event]) -> None:
        for item in events:
            client = self.clients[item.request]
            assert client.finish is None, "an event of a request that is over"
            if isinstance(item, Preempted):
                client.preempted += 1
            else:
                client.answer.append(item.token)
                client.finish = item.finish

    def run(self, clients: list[Client], *, failing: bool = False) -> None:
        """Serves clients, submitted at their arrivals, until all are done."""
        coming = sorted(clients, key=lambda client: client.arrival)
        for now in itertools.count():
            while coming and coming[0].arrival <= now:
                self.submit(coming.pop(0))
            if not self.turn(now, failing=failing) and not coming:
                break
        assert self.scheduler.allocator.free_blocks == self.scheduler.allocator.num_blocks


def check_answer(client: Client, limits: Limits) -> None:
    expected = alone(client.prompt, client.max_new_tokens, client.stop_ids, limits.max_seq_len)
    if client.finish == "cancelled":
        assert client.answer == expected[: len(client.answer)]
    else:
        assert client.answer == expected
        assert client.finish == ("eos" if expected[-1] in client.stop_ids else "length")
