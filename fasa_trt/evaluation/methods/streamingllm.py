"""StreamingLLM: attention sinks and the most recent tokens, nothing in between.

Source: "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, section 3.2. Tokens keep the
positions that they were cached with; the paper numbers them anew inside its window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation.methods.base import Layers, Method, Selector
from fasa_trt.evaluation.steps import Step


@dataclass(frozen=True, kw_only=True)
class StreamingLlm(Method):
    """sink: first tokens that stay; the paper's four."""

    name: ClassVar[str] = "streamingllm"
    summary: ClassVar[str] = "attention sinks and recent tokens (arXiv 2309.17453)"

    sink: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sink < self.budget:
            raise FasaError(f"streamingllm: {self.sink} sinks do not fit into a budget of {self.budget}")

    def selector(self, layers: Layers, layer: int) -> Selector | None:
        return StreamingSelector(self.budget, self.sink)


class StreamingSelector(Selector):
    def __init__(self, budget: int, sink: int) -> None:
        self.budget, self.sink = budget, sink

    def select(self, step: Step) -> Tensor:
        return step.ends(self.sink, self.budget - self.sink) & step.seen
