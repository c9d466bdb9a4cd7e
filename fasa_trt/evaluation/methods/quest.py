"""Quest: pages of the cache are ranked by an upper bound of their attention logits.

Source: "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv 2406.10774, section 3.3,
algorithm 1. The paper has a query head for each KV head; here a page's bounds are summed over the query heads of a
group, so that it reads one token set per KV head as the others do. The current page is always taken, as in the
paper's kernels. The paper leaves the first two layers dense: `quest:dense_layers=2`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation.masks import top_mask
from fasa_trt.evaluation.methods.base import Layers, Method, Selector
from fasa_trt.evaluation.steps import Prompt, Step, dot


@dataclass(frozen=True, kw_only=True)
class Quest(Method):
    """page: tokens of a page."""

    name: ClassVar[str] = "quest"
    summary: ClassVar[str] = "pages by an upper bound of their logits (arXiv 2406.10774)"

    page: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.page <= self.budget:
            raise FasaError(
                f"quest: pages of {self.page} tokens do not fit into a budget of {self.budget}",
                hint="raise the budget or set quest:page=8",
            )

    def selector(self, layers: Layers, layer: int) -> Selector | None:
        return QuestSelector(self.budget, self.page)


class QuestSelector(Selector):
    def __init__(self, budget: int, page: int) -> None:
        self.budget, self.page = budget, page

    def start(self, prompt: Prompt) -> None:
        self.low, self.high = self._bounds(prompt.k)

    def select(self, step: Step) -> Tensor:
        first = step.first // self.page  # earlier pages have not changed
        self.low[:, :, first:], self.high[:, :, first:] = self._bounds(step.k[:, :, first * self.page :])
        q = step.q.float()
        bound = (dot(q.clamp(min=0), self.high) + dot(q.clamp(max=0), self.low)).sum(2, keepdim=True)
        pages = torch.arange(bound.shape[-1], device=q.device)
        current = step.at // self.page
        chosen = top_mask(bound, pages <= current, self.budget // self.page, pages == current)
        tokens = chosen.repeat_interleave(self.page, dim=-1)[..., : step.k.shape[2]]
        return (tokens | (step.at < self.budget)) & step.seen  # a context within the budget is attended to in full

    def index_bytes(self, lengths: Tensor, token_bytes: int) -> Tensor:
        return (lengths > self.budget) * torch.ceil(lengths / self.page) * token_bytes  # two rows like keys a page

    def _bounds(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest value of each dim: float32 [B, Hkv, pages, d]. Of a page whose end is not written yet they
        are wrong; that page is the current one, which is not ranked."""
        batch, kv_heads, columns, head_dim = k.shape
        missing = -columns % self.page
        if missing:
            k = torch.cat([k, k[:, :, -1:].expand(-1, -1, missing, -1)], dim=2)
        paged = k.float().view(batch, kv_heads, -1, self.page, head_dim)
        return paged.amin(3), paged.amax(3)
