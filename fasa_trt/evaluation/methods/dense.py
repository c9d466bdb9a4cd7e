"""Full attention: what all others are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fasa_trt.evaluation.methods.base import Layers, Method, Selector


@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    name: ClassVar[str] = "dense"
    summary: ClassVar[str] = "full attention"
    uses_budget: ClassVar[bool] = False

    budget: int = 1  # of no meaning

    def selector(self, layers: Layers, layer: int) -> Selector | None:
        return None
