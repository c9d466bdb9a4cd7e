"""One request on its way through the scheduler, and what the scheduler tells of it."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Literal

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.blocks import extend_chain

FinishReason = Literal["eos", "length"]


@dataclass(frozen=True)
class Token:
    """A sampled token. finish: "eos" (it is a stop id) or "length" when it is the request's last one."""

    request: int
    token: int
    finish: FinishReason | None = None


@dataclass(frozen=True)
class Preempted:
    """The request waits again, with the tokens it has; none of them is sampled anew."""

    request: int


Event = Token | Preempted


def check_prompt(prompt: Tokens[int], max_new_tokens: int, *, max_seq_len: int, vocab_size: int) -> None:
    """Raises FasaError for what an engine can never serve: no prompt, unknown tokens, or one that does not fit."""
    if not len(prompt):
        raise FasaError("the prompt is empty", hint="pass some text")
    if max_new_tokens < 1:
        raise FasaError(f"max-new-tokens must be at least 1, not {max_new_tokens}")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise FasaError(f"token ids go from 0 to {vocab_size - 1}", hint="use this engine's tokenizer")
    if len(prompt) >= max_seq_len:
        raise FasaError(
            f"the prompt has {len(prompt)} tokens, this engine holds {max_seq_len} with the answer",
            hint="shorten it, or build with a larger --max-seq-len",
        )


@dataclass(eq=False)
class Sequence:
    """tokens: prompt and answer. Of these the cache holds the first `computed`.

    The first `context` tokens go through the model as context, in chunks; later ones one by one, each as soon as it is
    sampled. That is the prompt, and after a preemption also the part of the answer that had been given by then.
    """

    id: int
    tokens: list[int]
    max_tokens: int  # of prompt and answer together
    stop_ids: frozenset[int] = frozenset()
    context: int = 0
    computed: int = 0
    chain: list[bytes] = field(default_factory=list)  # digests of full blocks of tokens, see blocks.py

    @property
    def decoding(self) -> bool:
        return self.computed >= self.context

    @property
    def max_slots(self) -> int:
        """Tokens that the cache holds at most: all but the last one, which nothing attends to any more."""
        return self.max_tokens - 1

    def reusable(self, tokens_per_block: int) -> list[bytes]:
        """Digests of the blocks that may come from the cache: not the last token, whose logits are asked for."""
        extend_chain(self.chain, self.tokens, tokens_per_block)
        return self.chain[: (len(self.tokens) - 1) // tokens_per_block]

    def publishable(self, tokens_per_block: int) -> list[bytes]:
        """Digests of the blocks that other sequences may use.

        Only what was computed as context, which attends densely: keys and values of decoded tokens come from sparse
        attention, and would make another request's answer depend on which requests came before it.
        """
        return self.chain[: min(self.computed, self.context) // tokens_per_block]

    def push(self, token: int) -> FinishReason | None:
        """Appends a sampled token; why the sequence ends with it, if it does."""
        self.tokens.append(token)
        if token in self.stop_ids:
            return "eos"
        return "length" if len(self.tokens) >= self.max_tokens else None
