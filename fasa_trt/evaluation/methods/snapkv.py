"""SnapKV: the prompt's last queries vote once for the tokens that stay.

Source: "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469, section 4.1 and listing 1:
attention weights of an observation window, summed over its queries, smoothed by pooling, top-k kept together with the
window. Votes are averaged over the query heads of a group. The paper lets the cache grow while it decodes; here each
new token evicts the one with the fewest votes, later the oldest, so that the budget holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation.cache import TAIL
from fasa_trt.evaluation.masks import top_mask
from fasa_trt.evaluation.methods.base import Layers, Method, Selector
from fasa_trt.evaluation.steps import Prompt, Step, dot

ABOVE_VOTES = 1e6  # no sum of attention weights comes near it, and float32 still counts positions from there


@dataclass(frozen=True, kw_only=True)
class SnapKv(Method):
    """window: queries that vote. kernel: of the pooling, in tokens, odd."""

    name: ClassVar[str] = "snapkv"
    summary: ClassVar[str] = "tokens that the prompt's end attends to (arXiv 2404.14469)"

    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.window <= min(self.budget, TAIL):
            raise FasaError(
                f"snapkv: a window of {self.window} does not fit into a budget of {self.budget}",
                hint=f"raise the budget or set snapkv:window=16; at most {TAIL}",
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise FasaError(f"snapkv: kernel {self.kernel} is not an odd number of tokens")

    def selector(self, layers: Layers, layer: int) -> Selector | None:
        return SnapKvSelector(self.budget, self.window, self.kernel)


class SnapKvSelector(Selector):
    def __init__(self, budget: int, window: int, kernel: int) -> None:
        self.budget, self.window, self.kernel = budget, window, kernel

    def start(self, prompt: Prompt) -> None:
        """Ranks columns for good: votes for the prefix, and above them position, for the window and all that comes."""
        columns = torch.arange(prompt.k.shape[2], device=prompt.k.device)
        positions = prompt.positions[:, None, None, -self.window :, None]
        logits = prompt.scale * dot(prompt.q[..., -self.window :, :], prompt.k)
        weights = torch.softmax(logits.masked_fill(columns > positions.clamp(min=0), -torch.inf), dim=-1)
        votes = (weights * (positions >= 0)).sum(3)  # [B, Hkv, G, C]
        prefix = columns < (prompt.lengths - self.window)[:, None]
        votes = votes.masked_fill(~prefix[:, None, None], 0.0)
        pooled = torch.nn.functional.avg_pool1d(votes.flatten(0, 2)[:, None], self.kernel, 1, self.kernel // 2)
        priority = torch.where(prefix[:, None], pooled.view_as(votes).mean(2), ABOVE_VOTES + columns)
        self.priority = priority[:, :, None, None]  # [B, Hkv, 1, 1, C]

    def select(self, step: Step) -> Tensor:
        steps = step.positions.shape[1]
        return top_mask(self.priority.expand(-1, -1, -1, steps, -1), step.seen, self.budget)
