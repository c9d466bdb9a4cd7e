"""What the user decides about sparsity: one small record that travels from the command line to the kernel."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, Literal, get_args

from fasa_trt.core.errors import FasaError

Reduction = Literal["sum", "mean_softmax", "max_softmax", "sampled_softmax", "per_head"]
Rule = Literal["spread", "agreement", "greedy"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
REDUCTION_CODES = {"sum": 0, "per_head": 1, "mean_softmax": 2, "max_softmax": 3, "sampled_softmax": 4}  # in fasa.h
RULES: tuple[str, ...] = get_args(Rule)

# `sampled_softmax` estimates normalisers from runs of SAMPLE_RUN tokens, one run in SAMPLE_EVERY.
SAMPLE_RUN, SAMPLE_EVERY = 16, 32


def usual_n_tip(head_dim: int, *, quantised: bool) -> int:
    """Frequency chunks that score: half of them where labels are quantised, which costs little (32 for head_dim 128),
    else 3/8 (24). Measured: docs/quality.md."""
    chunks = head_dim // 2
    return max(1, chunks // 2 if quantised else chunks * 3 // 8)


@dataclass(frozen=True)
class SparseSpec:
    """How a decode step chooses the tokens that it attends to.

    budget: tokens attended per KV head and step (N_fac), forced ones included.
    n_tip: dominant frequency chunks scored per KV head; None takes `usual_n_tip`.
    reduction: how the query heads of a group share one token set: a token's score is the sum of the heads' scores
        (`sum`), the mean or maximum of their softmaxes over all tokens (`mean_softmax`, `max_softmax`), or that mean
        with normalisers estimated from a sample of the tokens (`sampled_softmax`), which needs no pass over all of
        them first. `per_head` gives each head a token set of its own, as in the paper.
    rule: how calibration ranks frequency chunks.
    sink, recent: tokens at the start and at the end of the context that are always attended.
    dense_layers: layers that attend to everything. By default the first, as in the paper's code: selection can cost
        most there. Measured: docs/quality.md.
    """

    budget: int = 256
    n_tip: int | None = None
    reduction: Reduction = "sum"
    rule: Rule = "spread"
    sink: int = 4
    recent: int = 32
    dense_layers: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if self.budget <= 0:
            raise FasaError(f"budget must be at least 1 token, not {self.budget}", hint="256 is a good start")
        if self.reduction not in REDUCTIONS:
            raise FasaError(f"unknown reduction {self.reduction!r}", hint=f"one of {', '.join(REDUCTIONS)}")
        if self.rule not in RULES:
            raise FasaError(f"unknown rule {self.rule!r}", hint=f"one of {', '.join(RULES)}")
        if self.sink < 0 or self.recent < 1:
            raise FasaError(
                f"sink {self.sink} and recent {self.recent} are not possible",
                hint="sink >= 0, and recent >= 1 because a token always attends to itself",
            )
        if self.sink + self.recent > self.budget:
            raise FasaError(
                f"sink {self.sink} + recent {self.recent} tokens do not fit into a budget of {self.budget}",
                hint="raise --budget or lower --sink and --recent",
            )

    def resolve(self, *, head_dim: int, num_layers: int, max_seq_len: int, quantised: bool = False) -> SparseSpec:
        """The same choice with every default filled in and checked against a model. quantised: the labels.

        Raises FasaError when the model or the engine's capacity cannot honour it.
        """
        chunks = head_dim // 2
        n_tip = usual_n_tip(head_dim, quantised=quantised) if self.n_tip is None else self.n_tip
        if not 1 <= n_tip <= chunks:
            raise FasaError(
                f"n-tip {n_tip} is out of range: this model's heads have {chunks} frequency chunks",
                hint=f"1 to {chunks}",
            )
        if self.budget > max_seq_len:
            raise FasaError(
                f"budget {self.budget} is larger than the engine's capacity of {max_seq_len} tokens",
                hint="lower --budget or raise --max-seq-len",
            )
        wrong = [layer for layer in self.dense_layers if not 0 <= layer < num_layers]
        if wrong:
            raise FasaError(
                f"dense layer {wrong[0]} does not exist: the model has {num_layers}", hint=f"0 to {num_layers - 1}"
            )
        return SparseSpec(**{**asdict(self), "n_tip": n_tip, "dense_layers": tuple(sorted(set(self.dense_layers)))})

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "dense_layers": list(self.dense_layers)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> SparseSpec:
        """Raises FasaError on unknown or missing fields."""
        try:
            missing = [field.name for field in dataclass_fields(cls) if field.name not in fields]
            if missing:
                raise TypeError(f"{missing[0]} is missing")
            return cls(**{**fields, "dense_layers": tuple(fields["dense_layers"])})
        except TypeError as error:
            raise FasaError(f"not a sparse specification: {error}") from None
