"""The CUDA decode step against the reference in float64, on fresh random inputs. Needs a GPU and nvcc."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.plugins.paged import Case, make_case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
TOLERANCE = {torch.bfloat16: 2e-3, torch.float16: 5e-4}  # relative, beyond the rounding of the output itself
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def check(case: Case) -> None:
    got = case.run().double().cpu().numpy()
    wanted, gap = case.expected()
    clear = gap > 1e-5
    if case.spec.reduction != "per_head":  # a group shares its set, so it shares its doubt
        group = case.q.shape[1] // case.pool.shape[3]
        clear = np.repeat(clear.reshape(len(clear), -1, group).all(axis=2), group, axis=1)
    assert clear.mean() > 0.5
    error = np.abs(got - wanted) - ROUNDING[case.q.dtype] * np.abs(wanted)
    scale = np.abs(wanted).max()
    assert np.isfinite(got).all()
    assert error[clear].max() < TOLERANCE[case.q.dtype] * scale, error[clear].max() / scale


@pytest.mark.parametrize("kind", ["int4", "int8", "prefix"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["sum", "per_head"])
def test_ragged_batch(kind: str, dtype: torch.dtype, reduction: str) -> None:
    check(make_case([1, 255, 256, 257, 1000, 9001], kind=kind, dtype=dtype, reduction=reduction, seed=1))


@pytest.mark.parametrize("n_tip", [8, 16, 24, 32, 48, 64])
@pytest.mark.parametrize("kind", ["int4", "int8", "prefix"])
def test_n_tip(kind: str, n_tip: int) -> None:
    check(make_case([3000, 777], kind=kind, n_tip=n_tip, seed=n_tip))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (2, 2), (3, 3), (8, 4), (5, 5), (4, 8), (2, 16), (32, 1)])
def test_heads(head_dim: int, kv_heads: int, group: int) -> None:
    check(make_case([1500, 40], head_dim=head_dim, kv_heads=kv_heads, group=group, seed=head_dim + group))


@pytest.mark.parametrize("budget", [16, 17, 100, 256, 512, 1000, 4096])
@pytest.mark.parametrize("length", [5000, 20000])
def test_budget(budget: int, length: int) -> None:
    check(make_case([length, budget, budget + 1], budget=budget, sink=2, recent=8, seed=budget))


@pytest.mark.parametrize("tokens", [8, 16, 64, 128])
@pytest.mark.parametrize("layers", [1, 3])
def test_pool_layout(tokens: int, layers: int) -> None:
    lengths = [tokens - 1, tokens, 20 * tokens + 1, 40 * tokens, 4097]
    check(make_case(lengths, tokens=tokens, layers=layers, layer=layers - 1, budget=64, seed=tokens))


@pytest.mark.parametrize("length", [131072, 140001, 600000])
def test_long(length: int) -> None:
    check(make_case([length, 70000], kv_heads=1, tokens=64, seed=length % 97))


def test_softcap() -> None:
    check(make_case([2000], softcap=3.0, seed=5))


def test_within_budget_does_not_depend_on_the_budget() -> None:
    case = make_case([1, 77, 200, 256], seed=6)
    assert torch.equal(case.run(), case.with_spec(budget=4096).run())


@pytest.mark.parametrize("kind", ["int4", "int8", "prefix"])
@pytest.mark.parametrize("length", [700, 40000])
def test_equal_scores_go_to_lower_positions(kind: str, length: int) -> None:
    """All labels alike: every free token ties, also beyond the lists that selection keeps."""
    case = make_case([length], kind=kind, seed=7)
    case.pool[..., : 2 * case.n_tip] = 0.5
    case.labels.fill_(0x99)
    case.scales.fill_(0.25)
    got = case.run()
    values = case.pool[:, :, 1]
    before = values.clone()
    chosen = case.spec.budget - case.spec.recent
    blocks = case.offsets[0, 1].long() // 2
    flat = values[blocks]  # what was rejected must not matter
    flat.transpose(2, 3).reshape(-1, *flat.shape[2:3], flat.shape[-1])
    for token in range(chosen, length - case.spec.recent, 97):
        values[blocks[token // 32], 0, :, token % 32] = 50.0
    assert torch.equal(case.run(), got)
    values.copy_(before)
    values[blocks[(chosen - 1) // 32], 0, :, (chosen - 1) % 32] = 50.0
    assert not torch.equal(case.run(), got)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["int4", "prefix"])
def test_bad_keys_do_not_hang(kind: str, bad: float) -> None:
    case = make_case([5000, 300], kind=kind, seed=8)
    case.pool[:, 0, 0, :, 3] = bad
    case.scales[:, 5] = bad
    case.run()
    torch.cuda.synchronize()


def test_nan_ranks_last() -> None:
    case = make_case([5015], kind="int4", seed=9)  # its last token lies in slot 22 of its block
    case.scales[:, 3:20] = float("nan")
    case.pool[:, 0, 0, :, 3:20] = float("nan")
    out = case.with_spec(sink=0, recent=1).run()
    assert torch.isfinite(out).all()


def test_stale_contents_do_not_matter() -> None:
    """Slots past the end hold NaN (see make_case) and columns past the last block are wild; two runs are equal."""
    case = make_case([1, 31, 33, 999, 5001], budget=64, max_length=8192, seed=10)
    first = case.run()
    assert torch.isfinite(first).all()
    assert torch.equal(first, case.run())


def test_graph_replay_with_new_lengths() -> None:
    case = make_case([9000, 300, 4000], max_length=16384, seed=11)
    lengths = case.lengths.clone()
    case.run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run()
    for shorter in (0, 1, 37, 290):
        case.lengths.copy_(lengths - shorter)
        graph.replay()
        torch.cuda.synchronize()
        replayed = out.clone()
        assert torch.equal(replayed, case.run())


def test_offsets_beyond_two_to_the_31() -> None:
    """A pool of more than 2^31 elements, with the sequence at its end."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    check(make_case([5000], kv_heads=8, tokens=128, spare_blocks=9000, seed=12))
    torch.cuda.empty_cache()


def test_bad_parameters_are_refused() -> None:
    from fasa_trt.core.errors import FasaError

    case = make_case([500], seed=13)
    for changes in ({"budget": 8, "sink": 1, "recent": 1}, {"budget": 5000}):
        with pytest.raises(FasaError, match="out of its range"):
            case.with_spec(**changes).run()


def test_compiles() -> None:
    case = make_case([500, 1000], seed=14)
    assert torch.equal(torch.compile(lambda c: c.run(), fullgraph=False)(case), case.run())
