"""The CUDA decode step against the reference in float64, on fresh random inputs. Needs a GPU and nvcc."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fasa_trt.core.spec import REDUCTIONS
from tests.plugins.checks import DTYPES, GROUPS, HEAD_DIMS, KINDS, check
from tests.plugins.paged import make_case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ragged_batch(kind: str, dtype: torch.dtype, reduction: str) -> None:
    check(make_case([1, 255, 256, 257, 1000, 9001], kind=kind, dtype=dtype, reduction=reduction, seed=1))


@pytest.mark.parametrize("n_tip", [8, 16, 24, 32, 48, 64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["sum", "mean_softmax"])
def test_n_tip(kind: str, n_tip: int, reduction: str) -> None:
    check(make_case([3000, 777], kind=kind, n_tip=n_tip, reduction=reduction, seed=n_tip))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("kv_heads", "group"), GROUPS)
@pytest.mark.parametrize("reduction", ["sum", "per_head", "max_softmax"])
def test_heads(head_dim: int, kv_heads: int, group: int, reduction: str) -> None:
    seed = head_dim + group
    check(make_case([1500, 40], head_dim=head_dim, kv_heads=kv_heads, group=group, reduction=reduction, seed=seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (3, 3), (2, 8), (2, 9), (2, 16), (32, 4)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_heads_of_prefixes(dtype: torch.dtype, kv_heads: int, group: int, reduction: str) -> None:
    """They are the columns of a tensor-core product: eight, or twice eight, in either type."""
    check(
        make_case(
            [1500, 40], kind="prefix", n_tip=16, kv_heads=kv_heads, group=group, dtype=dtype, reduction=reduction,
            seed=group,
        )
    )  # fmt: skip


@pytest.mark.parametrize(("kv_heads", "group"), [(8, 8), (32, 4), (5, 7), (12, 3), (32, 3), (8, 16)])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("reduction", ["per_head", "mean_softmax"])
def test_more_heads_than_a_warp_has_lanes(kind: str, kv_heads: int, group: int, reduction: str) -> None:
    check(make_case([700, 300], kind=kind, kv_heads=kv_heads, group=group, head_dim=64, reduction=reduction, seed=2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_most_heads_with_the_longest_labels(kind: str, reduction: str) -> None:
    check(make_case([500], kind=kind, kv_heads=32, group=4, n_tip=64, reduction=reduction, seed=3))


@pytest.mark.parametrize("budget", [16, 17, 64, 100, 256, 512, 1000, 1024, 2048, 4096])
@pytest.mark.parametrize("length", [5000, 20000])
@pytest.mark.parametrize("reduction", ["sum", "max_softmax"])
def test_budget(budget: int, length: int, reduction: str) -> None:
    lengths = [length, budget - 1, budget, budget + 1]
    check(make_case(lengths, budget=budget, sink=2, recent=8, reduction=reduction, seed=budget))


@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (0, 64), (63, 1), (20, 44)])
@pytest.mark.parametrize("length", [65, 3000])
def test_sink_and_recent(sink: int, recent: int, length: int) -> None:
    """Up to the point where no token is free."""
    check(make_case([length], budget=64, sink=sink, recent=recent, kv_heads=4, seed=sink))


@pytest.mark.parametrize("tokens", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", ["int4", "prefix"])
def test_pool_layout(tokens: int, layers: int, kind: str) -> None:
    lengths = [tokens - 1, tokens, 20 * tokens + 1, 40 * tokens, 4097]
    check(make_case(lengths, kind=kind, tokens=tokens, layers=layers, layer=layers - 1, budget=64, seed=tokens))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_softcap(reduction: str) -> None:
    check(make_case([2000, 100], softcap=3.0, reduction=reduction, seed=5))


@pytest.mark.parametrize("kind", KINDS)
def test_many_sequences(kind: str) -> None:
    """More rows than blocks of threads fit on a GPU."""
    check(make_case([40 + 11 * (seq % 50) for seq in range(300)], kind=kind, kv_heads=1, budget=64, seed=6))


@pytest.mark.parametrize("kind", ["int4", "prefix"])
def test_offsets_beyond_two_to_the_31(kind: str) -> None:
    """Blocks all over a pool of more than 2^31 elements."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    check(make_case([5000], kind=kind, kv_heads=8, tokens=128, spare_blocks=9000, seed=12))
    torch.cuda.empty_cache()


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    head_dim = data.draw(st.sampled_from(HEAD_DIMS), "head_dim")
    n_tip = data.draw(st.sampled_from([8, 16, 24, 32, 48, 64]), "n_tip")
    kv_heads, group = data.draw(st.integers(1, 6), "kv_heads"), data.draw(st.integers(1, 16), "group")
    budget = data.draw(st.integers(16, 600), "budget")
    sink = data.draw(st.integers(0, budget - 1), "sink")
    tokens = data.draw(st.sampled_from([8, 16, 32, 64, 128]), "tokens")
    layers = data.draw(st.integers(1, 2), "layers")
    assume(2 * n_tip <= head_dim)
    case = make_case(
        data.draw(st.lists(st.integers(1, 3000), min_size=1, max_size=4), "lengths"),
        kind=data.draw(st.sampled_from(KINDS), "kind"),
        reduction=data.draw(st.sampled_from(REDUCTIONS), "reduction"),
        dtype=data.draw(st.sampled_from(DTYPES), "dtype"),
        recent=data.draw(st.integers(1, budget - sink), "recent"),
        max_length=data.draw(st.sampled_from([None, 5000]), "max_length"),
        softcap=data.draw(st.sampled_from([0.0, 5.0]), "softcap"),
        seed=data.draw(st.integers(0, 99), "seed"),
        head_dim=head_dim, n_tip=n_tip, kv_heads=kv_heads, group=group, budget=budget, sink=sink, tokens=tokens,
        layers=layers, layer=layers - 1,
    )  # fmt: skip
    check(case, share=0.0)
