"""TriAttention: tokens are evicted by what queries like the ones so far will want at distances to come.

Source: "TriAttention: Efficient Long Reasoning with Trigonometric KV Compression", arXiv 2604.04921. Queries before
RoPE lie around a fixed centre in each frequency chunk f. A key at distance D from the current position scores

    mean over offsets o in 1, 2, 4, ..., 2^16 of  sum_f |E[q_f]| |k_f| cos(w_f (D + o) + phi_f)
    + sum_f (E|q_f| - |E[q_f]|) |k_f|,          phi_f = arg E[q_f] - arg k_f

standardised over the cached keys of each query head, the maximum over a group's heads. The first line is the dot
product of the cached key with one virtual query: the centre, turned to the current position and averaged over the
offsets. Three things differ from the paper, hence "in its style": centres come from the prompt's last queries, not from
other text beforehand; a token is evicted at each step, not many every 128, so that the budget holds; and the prompt is
evicted from as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fasa_trt.core.rope import Rotary
from fasa_trt.evaluation.masks import top_mask
from fasa_trt.evaluation.methods.base import Layers, Method, Selector
from fasa_trt.evaluation.steps import Prompt, Step, dot

OFFSETS = 2.0 ** np.arange(17)


@dataclass(frozen=True, kw_only=True)
class TriAttention(Method):
    name: ClassVar[str] = "triattention"
    summary: ClassVar[str] = "eviction by query centres and distance, in the style of arXiv 2604.04921"

    def selector(self, layers: Layers, layer: int) -> Selector | None:
        return TriSelector(self.budget, layers.rotary(layer), layers.device)


class TriSelector(Selector):
    """alive: bool [B, Hkv, C], prompt tokens that were not evicted, and all columns after the prompt."""

    def __init__(self, budget: int, rotary: Rotary, device: torch.device) -> None:
        self.budget = budget
        self.pairs = torch.as_tensor(rotary.pairs, device=device)
        self.inv_freq = torch.as_tensor(rotary.inv_freq, dtype=torch.float64, device=device)
        self.scaling = torch.as_tensor(rotary.scale, device=device)
        # exp(i w o), its mean over the offsets
        self.ahead = torch.exp(1j * self.inv_freq[:, None] * torch.as_tensor(OFFSETS, device=device)).mean(1)

    def start(self, prompt: Prompt) -> None:
        valid = (prompt.positions >= 0)[:, None, None, :, None]
        turned = self._chunks(prompt.q) * torch.conj(self._turn(prompt.positions)) / self.scaling
        count = valid.sum(3)
        centre = (turned * valid).sum(3) / count  # [B, Hkv, G, F]
        self.centre, self.spread = centre, (turned.abs() * valid).sum(3) / count - centre.abs()
        self.sizes = self._chunks(prompt.k).abs()
        columns = torch.arange(prompt.k.shape[2], device=prompt.k.device)
        in_prompt = columns < prompt.lengths[:, None]
        scores = self._scores(prompt.k, (prompt.lengths - 1)[:, None])[:, :, :, 0]
        kept = self._best(scores, in_prompt[:, None].expand(-1, scores.shape[1], -1), prompt.lengths - 1)
        self.alive = kept | ~in_prompt[:, None]

    def select(self, step: Step) -> Tensor:
        self.sizes[:, :, step.first :] = self._chunks(step.k[:, :, step.first :]).abs()
        scores = self._scores(step.k, step.positions)
        chosen = []
        for t in range(step.positions.shape[1]):
            here = step.positions[:, t]
            later = step.columns > here[:, None, None]  # [B, 1, C]
            kept = self._best(scores[:, :, :, t], self.alive & ~later, here)
            chosen.append(kept)
            self.alive = torch.where(step.valid[:, t, None, None], kept | later, self.alive)
        return torch.stack(chosen, dim=2)[:, :, None]

    def _best(self, scores: Tensor, candidates: Tensor, here: Tensor) -> Tensor:
        """bool [B, Hkv, C]: the `budget` best of the candidates by scores [B, Hkv, G, C], the current token in any
        case."""
        among = candidates[:, :, None]
        count = among.sum(-1, keepdim=True)
        mean = (scores * among).sum(-1, keepdim=True) / count
        deviation = (((scores - mean) * among).square().sum(-1, keepdim=True) / count).sqrt()
        best = ((scores - mean) / deviation.clamp(min=1e-6)).amax(2)
        current = torch.arange(scores.shape[-1], device=scores.device) == here[:, None, None]
        return top_mask(best, candidates, self.budget, current)

    def _scores(self, k: Tensor, positions: Tensor) -> Tensor:
        """float32 [B, Hkv, G, T, C], of all keys [B, Hkv, C, d] at positions [B, T]."""
        query = self.centre[:, :, :, None] * self.scaling * self._turn(positions) * self.ahead.to(torch.complex64)
        virtual = torch.zeros(*query.shape[:-1], k.shape[3], device=k.device)
        virtual[..., self.pairs[:, 0]], virtual[..., self.pairs[:, 1]] = query.real, query.imag
        return dot(virtual, k) + dot((self.spread * self.scaling)[:, :, :, None], self.sizes)

    def _chunks(self, x: Tensor) -> Tensor:
        """complex64 [..., F] from [..., d]."""
        return torch.complex(x[..., self.pairs[:, 0]].float(), x[..., self.pairs[:, 1]].float())

    def _turn(self, positions: Tensor) -> Tensor:
        """complex64 [B, 1, 1, T, F]: RoPE's rotation at positions [B, T]."""
        angle = positions[:, None, None, :, None] * self.inv_freq
        return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
