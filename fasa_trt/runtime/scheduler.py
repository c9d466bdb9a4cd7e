"""In-flight batching: which sequences the next step computes, and with how many tokens each.

    scheduler = Scheduler(Limits(max_batch_size=8, max_num_tokens=2048, max_seq_len=4096), BlockAllocator(512, 64))
    request = scheduler.submit(prompt, max_new_tokens=100, stop_ids=eos)
    while (step := scheduler.step()) is not None:
        tokens = sample(engine(step))                 # one for each of step.logit_rows
        for event in scheduler.advance(tokens): ...

Requests are served in the order of their numbers. Those that run are always older than those that wait, and only the
youngest that runs is ever sent back: the oldest request makes progress in every step, so every request gets its turn.
The scheduler draws nothing and reads no clock: the same calls give the same steps. It is not thread-safe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.blocks import BlockAllocator, require
from fasa_trt.runtime.sequence import Event, Preempted, Sequence, Token, check_prompt
from fasa_trt.runtime.step import Row, Step, pack


@dataclass(frozen=True)
class Limits:
    """What the engine was built for. max_seq_len: tokens of prompt and answer together.

    preempt: admit a request as soon as its prompt fits the pool, and when the pool is full send the youngest one back,
    to be computed again later. That fills the pool best, but what a sequence had decoded sparsely is then computed as
    dense context, which can change how its answer goes on. False admits a request only when the pool is sure to hold
    it to its end; then what others ask decides neither which tokens are decoded sparsely nor which come densely.
    reuse: compute a prefix that several prompts share only once.
    """

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    vocab_size: int = 2**31
    preempt: bool = True
    reuse: bool = True


class Scheduler:
    """Raises FasaError when the limits leave no room for a block of context beside a full batch of decoding rows."""

    def __init__(self, limits: Limits, allocator: BlockAllocator) -> None:
        if limits.max_num_tokens < (needed := limits.max_batch_size - 1 + allocator.tokens_per_block):
            raise FasaError(
                f"{limits.max_num_tokens} tokens a step are too few for batches of {limits.max_batch_size} "
                f"in blocks of {allocator.tokens_per_block}",
                hint=f"at least {needed}: build with a larger --max-num-tokens or a smaller --max-batch-size",
            )
        self.limits, self.allocator = limits, allocator
        self.max_blocks = allocator.blocks_for(limits.max_seq_len)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # the oldest first
        self._rows: list[Row] = []  # of the step that is being computed
        self._preempted: list[int] = []  # not told yet
        self._next_id = 0

    def submit(self, prompt: Tokens[int], *, max_new_tokens: int, stop_ids: Collection[int] = ()) -> int:
        """Queues a request and returns its number. An answer that reaches max_seq_len ends there, with "length".

        Raises FasaError as `check_request` does.
        """
        tokens = [int(token) for token in prompt]
        self.check_request(tokens, max_new_tokens)
        sequence = Sequence(self._next_id, tokens, self._max_tokens(tokens, max_new_tokens), frozenset(stop_ids))
        self._next_id += 1
        self.waiting.append(sequence)
        return sequence.id

    def check_request(self, prompt: Tokens[int], max_new_tokens: int) -> None:
        """Raises FasaError for what can never be served. Reads only what never changes, so any thread may ask."""
        limits, allocator = self.limits, self.allocator
        check_prompt(prompt, max_new_tokens, max_seq_len=limits.max_seq_len, vocab_size=limits.vocab_size)
        slots = self._max_tokens(prompt, max_new_tokens) - 1
        if allocator.blocks_for(slots) > allocator.num_blocks:
            raise FasaError(
                f"prompt and answer may take {slots} tokens of KV cache, "
                f"the pool holds {allocator.num_blocks * allocator.tokens_per_block}",
                hint="shorten the prompt, lower --max-new-tokens or give the pool more memory",
            )

    def cancel(self, request: int) -> bool:
        """Drops a request, also while a step computes it; no event speaks of it again. False when it is not alive."""
        for queue in (self.running, self.waiting):
            for sequence in queue:
                if sequence.id == request:
                    self._drop(sequence)
                    return True
        return False

    def step(self) -> Step | None:
        """Chooses the next step; None when nothing runs or waits. Each step is answered by one `advance`."""
        if self._rows:
            raise ValueError("the step before is not finished: call advance or abandon")
        generation = self._generation_rows()
        context = self._context_rows(self.limits.max_num_tokens - len(generation))
        self._rows = [*context, *generation]
        return pack(context, generation, self.allocator, self.max_blocks) if self._rows else None

    def advance(self, tokens: Tokens[int]) -> list[Event]:
        """Takes the token sampled for each of the step's logit_rows. Preemptions of the step come first."""
        yielding = sum(row.yields for row in self._rows)
        if not self._rows or len(tokens) != yielding:
            raise ValueError(f"{len(tokens)} tokens for a step that asks for {yielding}")
        rows, sampled = self._rows, iter(tokens)
        events: list[Event] = [Preempted(request) for request in self._preempted]
        self._rows, self._preempted = [], []
        alive = {sequence.id for sequence in self.running}
        for row in rows:
            sequence, token = row.sequence, int(next(sampled)) if row.yields else None
            if sequence.id not in alive:  # cancelled while it was computed
                continue
            sequence.computed = row.end
            self.allocator.publish(sequence.id, sequence.publishable(self.allocator.tokens_per_block))
            if token is not None:
                finish = sequence.push(token)
                events.append(Token(sequence.id, token, finish))
                if finish:
                    self._drop(sequence)
        return events

    def abandon(self) -> None:
        """Forgets the step that was being computed, say because the engine failed; `step` then chooses it anew."""
        self._rows = []

    def check(self) -> None:
        """Raises AssertionError unless queues, batch and blocks agree."""
        self.allocator.check()
        numbers = [sequence.id for sequence in (*self.running, *self.waiting)]
        held = {sequence.id: self.allocator.held(sequence.id) for sequence in self.running}
        require(numbers == sorted(set(numbers)), "requests are out of order")
        require(len(self.running) <= self.limits.max_batch_size, "the batch is too large")
        require(self.allocator.sequences == held.keys(), "others than those that run hold blocks")
        require(all(sequence.computed == 0 for sequence in self.waiting), "one that waits has something in the cache")
        for sequence in self.running:
            fits = self.allocator.blocks_for(sequence.computed) <= held[sequence.id] <= self.max_blocks
            require(fits, f"{sequence.id} has too few or too many blocks")

    def _max_tokens(self, prompt: Tokens[int], max_new_tokens: int) -> int:
        return min(len(prompt) + max_new_tokens, self.limits.max_seq_len)

    def _generation_rows(self) -> list[Row]:
        """One token of each decoding sequence, the oldest first; makes room for it."""
        rows: list[Row] = []
        for sequence in self.running:  # which loses its last ones meanwhile
            if not sequence.decoding:
                continue
            while not self.allocator.append(sequence.id, sequence.computed + 1):
                self._preempt(victim := self.running[-1])
                if victim is sequence:
                    return rows
            rows.append(Row(sequence, 1))
        return rows

    def _context_rows(self, budget: int) -> list[Row]:
        """Chunks of up to `budget` tokens: first of the sequences that run, then of those that can join them."""
        rows = []
        for sequence in self.running:
            if not sequence.decoding and (count := self._chunk(sequence.context - sequence.computed, budget)):
                rows.append(Row(sequence, count))
                budget -= count
        while self.waiting and len(self.running) < self.limits.max_batch_size:
            if not (count := self._admit(self.waiting[0], budget)):
                break
            self.running.append(self.waiting.popleft())
            rows.append(Row(self.running[-1], count))
            budget -= count
        return rows

    def _chunk(self, remaining: int, budget: int) -> int:
        """Tokens of the next chunk: all that remain, or full blocks of them."""
        return remaining if remaining <= budget else budget - budget % self.allocator.tokens_per_block

    def _admit(self, sequence: Sequence, budget: int) -> int:
        """Gives a waiting sequence its blocks; tokens of its first chunk, 0 when it has to wait on."""
        chain = sequence.reusable(self.allocator.tokens_per_block) if self.limits.reuse else []
        context = len(sequence.tokens)
        count = self._chunk(context - self.allocator.match(chain) * self.allocator.tokens_per_block, budget)
        if not count:
            return 0
        reused = self.allocator.allocate(sequence.id, context, chain, spare=self._spare(sequence))
        if reused is None:
            return 0
        sequence.context, sequence.computed = context, reused
        return count

    def _spare(self, sequence: Sequence) -> int:
        """Blocks that have to stay free when a sequence is admitted, so that it need not soon be sent back."""
        if self.limits.preempt:
            return len(self.running)  # the next block of each
        blocks_for = self.allocator.blocks_for
        missing = sum(blocks_for(other.max_slots) - self.allocator.held(other.id) for other in self.running)
        return missing + blocks_for(sequence.max_slots) - blocks_for(len(sequence.tokens))

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.allocator.free(sequence.id)
        sequence.context = sequence.computed = 0
        self.waiting.appendleft(sequence)
        self._preempted.append(sequence.id)

    def _drop(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
            self.allocator.free(sequence.id)
        else:
            self.waiting.remove(sequence)
        self._preempted = [request for request in self._preempted if request != sequence.id]
