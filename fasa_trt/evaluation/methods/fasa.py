"""FASA, `core/reference.py` in batches; with the label formats of the CUDA kernels (plugins/kernels/fasa.h)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fasa_trt.core.errors import FasaError
from fasa_trt.core.spec import SAMPLE_EVERY, SAMPLE_RUN, Reduction, Rule, SparseSpec
from fasa_trt.evaluation.masks import top_mask
from fasa_trt.evaluation.methods.base import Layers, Method, Selector
from fasa_trt.evaluation.steps import Prompt, Step, dot

LEVELS = {"int4": 7, "int8": 127}
LABELS = ("prefix", "int8", "int4", "fp8")
SMALLEST, LARGEST = 6.2e-5, 65504.0  # scales of a label row: float16, never 0 nor infinite


@dataclass(frozen=True, kw_only=True)
class Fasa(Method):
    """n_tip: dominant chunks; None takes half of all with quantised labels, 3/8 with "prefix". labels: what tokens are
    scored by: "prefix" the keys' own dims, or a copy of them in int8, int4 or fp8. Others: as in SparseSpec."""

    name: ClassVar[str] = "fasa"
    summary: ClassVar[str] = "dominant frequency chunks score all tokens (arXiv 2602.03152)"
    uses_profile: ClassVar[bool] = True

    dense_layers: int = len(SparseSpec.dense_layers)
    n_tip: int | None = None
    reduction: Reduction = SparseSpec.reduction
    labels: str = "int4"
    rule: Rule = "spread"
    sink: int = 4
    recent: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels not in LABELS:
            raise FasaError(f"unknown labels {self.labels!r}", hint=f"one of {', '.join(LABELS)}")
        self._spec()

    def _spec(self) -> SparseSpec:
        return SparseSpec(
            self.budget, self.n_tip, self.reduction, self.rule, self.sink, self.recent, tuple(range(self.dense_layers))
        )

    def resolved(self, layers: Layers) -> SparseSpec:
        """With n_tip filled in. Raises FasaError when the model has fewer chunks."""
        return self._spec().resolve(
            head_dim=layers.head_dim,
            num_layers=layers.num_layers,
            max_seq_len=max(layers.max_seq_len, self.budget),  # a budget beyond the context is dense, not wrong
            quantised=self.labels != "prefix",
        )

    def facts(self, layers: Layers) -> dict[str, Any]:
        return {"n_tip": self.resolved(layers).n_tip, "dense_layers": self.dense_layers}

    def selector(self, layers: Layers, layer: int) -> Selector | None:
        spec = self.resolved(layers)
        plan = layers.plans(spec)[layer]
        dims = plan.dims()
        assert dims is not None and plan.sparse
        return FasaSelector(torch.as_tensor(dims[:, : plan.label_dims], device=layers.device), spec, self.labels)


class FasaSelector(Selector):
    """dims: int64 [Hkv, 2 n_tip], head dims of each KV head's dominant chunks."""

    def __init__(self, dims: Tensor, spec: SparseSpec, labels: str) -> None:
        self.dims, self.spec, self.labels = dims, spec, labels

    def start(self, prompt: Prompt) -> None:
        self.index = self._labels_of(prompt.k)

    def select(self, step: Step) -> Tensor:
        self.index[:, :, step.first :] = self._labels_of(step.k[:, :, step.first :])
        scores = self._reduce(step)
        return top_mask(scores, step.seen, self.spec.budget, step.ends(self.spec.sink, self.spec.recent))

    def index_bytes(self, lengths: Tensor, token_bytes: int) -> Tensor:
        dims = self.dims.shape[1]
        head_dim = self.head_dim
        row = {"prefix": dims * token_bytes / (2 * head_dim), "int8": dims + 2, "int4": dims / 2 + 2, "fp8": dims}
        return lengths * (lengths > self.spec.budget) * row[self.labels]  # within the budget nothing is scored

    def _labels_of(self, k: Tensor) -> Tensor:
        """float32 [B, Hkv, C, 2 n_tip]: what the labels of keys [B, Hkv, C, d] stand for."""
        self.head_dim = k.shape[3]
        index = self.dims[None, :, None, :].expand(k.shape[0], -1, k.shape[2], -1)
        return quantised(k.gather(3, index).float(), self.labels)

    def _reduce(self, step: Step) -> Tensor:
        """TIP: scores [B, Hkv, 1 or G, T, C]; see `importance` in core/reference.py."""
        batch, _, group, steps, _ = step.q.shape
        q = step.q.gather(4, self.dims[None, :, None, None, :].expand(batch, -1, group, steps, -1)).float()
        if self.spec.reduction == "sum":
            q = q.sum(2, keepdim=True)
        if self.labels in LEVELS:  # the kernels multiply integers
            q = _rounded(q, q.abs().amax(-1, keepdim=True).clamp(min=1e-20) / q.new_tensor(127.0), 127)
        scores = step.scale * dot(q, self.index)
        if self.spec.reduction in ("sum", "per_head"):
            return scores
        if self.spec.reduction == "sampled_softmax":
            counted = scores.masked_fill(~(sampled(step) & scores.isfinite()), -torch.inf)
            return (scores - counted.logsumexp(-1, keepdim=True)).logsumexp(2, keepdim=True)
        weights = torch.softmax(scores.masked_fill(~step.seen, -torch.inf), dim=-1)
        return weights.mean(2, keepdim=True) if self.spec.reduction == "mean_softmax" else weights.amax(2, keepdim=True)


def sampled(step: Step) -> Tensor:
    """bool [B, 1, 1, T, C]: what each step's scores are sampled at; as `sampled` in core/reference.py."""
    run = step.columns // SAMPLE_RUN
    return step.seen & ((run % SAMPLE_EVERY == 0) | (run >= step.at // SAMPLE_RUN - 1))


def quantised(labels: Tensor, kind: str) -> Tensor:
    """float32 [..., 2 n_tip] labels through a format and back; plugins/kernels/append.cu, one scale a row."""
    if kind == "prefix":
        return labels
    if kind == "fp8":
        return labels.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    top = LEVELS[kind]
    largest = labels.abs().amax(-1, keepdim=True)
    return _rounded(labels, (largest / labels.new_tensor(float(top))).clamp(SMALLEST, LARGEST).half().float(), top)


def _rounded(x: Tensor, step: Tensor, top: int) -> Tensor:
    return (x / step).round().clamp(-top, top) * step
