"""Prefill over the paged pool against attention in float64. Needs a GPU and nvcc."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.plugins.checks import DTYPES, GROUPS, HEAD_DIMS, attention, check_dense, close, dense
from tests.plugins.paged import Case, make_case

pytestmark = pytest.mark.gpu


def prefill(case: Case, q: Tensor, queries: list[int], window: int = 0) -> Tensor:
    from fasa_trt.plugins.torch.dense import prefill

    counts = torch.tensor(queries, dtype=torch.int32, device=q.device)
    return prefill(
        q, counts, case.pool, case.layer, case.offsets, case.lengths, case.scale, case.softcap, window
    )  # fmt: skip


def check_prefill(case: Case, queries: list[int], window: int = 0, spare: int = 0) -> None:
    """`spare`: rows of q past the last sequence's."""
    generator = torch.Generator("cuda").manual_seed(sum(queries))
    shape = (sum(queries) + spare, *case.q.shape[1:])
    q = torch.randn(shape, generator=generator, device="cuda").to(case.q.dtype)
    got, first = prefill(case, q, queries, window), 0
    for seq, count in enumerate(queries):
        rows = slice(first, first + count)
        if count:
            close(got[rows], attention(case, seq, q[rows], window))
        first += count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_prefill_of_a_mixed_batch(head_dim: int, dtype: torch.dtype) -> None:
    """Whole prompts, chunks with a past, single tokens and sequences that are not in this step."""
    case = make_case([1, 300, 64, 1000, 500, 129, 31], head_dim=head_dim, dtype=dtype, seed=7)
    check_prefill(case, [1, 300, 0, 77, 1, 129, 30])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("kv_heads", "group"), GROUPS)
def test_prefill_of_head_groups(head_dim: int, kv_heads: int, group: int) -> None:
    case = make_case([200, 333], head_dim=head_dim, kv_heads=kv_heads, group=group, seed=head_dim + group)
    check_prefill(case, [200, 100])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("kv_heads", "group"), [(2, 1), (3, 3), (2, 8)])
def test_prefill_of_long_prompts(head_dim: int, dtype: torch.dtype, kv_heads: int, group: int) -> None:
    """Enough query tokens for the kernels of compute capability 9.0."""
    lengths = [1500, 1, 1000, 97, 513]
    case = make_case(lengths, head_dim=head_dim, kv_heads=kv_heads, group=group, dtype=dtype, seed=18)
    check_prefill(case, [1500, 1, 700, 0, 513], spare=300)


@pytest.mark.parametrize("tokens", [8, 16, 64, 128])
@pytest.mark.parametrize("layers", [1, 3])
def test_prefill_of_pool_layouts(tokens: int, layers: int) -> None:
    case = make_case([tokens, 3 * tokens - 1, 5 * tokens + 1], tokens=tokens, layers=layers, layer=layers - 1, seed=8)
    check_prefill(case, [tokens, 2 * tokens, 3], spare=50)
    check_prefill(case, [tokens, 3 * tokens - 1, 5 * tokens + 1], spare=400)


@pytest.mark.parametrize("past", [0, 1, 63, 64, 1000])
@pytest.mark.parametrize("queries", [1, 16, 127, 128, 129, 1000])
def test_prefill_of_a_chunk(past: int, queries: int) -> None:
    check_prefill(make_case([past + queries], seed=past + queries), [queries])


@pytest.mark.parametrize("window", [1, 16, 100, 128, 5000])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_prefill_with_a_window_and_a_softcap(window: int, softcap: float) -> None:
    check_prefill(make_case([1, 700, 2000], softcap=softcap, seed=9), [1, 700, 300], window)


def test_prefill_of_more_sequences_than_the_plan_has_threads() -> None:
    lengths = [1 + seq % 7 for seq in range(1100)]
    case = make_case(lengths, kv_heads=1, group=2, tokens=8, seed=10)
    check_prefill(case, [length if seq % 3 else 0 for seq, length in enumerate(lengths)])


def test_prefill_reads_strided_queries() -> None:
    case = make_case([150], seed=11)
    heads, head_dim = case.q.shape[1:]
    fused = torch.randn(150, heads + 4, head_dim, device="cuda").to(case.q.dtype)
    q = fused[:, 2 : 2 + heads]
    assert torch.equal(prefill(case, q, [150]), prefill(case, q.contiguous(), [150]))


def test_chunks_have_the_bits_of_the_whole() -> None:
    """A prompt in two chunks, cut at a tile's edge."""
    case = make_case([700], seed=12)
    q = torch.randn(700, *case.q.shape[1:], device="cuda").to(case.q.dtype)
    whole = prefill(case, q, [700])
    cut = 512
    assert torch.equal(prefill(case, q[cut:], [700 - cut]), whole[cut:])
    case.lengths.fill_(cut)
    assert torch.equal(prefill(case, q[:cut], [cut]), whole[:cut])


def test_the_last_query_of_a_prefill_is_a_decode_step() -> None:
    case = make_case([700, 33], seed=13)
    queries = [700, 10]
    q = torch.randn(sum(queries), *case.q.shape[1:], device="cuda").to(case.q.dtype)
    q[699], q[709] = case.q[0], case.q[1]
    close(prefill(case, q, queries)[[699, 709]], dense(case).double())


def test_replay_of_a_graph_with_new_lengths() -> None:
    case = make_case([9000, 300, 4000], max_length=16384, seed=14)
    lengths, counts = case.lengths.clone(), torch.zeros(3, dtype=torch.int32, device="cuda")
    q = torch.randn(200, *case.q.shape[1:], device="cuda").to(case.q.dtype)

    def step() -> tuple[Tensor, Tensor]:
        from fasa_trt.plugins.torch.dense import prefill

        filled = prefill(q, counts, case.pool, 0, case.offsets, case.lengths, case.scale, 0.0, 0)
        return dense(case), filled

    counts.copy_(torch.tensor([100, 0, 100]))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for shorter, queries in ((0, [100, 0, 100]), (1, [1, 1, 198]), (37, [0, 150, 7]), (290, [200, 0, 0])):
        case.lengths.copy_(lengths - shorter)
        counts.copy_(torch.tensor(queries))
        graph.replay()
        torch.cuda.synchronize()
        decoded, filled = out[0].clone(), out[1][: sum(queries)].clone()
        again = step()
        assert torch.equal(decoded, again[0])
        assert torch.equal(filled, again[1][: sum(queries)])


def test_offsets_beyond_two_to_the_31() -> None:
    """Blocks all over a pool of more than 2^31 elements."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    check_prefill(make_case([5000], kv_heads=8, tokens=128, spare_blocks=9000, seed=15), [200])
    torch.cuda.empty_cache()


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 1500), min_size=1, max_size=5))
    case = make_case(
        lengths,
        head_dim=data.draw(st.sampled_from([64, 96, 128, 256])),
        kv_heads=data.draw(st.integers(1, 5)),
        group=data.draw(st.integers(1, 16)),
        tokens=data.draw(st.sampled_from([8, 16, 32, 64, 128])),
        dtype=data.draw(st.sampled_from([torch.bfloat16, torch.float16])),
        softcap=data.draw(st.sampled_from([0.0, 5.0])),
        max_length=data.draw(st.sampled_from([None, 5000])),
        n_tip=16,
        seed=data.draw(st.integers(0, 99)),
    )
    window = data.draw(st.sampled_from([0, 1, 77, 1000]))
    check_dense(case, window)
    queries = [data.draw(st.integers(0, length)) for length in lengths]
    if sum(queries):
        check_prefill(case, queries, window, spare=data.draw(st.sampled_from([0, 9])))
