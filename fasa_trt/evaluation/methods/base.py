"""What a method is: options that the user gives, and for each layer a selector that chooses tokens."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fasa_trt.core.errors import FasaError
from fasa_trt.core.rope import Rotary
from fasa_trt.core.spec import SparseSpec
from fasa_trt.evaluation.steps import Prompt, Step
from fasa_trt.export.plan import LayerPlan


class Layers(Protocol):
    """What methods need to know of a model."""

    @property
    def device(self) -> torch.device: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def max_seq_len(self) -> int:
        """Tokens that a position may reach."""

    def rotary(self, layer: int) -> Rotary:
        """Of a layer that has RoPE."""

    def plans(self, spec: SparseSpec) -> list[LayerPlan]:
        """Each layer's dominant chunks. Raises FasaError without a calibration profile of this model."""


class Selector:
    """Chooses the tokens of one layer, for one batch of documents. Evicting methods keep what is left in here."""

    def start(self, prompt: Prompt) -> None:
        """Called once, when the prompt has been read."""

    @abstractmethod
    def select(self, step: Step) -> Tensor:
        """bool [B, Hkv, G or 1, T, C] or broadcastable to it: what each step attends to, within its seen columns."""

    def index_bytes(self, lengths: Tensor, token_bytes: int) -> Tensor | float:
        """Bytes read per KV head and step to choose among `lengths` tokens, beyond the chosen tokens themselves.
        token_bytes: of a cached key and value."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Method:
    """budget: tokens attended per KV head and step. dense_layers: how many first layers attend to everything."""

    budget: int
    dense_layers: int = 0

    name: ClassVar[str]
    summary: ClassVar[str]
    uses_budget: ClassVar[bool] = True
    uses_profile: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.budget < 1 or self.dense_layers < 0:
            raise FasaError(f"{self.name}: budget and dense_layers must not be negative, and budget not 0")

    @abstractmethod
    def selector(self, layers: Layers, layer: int) -> Selector | None:
        """A fresh one for a layer with RoPE and without a sliding window; None to attend to everything.

        Raises FasaError for what the model does not allow.
        """

    def facts(self, layers: Layers) -> dict[str, Any]:
        """What a record should tell beside the label, with defaults filled in."""
        return {}

    @property
    def options(self) -> dict[str, Any]:
        """All of them but the budget, defaults too: a label's meaning, which a later version may change."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "budget"}

    @property
    def label(self) -> str:
        """The method as `--methods` takes it: its name, and the options that are not the default."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return ":".join([self.name, *(f"{key}={value}" for key, value in options.items() if key != "budget")])
