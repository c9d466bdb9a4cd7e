"""Which layers become sparse, and in what order their chunks go."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasa_trt.core.checkpoint import Checkpoint, open_checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.core.profile import Profile
from fasa_trt.core.spec import SparseSpec
from fasa_trt.export.plan import LayerPlan, plan_layers
from tests.engines import random_profile
from tests.models import make_model

SPEC = SparseSpec(budget=40, n_tip=5, dense_layers=())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_model("llama", tmp_path_factory.mktemp("llama")))


def checkpoint(variant: str, tmp_path: Path, **overrides: Any) -> Checkpoint:
    return open_checkpoint(make_model(variant, tmp_path / "model", **overrides))


def plans(checkpoint: Checkpoint, spec: SparseSpec = SPEC, *, max_seq_len: int = 128) -> list[LayerPlan]:
    return plan_layers(checkpoint, random_profile(checkpoint), spec, max_seq_len=max_seq_len)


def sparse_layers(layers: list[LayerPlan]) -> list[int]:
    return [plan.index for plan in layers if plan.sparse]


def test_every_layer_is_sparse(llama: Checkpoint) -> None:
    profile = random_profile(llama)
    layers = plans(llama)
    assert [plan.index for plan in layers] == sparse_layers(layers) == [0, 1, 2]
    for plan in layers:
        assert (plan.n_tip, plan.label_dims, plan.window) == (5, 10, None)
        np.testing.assert_array_equal(plan.order, profile.ranking("spread", budget=40)[plan.index])


def test_one_dominant_chunk_is_enough(llama: Checkpoint) -> None:
    layers = plans(llama, SparseSpec(budget=40, n_tip=1, dense_layers=()))
    assert sparse_layers(layers) == [0, 1, 2]
    assert layers[0].label_dims == 2


@pytest.mark.parametrize("rule", ["spread", "agreement", "greedy"])
def test_order_follows_the_rule(rule: Any, llama: Checkpoint) -> None:
    rng = np.random.default_rng(5)
    greedy = rng.permuted(np.tile(np.arange(16, dtype=np.int32), (3, 2, 1)), axis=-1)
    tables = rng.random((2, 3, 4, 16), np.float32)
    profile = dataclasses.replace(random_profile(llama), greedy=greedy, agreement=tables, ks=(64, 1024))
    spec = SparseSpec(budget=1000, n_tip=5, rule=rule, dense_layers=())
    layers = plan_layers(llama, profile, spec, max_seq_len=2000)
    wanted = profile.ranking(rule, budget=1000)
    assert all((plan.order == wanted[plan.index]).all() for plan in layers)


def test_greedy_that_was_not_computed(llama: Checkpoint) -> None:
    with pytest.raises(FasaError, match="no greedy order .*--greedy"):
        plans(llama, SparseSpec(budget=40, n_tip=5, rule="greedy", dense_layers=()))


def test_dense_layers_keep_their_natural_order(llama: Checkpoint) -> None:
    layers = plans(llama, SparseSpec(budget=40, n_tip=5, dense_layers=(0, 2)))
    assert sparse_layers(layers) == [1]
    for index in (0, 2):
        assert (layers[index].n_tip, layers[index].label_dims) == (0, 0)
        np.testing.assert_array_equal(layers[index].order, np.tile(np.arange(16), (2, 1)))


def test_without_a_profile_everything_is_dense(llama: Checkpoint) -> None:
    layers = plan_layers(llama, None, SPEC, max_seq_len=128)
    assert sparse_layers(layers) == []
    assert all((plan.order == np.arange(16)).all() for plan in layers)


def test_dims_start_with_the_dominant_pairs(llama: Checkpoint) -> None:
    """Llama rotates dims i and i + 16 together."""
    for plan in plans(llama):
        dims = plan.dims()
        assert dims is not None and dims.shape == (2, 32)
        for g in range(2):
            assert sorted(dims[g].tolist()) == list(range(32))
            for place, chunk in enumerate(plan.order[g].tolist()):
                assert dims[g, 2 * place : 2 * place + 2].tolist() == [chunk, chunk + 16]


def test_layers_without_rope_stay_dense_and_as_they_are(tmp_path: Path) -> None:
    smollm = checkpoint("smollm3", tmp_path)
    layers = plans(smollm)
    assert sparse_layers(layers) == [0, 1, 2, 4]
    assert layers[3].rotary is None and layers[3].dims() is None


@pytest.mark.parametrize(
    ("max_seq_len", "window", "sparse"), [(128, 24, []), (25, 24, []), (24, None, [0, 1, 2]), (20, None, [0, 1, 2])]
)
def test_window_counts_while_it_is_shorter_than_the_capacity(
    max_seq_len: int, window: int | None, sparse: list[int], tmp_path: Path
) -> None:
    layers = plans(checkpoint("mistral-sliding", tmp_path), max_seq_len=max_seq_len)
    assert sparse_layers(layers) == sparse
    assert {plan.window for plan in layers} == {window}


def test_windows_by_layer(tmp_path: Path) -> None:
    gemma = checkpoint("gemma3", tmp_path)
    layers = plans(gemma)
    kinds = gemma.config.layer_types
    assert [plan.window for plan in layers] == [24 if kind == "sliding_attention" else None for kind in kinds]
    assert sparse_layers(layers) == [i for i, kind in enumerate(kinds) if kind == "full_attention"] != []


def test_frequencies_are_those_of_the_capacity(tmp_path: Path) -> None:
    """LongRoPE's long factors beyond 64 positions."""
    phi = checkpoint("phi3-longrope", tmp_path)
    short, long = (plans(phi, max_seq_len=length)[0].rotary for length in (64, 65))
    assert short is not None and long is not None
    assert (short.inv_freq[1:12] > long.inv_freq[1:12]).all()


def test_profile_of_another_model(llama: Checkpoint) -> None:
    other = dataclasses.replace(random_profile(llama), fingerprint="0" * 64)
    with pytest.raises(FasaError, match="calibrated on another model .*fasa-trt calibrate"):
        plan_layers(llama, other, SPEC, max_seq_len=128)


def test_profile_with_tables_of_another_shape(llama: Checkpoint) -> None:
    profile: Profile = random_profile(llama)
    smaller = dataclasses.replace(profile, spread=profile.spread[:2])
    with pytest.raises(FasaError, match=r"the profile's tables are \(2, 2, 16\), the model needs \(3, 2, 16\)"):
        plan_layers(llama, smaller, SPEC, max_seq_len=128)
