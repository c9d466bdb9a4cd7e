"""Choosing the next token from logits, on the host and reproducibly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasa_trt.core.errors import FasaError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; otherwise top_k, top_p and min_p cut the distribution, in that order, before a draw.

    top_k: keep the k likeliest (0: all). top_p: keep the fewest whose probabilities reach p. min_p: keep those at least
    min_p times as likely as the likeliest. seed: None draws differently every time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, fits in (
            ("temperature", self.temperature, self.temperature >= 0),
            ("top-k", self.top_k, self.top_k >= 0),
            ("top-p", self.top_p, 0 < self.top_p <= 1),
            ("min-p", self.min_p, 0 <= self.min_p <= 1),
            ("seed", self.seed, self.seed is None or self.seed >= 0),
        ):
            if not fits:
                raise FasaError(
                    f"{name} {value} is out of range", hint="temperature, top-k, seed >= 0; 0 < top-p <= 1; min-p <= 1"
                )

    def generators(self, rows: int) -> list[np.random.Generator]:
        """One generator a row, so that a row's draws do not depend on its neighbours."""
        return [np.random.default_rng(child) for child in np.random.SeedSequence(self.seed).spawn(rows)]


NOT_FINITE = -1  # instead of a token


@dataclass(frozen=True)
class Draw:
    """How one token is chosen. uniform: a number in [0, 1), the only chance in it."""

    sampling: Sampling
    uniform: float


def draw(sampling: Sampling, generator: np.random.Generator) -> Draw:
    """For the next token of a row. Greedy rows draw nothing."""
    return Draw(sampling, generator.random() if sampling.temperature else 0.0)


def choose(logits: NDArray[np.float32], draw: Draw) -> int:
    """One token id from logits [vocab]; -inf forbids a token. Ties go to the lower id when greedy.

    NOT_FINITE for logits that are not numbers, such as those of a model that overflows in float16.
    """
    sampling = draw.sampling
    if not np.isfinite(logits.max()):
        return NOT_FINITE
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    tokens, probabilities = distribution(logits, sampling)
    below = np.cumsum(probabilities)  # the way of numpy's Generator.choice
    return int(tokens[np.searchsorted(below / below[-1], draw.uniform, side="right")])


def distribution(logits: NDArray[np.float32], sampling: Sampling) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The tokens that may be drawn from logits [vocab], the likeliest first, and the probability of each."""
    order = np.argsort(-logits, kind="stable")
    ranked = logits[order].astype(np.float64)
    keep = len(order) if sampling.top_k == 0 else min(sampling.top_k, len(order))
    with np.errstate(over="ignore"):  # at very low temperatures
        probabilities = _normalised(np.exp((ranked[:keep] - ranked[0]) / sampling.temperature))
    if sampling.top_p < 1:
        keep = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
        probabilities = _normalised(probabilities[:keep])
    probabilities = _normalised(probabilities[probabilities >= sampling.min_p * probabilities[0]])
    return order[: len(probabilities)], probabilities


def sample(logits: NDArray[np.float32], sampling: Sampling, generator: np.random.Generator) -> int:
    """`choose` with the generator's next number. Raises FasaError for logits that are not numbers."""
    token = choose(logits, draw(sampling, generator))
    if token == NOT_FINITE:
        raise not_finite()
    return token


def not_finite() -> FasaError:
    return FasaError("the model's logits are not finite numbers", hint="build the engine with another --dtype")


def _normalised(weights: NDArray[Any]) -> NDArray[Any]:
    return weights / weights.sum()
