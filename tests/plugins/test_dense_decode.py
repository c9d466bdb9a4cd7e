"""Dense decode over the paged pool against attention in float64. Needs a GPU and nvcc."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fasa_trt.core.errors import FasaError
from tests.plugins.checks import DTYPES, GROUPS, HEAD_DIMS, check_dense, dense
from tests.plugins.paged import make_case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_decode_of_a_ragged_batch(head_dim: int, dtype: torch.dtype) -> None:
    check_dense(make_case([1, 31, 32, 33, 255, 256, 257, 1000, 9001], head_dim=head_dim, dtype=dtype, seed=1))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("kv_heads", "group"), GROUPS)
def test_decode_of_head_groups(head_dim: int, kv_heads: int, group: int) -> None:
    check_dense(make_case([1500, 40], head_dim=head_dim, kv_heads=kv_heads, group=group, seed=head_dim + group))


@pytest.mark.parametrize("tokens", [8, 16, 64, 128])
@pytest.mark.parametrize("layers", [1, 3])
def test_decode_of_pool_layouts(tokens: int, layers: int) -> None:
    lengths = [tokens - 1, tokens, 20 * tokens + 1, 40 * tokens, 4097]
    check_dense(make_case(lengths, tokens=tokens, layers=layers, layer=layers - 1, seed=tokens))


@pytest.mark.parametrize("max_length", [None, 4096, 200_000])
def test_decode_split_and_unsplit(max_length: int | None) -> None:
    check_dense(make_case([5, 129, 200], max_length=max_length, seed=2))


@pytest.mark.parametrize("longest", [1000, 1600])
def test_decode_of_a_row_for_each_multiprocessor(longest: int) -> None:
    """Just where a second chunk begins to pay."""
    check_dense(make_case([longest, 700, 3, *range(60, 73)], kv_heads=8, seed=9))


def test_decode_of_a_long_sequence() -> None:
    check_dense(make_case([300_001, 70_000], kv_heads=1, tokens=64, seed=3))


@pytest.mark.parametrize("window", [1, 16, 100, 256, 257, 5000])
def test_decode_with_a_window(window: int) -> None:
    check_dense(make_case([1, 99, 100, 101, 1000, 9001], seed=4), window)


@pytest.mark.parametrize("window", [0, 300])
def test_decode_with_a_softcap(window: int) -> None:
    check_dense(make_case([2000, 3], softcap=3.0, seed=5), window)


def test_one_chunk_has_the_bits_of_an_unsplit_sequence() -> None:
    """Two sequences split for a long third have the bits that they have in a batch that needs no splitting."""
    case = make_case([100, 128, 9000], kv_heads=8, seed=6)
    short = replace(case, max_length=128)  # chunks are never shorter than that
    short.lengths, short.q, short.offsets = case.lengths[:2], case.q[:2], case.offsets[:2].contiguous()
    assert torch.equal(dense(case)[:2], dense(short))


def test_keys_of_minus_infinity_weigh_nothing() -> None:
    """Even where whole chunks consist of them."""
    case = make_case([2000], seed=7)
    case.q = case.q.abs() + 0.125
    first = case.offsets[0, 0, : 512 // case.pool.shape[4]].long() // (2 * case.pool.shape[1])
    case.pool[first, case.layer, 0] = -torch.inf
    torch.testing.assert_close(dense(case), dense(case, window=2000 - 512), rtol=0, atol=4e-3)


@pytest.mark.parametrize("length", [1, 100, 257, 3000])
def test_an_infinite_value_of_the_last_token(length: int) -> None:
    """Rows of keys and values that fill up its tile must not make a NaN of it."""
    case = make_case([length], seed=8)
    tokens = case.pool.shape[4]
    block = int(case.offsets[0, 0, (length - 1) // tokens]) // (2 * case.pool.shape[1])
    case.pool[block, case.layer, 1, :, (length - 1) % tokens, 3] = torch.inf
    for out in (dense(case), case.run()):
        assert bool((out[..., 3] == torch.inf).all())
        assert int(out.isfinite().sum()) == out.numel() - out.shape[1]


def test_offsets_beyond_two_to_the_31() -> None:
    """A pool of more than 2^31 elements, with the sequence at its end."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    check_dense(make_case([5000], kv_heads=8, tokens=128, spare_blocks=9000, seed=15))
    torch.cuda.empty_cache()


def test_bad_parameters_are_refused() -> None:
    case = make_case([500], seed=16)
    with pytest.raises(FasaError, match="out of its range"):
        dense(case, window=-1)
    case.q = case.q.half()
    with pytest.raises(FasaError, match="the pool torch.bfloat16"):
        dense(case)
