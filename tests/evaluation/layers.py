"""Random layers for the tests of methods, and masks brought down to sets of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fasa_trt.core.errors import FasaError
from fasa_trt.core.rope import Rotary, chunk_pairs
from fasa_trt.core.spec import SparseSpec
from fasa_trt.evaluation.cache import TAIL
from fasa_trt.evaluation.methods.base import Selector
from fasa_trt.evaluation.steps import Prompt, Step
from fasa_trt.export.plan import LayerPlan

B, HKV, G, D, C = 2, 2, 3, 16, 120
LENGTHS = (83, 70)  # of the two rows' prompts
SCALE = 0.3


@dataclass
class RandomLayer:
    """A layer of two rows whose prompts differ in length: k float32 [B, Hkv, C, d], q [B, Hkv, G, C, d], a query at
    every position. Stands for the model as well (methods.base.Layers)."""

    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    head_dim: int = D
    num_layers: int = 1
    num_kv_heads: int = HKV
    max_seq_len: int = 4096

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.k = torch.randn(B, HKV, C, D, generator=generator)
        self.q = torch.randn(B, HKV, G, C, D, generator=generator)
        self.order = np.stack([np.random.default_rng(self.seed + head).permutation(D // 2) for head in range(HKV)])

    def rotary(self, layer: int) -> Rotary:
        inv_freq = (10000.0 ** -(np.arange(D // 2) / (D // 2))).astype(np.float32)
        return Rotary(chunk_pairs(D, D, interleaved=False), inv_freq, np.full(D // 2, 1.25, np.float32))

    def plans(self, spec: SparseSpec) -> list[LayerPlan]:
        if spec.rule != "spread":
            raise FasaError("no such ranking")
        assert spec.n_tip is not None
        return [LayerPlan(0, self.rotary(0), self.order, spec.n_tip, None)]

    def prompt(self) -> Prompt:
        """What a method sees of it at the end of prefill."""
        positions = torch.tensor(LENGTHS)[:, None] - TAIL + torch.arange(TAIL)
        tails = torch.zeros(B, HKV, G, TAIL, D)
        for row, length in enumerate(LENGTHS):
            tails[row, :, :, TAIL - length :] = self.q[row, :, :, :length]
        keys = self.k.clone()
        for row, length in enumerate(LENGTHS):
            keys[row, :, length:] = 1e3  # what an earlier branch left there
        return Prompt(keys, torch.tensor(LENGTHS), tails, positions, SCALE)

    def step(self, first: int, count: int) -> Step:
        """`count` steps of each row, the first of them `first` tokens after its prompt."""
        positions = torch.tensor(LENGTHS)[:, None] + first + torch.arange(count)
        q = torch.stack([self.q[row, :, :, positions[row]] for row in range(B)])
        valid = torch.ones(B, count, dtype=torch.bool)
        return Step(q, self.k, positions, valid, int(positions.min()), SCALE)

    def chosen(self, selector: Selector, first: int = 0, count: int = 8) -> Tensor:
        """bool [B, Hkv, G, count, C]: what a fresh selector takes in `count` steps at once after the prompt."""
        selector.start(self.prompt())
        step = self.step(first, count)
        return (selector.select(step) & step.seen).expand(B, HKV, G, count, C)


def tokens_of(mask: Tensor) -> list[int]:
    """Ascending columns of a mask [C]."""
    return [int(column) for column in mask.nonzero()[:, 0]]
