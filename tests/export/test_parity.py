"""Exported models against transformers and against the reference, for every supported architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fasa_trt.core.spec import REDUCTIONS, SparseSpec
from fasa_trt.export.architectures import ARCHITECTURES
from tests.engines import Exported, decode_steps, export, prefill, reference_steps, relative
from tests.models import VARIANTS

SPEC = SparseSpec(budget=16, n_tip=4, sink=2, recent=4, dense_layers=())
PROMPT, STEPS = 70, 32


def tokens(batch: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 97, (batch, PROMPT + STEPS))


def check_sparse(exported: Exported, ids: np.ndarray) -> np.ndarray:
    """Sparse decode against the reference composed with transformers; returns the reference's logits."""
    prefill(exported.backend, ids[:, :PROMPT])
    got = decode_steps(exported.backend, ids, PROMPT)
    wanted, comparable = reference_steps(exported, ids, PROMPT)
    assert comparable.mean() > 0.3
    assert relative(got[comparable], wanted[comparable]) < 2e-4
    return wanted


def test_every_architecture_has_a_variant() -> None:
    assert {model_type for model_type, _ in VARIANTS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_and_sparse_steps(variant: str, tmp_path: Path) -> None:
    """Dense prefill, in uneven chunks, and dense decode equal transformers; sparse decode equals the reference."""
    exported = export(variant, tmp_path, SPEC)
    ids = tokens()
    wanted = exported.logits(ids)
    got = prefill(exported.backend, ids[:, :PROMPT], chunk=33)
    assert relative(got, wanted[:, :PROMPT]) < 2e-4
    got = decode_steps(exported.backend, ids, PROMPT, sparse=False)
    assert relative(got, wanted[:, PROMPT:]) < 2e-4

    sparse = check_sparse(exported, ids)
    if any(plan.sparse for plan in exported.layers):
        assert relative(sparse, wanted[:, PROMPT:]) > 1e-3, "sparsity changed nothing: the test proves nothing"


@pytest.mark.parametrize("variant", ["llama", "qwen3", "glm4", "olmo2"])
def test_permutation_changes_nothing(variant: str, tmp_path: Path) -> None:
    ids = tokens()
    plain = export(variant, tmp_path / "a", SPEC, with_profile=False)
    baked = export(variant, tmp_path / "b", SPEC)
    assert not any(plan.sparse for plan in plain.layers)
    assert any(plan.sparse for plan in baked.layers)
    assert relative(prefill(baked.backend, ids), prefill(plain.backend, ids)) < 1e-5


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_reductions(reduction: str, kv_heads: int, tmp_path: Path) -> None:
    spec = SparseSpec(budget=16, n_tip=4, sink=2, recent=4, reduction=reduction, dense_layers=(1,))  # type: ignore[arg-type]
    exported = export("llama", tmp_path, spec, num_key_value_heads=kv_heads)
    ids = tokens(1)
    check_sparse(exported, ids[:, : PROMPT + 4])


@pytest.mark.parametrize(("n_tip", "budget"), [(1, 7), (16, 16), (15, 64)])
def test_n_tip_and_budget_edges(n_tip: int, budget: int, tmp_path: Path) -> None:
    spec = SparseSpec(budget=budget, n_tip=n_tip, sink=2, recent=4, dense_layers=())
    exported = export("llama", tmp_path, spec)
    ids = tokens(1)
    check_sparse(exported, ids[:, : PROMPT + 2])
