"""Every wrong choice is refused with a reason; every default is filled in."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasa_trt.core.errors import FasaError
from fasa_trt.core.spec import REDUCTIONS, RULES, SparseSpec

MODEL: dict[str, Any] = {"head_dim": 128, "num_layers": 32, "max_seq_len": 4096}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0}, r"budget must be at least 1 token, not 0"),
        ({"budget": -5}, r"budget must be at least 1 token, not -5"),
        ({"reduction": "median"}, r"unknown reduction 'median' \(one of sum, .*, sampled_softmax, per_head\)"),
        ({"rule": "best"}, r"unknown rule 'best' \(one of spread, agreement, greedy\)"),
        ({"sink": -1}, r"sink -1 and recent 32 are not possible"),
        ({"recent": 0}, r"sink 4 and recent 0 .*always attends to itself"),
        ({"budget": 35}, r"sink 4 \+ recent 32 tokens do not fit into a budget of 35 \(raise --budget"),
    ],
)
def test_impossible(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FasaError, match=message):
        SparseSpec(**fields)


def test_defaults() -> None:
    spec = SparseSpec()
    assert (spec.budget, spec.sink, spec.recent, spec.n_tip, spec.dense_layers) == (256, 4, 32, None, (0,))
    assert (spec.reduction, spec.rule) == ("sum", "spread")


def test_forced_tokens_may_fill_the_budget() -> None:
    assert SparseSpec(budget=36).budget == 36
    assert SparseSpec(budget=1, sink=0, recent=1).recent == 1


@pytest.mark.parametrize(("head_dim", "n_tip"), [(128, 24), (64, 12), (256, 48), (96, 18), (20, 3), (4, 1), (2, 1)])
def test_default_n_tip_is_three_eighths(head_dim: int, n_tip: int) -> None:
    assert SparseSpec().resolve(**{**MODEL, "head_dim": head_dim}).n_tip == n_tip


@pytest.mark.parametrize(("head_dim", "n_tip"), [(128, 32), (64, 16), (2, 1)])
def test_quantised_labels_have_more_chunks(head_dim: int, n_tip: int) -> None:
    assert SparseSpec().resolve(**{**MODEL, "head_dim": head_dim}, quantised=True).n_tip == n_tip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_tip": 0}, r"n-tip 0 is out of range: this model's heads have 64 frequency chunks \(1 to 64\)"),
        ({"n_tip": 65}, r"n-tip 65 is out of range"),
        ({"n_tip": -1}, r"n-tip -1 is out of range"),
        ({"budget": 4097}, r"budget 4097 is larger than the engine's capacity of 4096 tokens \(lower --budget"),
        ({"dense_layers": (0, 32)}, r"dense layer 32 does not exist: the model has 32 \(0 to 31\)"),
        ({"dense_layers": (-1,)}, r"dense layer -1 does not exist"),
    ],
)
def test_beyond_the_model(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FasaError, match=message):
        SparseSpec(**fields).resolve(**MODEL)


def test_limits_are_allowed() -> None:
    spec = SparseSpec(n_tip=64, budget=4096, dense_layers=(31, 0, 31))
    assert spec.resolve(**MODEL) == SparseSpec(n_tip=64, budget=4096, dense_layers=(0, 31))
    assert SparseSpec(n_tip=1).resolve(**MODEL).n_tip == 1


specs = st.builds(
    SparseSpec,
    budget=st.integers(20, 999),
    n_tip=st.none() | st.integers(1, 64),
    reduction=st.sampled_from(REDUCTIONS),
    rule=st.sampled_from(RULES),
    sink=st.integers(0, 10),
    recent=st.integers(1, 10),
    dense_layers=st.lists(st.integers(0, 31)).map(tuple),
)


@settings(deadline=None)
@given(specs)
def test_json_round_trip(spec: SparseSpec) -> None:
    assert SparseSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@settings(deadline=None)
@given(specs)
def test_resolving_changes_nothing_else_and_only_once(spec: SparseSpec) -> None:
    resolved = spec.resolve(**MODEL)
    assert resolved.resolve(**MODEL) == resolved
    same = {"n_tip": spec.n_tip, "dense_layers": spec.dense_layers}
    assert dataclasses.replace(resolved, **same) == spec  # type: ignore[arg-type]


COMPLETE = SparseSpec().to_json()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**COMPLETE, "bugdet": 1}, "bugdet"),
        ({key: value for key, value in COMPLETE.items() if key != "sink"}, "sink"),
        ({**COMPLETE, "budget": "many"}, "not a sparse specification"),
        ({**COMPLETE, "dense_layers": 3}, "not a sparse specification"),
        (["budget"], "not a sparse specification"),
        (None, "not a sparse specification"),
    ],
)
def test_not_a_specification(fields: Any, message: str) -> None:
    with pytest.raises(FasaError, match=message):
        SparseSpec.from_json(fields)


def test_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SparseSpec().budget = 1  # type: ignore[misc]
