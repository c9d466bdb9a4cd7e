"""Scripted stretches of serving: sequences join, are prefilled in chunks, decode and leave, in blocks that are shuffled
and reused. The tests run them, and `benchmarks/plugin_driver.py` records them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.plugins.tensorrt import tiny
from tests.plugins.tensorrt.driver import Driver, Layer
from tests.plugins.tensorrt.layers import DENSE, SPARSE
from tests.plugins.tensorrt.serving import Serving, Tables, require

Facts = dict[str, Any]  # what a case says of itself
Case = Callable[[Driver, torch.dtype, str], Facts]  # with the device's name; raises AssertionError
Mapped = tuple[Layer, tuple[int, int]]  # a layer, its pool and its place there
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
HEAD_DIMS = (64, 128)  # that the library needs kernels for
CLEAR_SHARE = 0.6  # of the choices of tokens, at the least

# Steps: tokens of each context sequence, then the generating ones.
STEPS: Sequence[tuple[Mapping[str, int], str]] = (
    ({"a": 40, "b": 7}, ""),
    ({"c": 64}, "ab"),
    ({"d": 100}, "cab"),
    ({"d": 70}, "bca"),
    ({"e": 1, "f": 33}, "adc"),  # b has left, its blocks go to those that come
    ({}, "fdeac"),
    ({"f": 31}, "ed"),  # a chunk after an answer: the next turn of a conversation
    ({}, "fedac"),
    ({"g": 260}, ""),  # long enough, by itself, for the kernels of compute capability 9.0
    ({"g": 150}, ""),
    ({}, "gfedac"),
)
LEAVE = {4: "b"}  # before the step

INT4, INT8, FP8 = ({**SPARSE, "label_kind": kind} for kind in (1, 2, 3))
MIXES: Mapping[str, Sequence[Mapped]] = {
    "prefix": [(SPARSE, (0, 0)), (DENSE, (1, 1)), ({**SPARSE, "n_tip": 32}, (0, 1))],
    "norms": [({**SPARSE, "has_qk_norm": 1}, (0, 1)), ({**DENSE, "has_qk_norm": 1}, (1, 0))],
    "int4": [({**INT4, "n_tip": 32}, (0, 0)), (DENSE, (1, 1)), (INT4, (0, 1))],
    "int8": [(INT8, (1, 1)), (SPARSE, (0, 0))],
    "fp8": [({**FP8, "n_tip": 32}, (1, 0)), (SPARSE, (0, 1))],
}
# head_dim, KV heads, query heads of each, tokens of a block, label kind, n_tip
SHAPES = (
    (128, 8, 1, 32, 1, 32),  # labels that fill a row
    (64, 4, 2, 16, 1, 16),
    (128, 3, 3, 64, 2, 16),
    (64, 2, 4, 32, 3, 24),
    (128, 1, 5, 8, 0, 24),
    (64, 5, 6, 128, 0, 16),
    (64, 1, 7, 16, 2, 32),
    (128, 2, 8, 32, 3, 32),
)


class Inputs:
    """Random queries, keys and values of a layer, and its tables and norms."""

    def __init__(self, layer: Layer, seed: int, dtype: torch.dtype) -> None:
        self.heads, self.kv_heads, self.head_dim = (
            int(layer[name]) for name in ("num_q_heads", "num_kv_heads", "head_dim")
        )
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)
        shape, random = (self.kv_heads, self.head_dim // 2), np.random.default_rng(seed)
        frequency = np.exp(-random.uniform(0, 8, shape)).astype(np.float32)
        self.tables: Tables = (frequency, random.uniform(0.8, 1.2, shape).astype(np.float32))
        both = (self.heads, self.kv_heads) if layer["has_qk_norm"] else ()
        self.norms = [(1 + 0.3 * self._normal(heads)).to(dtype) for heads in both]

    def qkv(self, tokens: int) -> list[Tensor]:
        return [self._normal(tokens, heads).to(self.dtype) for heads in (self.heads, self.kv_heads, self.kv_heads)]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, self.head_dim, generator=self.generator)


def start(driver: Driver, mix: Sequence[Mapped], dtype: torch.dtype, device: str) -> tuple[Serving, list[Inputs]]:
    layers, mapping = zip(*mix, strict=True)
    inputs = [Inputs(layer, seed, dtype) for seed, layer in enumerate(layers)]
    serving = Serving(driver, layers, mapping, [each.tables for each in inputs], dtype=dtype, device=device)
    return serving, inputs


def play(serving: Serving, inputs: Sequence[Inputs]) -> Iterator[None]:
    """Runs a step at a time."""
    for index, (contexts, generating) in enumerate(STEPS):
        for name in LEAVE.get(index, ""):
            serving.leave(name)
        step = serving.step(contexts, generating)
        for layer, each in enumerate(inputs):
            serving.attend(step, layer, each.qkv(sum(step.counts)), each.norms)
        yield


def facts(serving: Serving) -> Facts:
    """Raises AssertionError where too few choices of tokens were clear for the case to say anything."""
    clear = float(np.mean(serving.choices))
    require(clear >= CLEAR_SHARE, f"only {clear:.0%} of the choices of tokens were clear")
    return {"choices": len(serving.choices), "clear": round(clear, 4), "worst": round(serving.worst, 4)}


def trace(mix: Sequence[Mapped]) -> Case:
    def run(driver: Driver, dtype: torch.dtype, device: str) -> Facts:
        serving, inputs = start(driver, mix, dtype, device)
        for _ in play(serving, inputs):
            pass
        return facts(serving)

    return run


def graph(mix: Sequence[Mapped], rounds: int = 40) -> Case:
    """A decode step that is captured once and replayed while its sequences grow, over blocks and over the budget, and
    while one of them gives its row to another."""

    def run(driver: Driver, dtype: torch.dtype, device: str) -> Facts:
        serving, inputs = start(driver, mix, dtype, device)
        for _ in islice(play(serving, inputs), 6):  # f within the budget, and others beyond it
            pass
        names = "fac"
        step = serving.step({}, names)
        calls = [serving.call(step, layer, each.qkv(len(names)), each.norms) for layer, each in enumerate(inputs)]
        replay = serving.capture(calls)
        for turn in range(rounds):
            if turn == rounds // 2:
                serving.leave("a")
                names = "fdc"
            if turn:
                step = serving.step({}, names)
            given = [each.qkv(len(names)) for each in inputs]
            for call, qkv in zip(calls, given, strict=True):
                update(call.inputs, qkv, step.bindings)
                call.out.fill_(float("nan"))
            replay()
            for layer, (call, qkv) in enumerate(zip(calls, given, strict=True)):
                serving.check(step, layer, call, qkv, inputs[layer].norms)
        return {**facts(serving), "replays": rounds}

    return run


def update(inputs: Sequence[Tensor], qkv: Sequence[Tensor], bindings: Sequence[Tensor]) -> None:
    """Overwrites what a graph reads on the device: queries, keys, values, lengths and offsets. What is on the host
    stays as it was captured."""
    for old, new in zip(inputs[:3], qkv, strict=True):
        old.copy_(new)
    for at in (0, 1, 5):  # sequence_length, context_lengths, kv_cache_block_offsets
        inputs[5 + at].copy_(bindings[at])


def shaped(head_dim: int, kv_heads: int, group: int, tokens: int, kind: int, n_tip: int) -> Sequence[Mapped]:
    layer: Layer = {
        **SPARSE, "head_dim": head_dim, "num_kv_heads": kv_heads, "num_q_heads": kv_heads * group,
        "tokens_per_block": tokens, "label_kind": kind, "n_tip": n_tip,
    }  # fmt: skip
    return [(layer, (0, 1))]


CASES: Mapping[str, Case] = {
    **{f"trace, {name}": trace(mix) for name, mix in MIXES.items()},
    **{f"graph, {name}": graph(MIXES[name]) for name in ("prefix", "int4", "fp8")},
    **{
        f"heads {kv_heads} x {group} of {head_dim}, block {tokens}, labels {kind}": trace(
            shaped(head_dim, kv_heads, group, tokens, kind, n_tip)
        )
        for head_dim, kv_heads, group, tokens, kind, n_tip in SHAPES
    },
    **{f"fasa-tiny, {name}": case for name, case in tiny.CASES.items()},
}
