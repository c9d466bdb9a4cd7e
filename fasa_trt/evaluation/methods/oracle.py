"""The best that any choice of one token set per KV head can do: the tokens that carry the most attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fasa_trt.evaluation.masks import top_mask
from fasa_trt.evaluation.methods.base import Layers, Method, Selector
from fasa_trt.evaluation.steps import Step


@dataclass(frozen=True, kw_only=True)
class Oracle(Method):
    name: ClassVar[str] = "oracle"
    summary: ClassVar[str] = "top-k of the true attention weights, mean over a KV head's query heads"

    def selector(self, layers: Layers, layer: int) -> Selector | None:
        return OracleSelector(self.budget)


class OracleSelector(Selector):
    """Reads every key to choose, so it saves little: it is a bound, not a method to run."""

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def select(self, step: Step) -> Tensor:
        mass = torch.softmax(step.logits, dim=-1).mean(2, keepdim=True)
        return top_mask(mass, step.seen, self.budget)

    def index_bytes(self, lengths: Tensor, token_bytes: int) -> Tensor:
        return (lengths - self.budget).clamp(min=0) * (token_bytes / 2)  # the keys that are not chosen
