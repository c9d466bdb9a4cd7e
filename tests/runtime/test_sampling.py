"""Which tokens may be drawn, how often, and that draws can be repeated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime import sampling as rules
from fasa_trt.runtime.sampling import Sampling, sample

Array = NDArray[Any]


def distribution(logits: Array, **options: Any) -> dict[int, float]:
    """Probability of each token that may be drawn."""
    tokens, probabilities = rules.distribution(logits, Sampling(**{"temperature": 1.0, **options}))
    return dict(zip(tokens.tolist(), probabilities.tolist(), strict=True))


def brute_distribution(
    logits: Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> dict[int, float]:
    """Token by token, in exact steps: top-k, then top-p, then min-p."""
    x = logits.astype(np.float64) / temperature
    weights = {token: float(np.exp(x[token] - x.max())) for token in range(len(x))}
    ranked = sorted(weights, key=lambda token: (-logits[token], token))
    kept = ranked if top_k == 0 else ranked[:top_k]
    total = sum(weights[token] for token in kept)
    mass, nucleus = 0.0, []
    for token in kept:
        nucleus.append(token)
        mass += weights[token] / total
        if top_p < 1 and mass >= top_p:
            break
    final = [token for token in nucleus if weights[token] >= min_p * weights[nucleus[0]]]
    total = sum(weights[token] for token in final)
    return {token: weights[token] / total for token in final}


def random_logits(seed: int, size: int = 50) -> Array:
    return (np.random.default_rng(seed).normal(size=size) * 3).astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 5.0},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 50},
        {"top_k": 1000},
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"top_p": 1e-9},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 10, "top_p": 0.8},
        {"top_p": 0.95, "min_p": 0.1},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.9, "min_p": 0.2},
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_distribution(options: dict[str, Any], seed: int) -> None:
    logits = random_logits(seed)
    got, wanted = distribution(logits, **options), brute_distribution(logits, **options)
    assert got.keys() == wanted.keys()
    for token, probability in wanted.items():
        assert got[token] == pytest.approx(probability)


def test_top_p_is_the_smallest_set_that_reaches_it() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125]))
    assert list(distribution(logits, top_p=0.5)) == [0]
    assert list(distribution(logits, top_p=0.51)) == [0, 1]
    assert list(distribution(logits, top_p=0.75)) == [0, 1]
    assert list(distribution(logits, top_p=0.8)) == [0, 1, 2]
    assert list(distribution(logits, top_p=1.0)) == [0, 1, 2, 3]


def test_top_p_of_one_keeps_even_what_rounding_would_drop() -> None:
    assert list(distribution(np.array([0.0, -50.0, -60.0]), top_p=1.0)) == [0, 1, 2]


def test_top_p_counts_what_top_k_left() -> None:
    logits = np.log(np.array([0.4, 0.2, 0.2, 0.2]))
    assert list(distribution(logits, top_k=2, top_p=0.6)) == [0], "0.4 of the 0.6 that are left is two thirds"


def test_min_p_is_relative_to_the_likeliest() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    assert list(distribution(logits, min_p=0.29)) == [0, 1, 2]
    assert list(distribution(logits, min_p=0.31)) == [0, 1]


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = np.array([0.0, -np.inf, 1.0, -np.inf], np.float32)
    generator = np.random.default_rng(0)
    assert {sample(logits, Sampling(temperature=1.0), generator) for _ in range(200)} == {0, 2}


wild = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20).map(
    lambda x: np.array(x, np.float32)
)


@settings(deadline=None)
@given(
    wild,
    st.floats(0, exclude_min=True),
    st.integers(0, 30),
    st.floats(0, 1, exclude_min=True),
    st.floats(0, 1),
    st.integers(0, 9),
)
def test_any_setting_yields_a_token_that_it_allows(
    logits: Array, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    sampling = Sampling(temperature, top_k, top_p, min_p)
    token = sample(logits, sampling, np.random.default_rng(seed))
    rank = int((logits > logits[token]).sum())
    assert 0 <= token < len(logits)
    assert top_k == 0 or rank < top_k


# --- greedy ---


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert sample(np.array([1, 3, 3, 2], np.float32), Sampling(), np.random.default_rng()) == 1


def test_greedy_draws_nothing() -> None:
    sampling = Sampling(temperature=0, top_k=1, top_p=0.1, min_p=0.5)
    assert sample(random_logits(0), sampling, None) == int(random_logits(0).argmax())  # type: ignore[arg-type]


def test_cold_sampling_is_greedy() -> None:
    logits = random_logits(3)
    for temperature in (1e-3, 1e-30, 5e-324):
        token = sample(logits, Sampling(temperature=temperature), np.random.default_rng(0))
        assert token == int(logits.argmax())


# --- draws ---


def test_frequencies_follow_the_probabilities() -> None:
    """Chi-square over 20000 draws; 10 degrees of freedom exceed 35 once in ten thousand seeds."""
    logits = random_logits(1, size=11)
    generator = np.random.default_rng(0)
    draws = 20_000
    counts = np.bincount([sample(logits, Sampling(3.0), generator) for _ in range(draws)], minlength=11)
    expected = np.array([brute_distribution(logits, 3.0)[token] for token in range(11)]) * draws
    assert ((counts - expected) ** 2 / expected).sum() < 35


def draws(sampling: Sampling, rows: int, steps: int = 20) -> list[list[int]]:
    logits = random_logits(5)
    return [[sample(logits, sampling, generator) for _ in range(steps)] for generator in sampling.generators(rows)]


def test_seed_repeats() -> None:
    sampling = Sampling(temperature=2.0, seed=7)
    assert draws(sampling, 3) == draws(sampling, 3)
    assert draws(sampling, 3) != draws(Sampling(temperature=2.0, seed=8), 3)


def test_rows_do_not_depend_on_their_number_and_differ() -> None:
    sampling = Sampling(temperature=2.0, seed=7)
    assert draws(sampling, 5)[:2] == draws(sampling, 2)
    first, second = draws(sampling, 2)
    assert first != second


def test_without_a_seed_draws_differ() -> None:
    assert draws(Sampling(temperature=5.0), 1, steps=100) != draws(Sampling(temperature=5.0), 1, steps=100)


# --- refused ---


def test_limits_are_allowed() -> None:
    sampling = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=1.0, seed=0)
    assert len(sampling.generators(2)) == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_numbers(temperature: float, value: float) -> None:
    logits = random_logits(0)
    logits[7] = value
    with pytest.raises(FasaError, match=r"logits are not finite numbers \(build the engine with another --dtype\)"):
        sample(logits, Sampling(temperature), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1 is out of range"),
        ({"temperature": float("nan")}, "temperature nan is out of range"),
        ({"top_k": -1}, "top-k -1 is out of range"),
        ({"top_p": 0.0}, "top-p 0.0 is out of range"),
        ({"top_p": 1.01}, "top-p 1.01 is out of range"),
        ({"min_p": -0.01}, "min-p -0.01 is out of range"),
        ({"min_p": 1.01}, "min-p 1.01 is out of range"),
        ({"seed": -1}, "seed -1 is out of range"),
    ],
)
def test_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FasaError, match=f"{message} .*temperature, top-k"):
        Sampling(**options)


def test_draws_are_numpys_own() -> None:
    """Seeds keep their meaning: the same token as `Generator.choice` over the same distribution."""
    for seed in range(50):
        logits, options = random_logits(seed), Sampling(0.8, top_k=20, top_p=0.9)
        tokens, probabilities = rules.distribution(logits, options)
        chosen = tokens[np.random.default_rng(seed).choice(len(tokens), p=probabilities)]
        assert sample(logits, options, np.random.default_rng(seed)) == chosen
