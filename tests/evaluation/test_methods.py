"""Every method against a slow transcription of its rule, and the promises that all of them make."""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fasa_trt.core.errors import FasaError
from fasa_trt.core.reference import attend, decode, importance, sampled, select, softmax
from fasa_trt.core.spec import REDUCTIONS, SparseSpec
from fasa_trt.evaluation.attention import restricted_attention
from fasa_trt.evaluation.methods import METHODS, fasa, parse_method, parse_methods
from fasa_trt.evaluation.methods.base import Selector
from fasa_trt.evaluation.methods.fasa import quantised
from fasa_trt.evaluation.steps import Step
from tests.evaluation.layers import HKV, LENGTHS, SCALE, B, C, D, G, RandomLayer, tokens_of

BUDGET, STEPS = 40, 8


def made(spec: str, layer: RandomLayer, budget: int = BUDGET) -> Selector:
    selector = parse_method(spec, budget).selector(layer, 0)
    assert selector is not None
    return selector


def places() -> list[tuple[int, int, int]]:
    """Row, KV head and step of everything that a layer chooses."""
    return [(b, h, t) for b in range(B) for h in range(HKV) for t in range(STEPS)]


ALL = [*(name for name in METHODS if name != "dense"), "fasa:reduction=per_head", "fasa:labels=prefix:n_tip=2"]


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("budget", [37, 40, 64])
def test_no_mask_exceeds_its_budget(spec: str, budget: int) -> None:
    layer = RandomLayer()
    mask = layer.chosen(made(spec, layer, budget))
    assert int(mask.sum(-1).max()) <= budget
    if spec != "quest":  # whose current page may just have begun
        assert int(mask.sum(-1).min()) == budget
    at = torch.tensor(LENGTHS)[:, None] + torch.arange(STEPS)
    assert not (mask & (torch.arange(C) > at[:, None, None, :, None])).any(), "the future is not there yet"


@pytest.mark.parametrize("spec", ALL)
def test_a_context_within_the_budget_is_dense(spec: str) -> None:
    layer = RandomLayer()
    mask = layer.chosen(made(spec, layer, 112))
    at = torch.tensor(LENGTHS)[:, None] + torch.arange(STEPS)
    assert torch.equal(mask[:, 0, 0], torch.arange(C) <= at[:, :, None])


@pytest.mark.parametrize("spec", ALL)
def test_steps_together_are_steps_one_by_one(spec: str) -> None:
    layer = RandomLayer(3)
    together = layer.chosen(made(spec, layer))
    selector = made(spec, layer)
    selector.start(layer.prompt())
    for t in range(STEPS):
        step = layer.step(t, 1)
        alone = (selector.select(step) & step.seen).expand(B, HKV, G, 1, C)
        assert torch.equal(alone[:, :, :, 0], together[:, :, :, t])


@pytest.mark.parametrize("spec", ["snapkv", "streamingllm", "triattention"])
def test_what_is_evicted_stays_away(spec: str) -> None:
    layer = RandomLayer(1)
    mask = layer.chosen(made(spec, layer), count=30)
    known = torch.arange(C) <= (torch.tensor(LENGTHS)[:, None] + torch.arange(30))[:, None, None, :, None]
    came_back = mask[:, :, :, 1:] & ~mask[:, :, :, :-1] & known[:, :, :, :-1]
    assert not came_back.any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_fasa_is_the_reference(reduction: str) -> None:
    layer = RandomLayer(2)
    spec = SparseSpec(BUDGET, 3, reduction, sink=4, recent=8)  # type: ignore[arg-type]
    selector = made(f"fasa:labels=prefix:n_tip=3:recent=8:reduction={reduction}", layer)
    selector.start(layer.prompt())
    step = layer.step(0, STEPS)
    values = torch.randn(B, HKV, C, D, generator=torch.Generator().manual_seed(9))
    out = restricted_attention(step, selector.select(step), values).double().numpy()
    dims = layer.plans(spec)[0].dims()
    assert dims is not None
    for b, h, t in places():
        length = LENGTHS[b] + t + 1
        k, v = (x[b, h, :length].double().numpy() for x in (layer.k, values))
        q = layer.q[b, h, :, length - 1].double().numpy()
        np.testing.assert_allclose(out[b, h, :, t], decode(q, k, v, dims[h, :6], spec, SCALE), atol=1e-5)


def test_the_sample_is_that_of_the_reference() -> None:
    """Two rows of T steps, each with its own length."""
    positions = torch.stack([torch.arange(700), torch.arange(500, 1200)])
    nothing = torch.zeros(2, 1, 1, 1200, 1)
    step = Step(nothing[:, :, :, :700], nothing[:, :, 0], positions, positions >= 0, 0, SCALE)
    found = fasa.sampled(step)[:, 0, 0]
    for b, t in np.ndindex(2, 700):
        assert tokens_of(found[b, t]) == np.flatnonzero(sampled(int(positions[b, t]) + 1)).tolist()


@pytest.mark.parametrize("reduction", ["sum", "sampled_softmax"])
def test_fasa_never_chooses_nan(reduction: str) -> None:
    layer = RandomLayer(6)
    layer.k[0, 0, 10:14] = torch.nan  # behind the sinks, in the sample
    mask = layer.chosen(made(f"fasa:labels=prefix:n_tip=3:recent=8:reduction={reduction}", layer))
    assert not mask[0, 0, :, :, 10:14].any()
    unharmed = RandomLayer(6)
    same = unharmed.chosen(made(f"fasa:labels=prefix:n_tip=3:recent=8:reduction={reduction}", unharmed))
    assert torch.equal(mask[1], same[1]) and torch.equal(mask[0, 1], same[0, 1])
    agreement = (mask & same)[0, 0].sum() / mask[0, 0].sum()
    assert agreement > 0.7  # the other tokens compete as before


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_fasa_with_quantised_labels(kind: str) -> None:
    """Codes times a scale for each token and KV head; the query in 8 bits."""
    layer, top = RandomLayer(4), {"int4": 7, "int8": 127}[kind]
    mask = layer.chosen(made(f"fasa:labels={kind}:n_tip=4:reduction=sum", layer))
    dims = layer.plans(SparseSpec(BUDGET, 4))[0].dims()
    assert dims is not None
    for b, h, t in places():
        length = LENGTHS[b] + t + 1
        labels = layer.k[b, h, :length, dims[h, :8]].numpy()
        scales = np.float16(np.abs(labels).max(axis=1, keepdims=True) / np.float32(top)).astype(np.float32)
        codes = np.clip(np.round(labels / scales), -top, top)
        query = layer.q[b, h, :, length - 1, dims[h, :8]].numpy().sum(axis=0, keepdims=True)
        step = np.abs(query).max() / np.float32(127)
        scores = importance(np.round(query / step) * step, codes * scales, np.arange(8), SCALE, "sum")
        assert tokens_of(mask[b, h, 0, t]) == select(scores, BUDGET, 4, 32)[0].tolist()


def test_quantised_labels_are_near() -> None:
    labels = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    errors = [float((quantised(labels, kind) - labels).abs().max()) for kind in ("prefix", "int8", "fp8", "int4")]
    assert errors[0] == 0 and errors == sorted(errors) and errors[-1] < 0.5 * float(labels.abs().max()) / 7 * 1.01


def test_oracle_carries_the_most_attention() -> None:
    layer = RandomLayer(5)
    logits = layer.step(0, STEPS).logits
    weights = torch.softmax(logits, dim=-1)

    def mass(spec: str) -> torch.Tensor:
        return (weights * layer.chosen(made(spec, layer))).sum(-1).mean(2)  # [B, Hkv, T]

    best = mass("oracle")
    for spec in ("fasa", "quest", "snapkv", "streamingllm", "triattention", "random"):
        assert (best >= mass(spec) - 1e-6).all(), spec
    b, h, t = 1, 0, 3
    k, q = layer.k[b, h, : LENGTHS[b] + t + 1].numpy(), layer.q[b, h, :, LENGTHS[b] + t].numpy()
    true = softmax(SCALE * q @ k.T).mean(axis=0)
    assert float(best[b, h, t]) == pytest.approx(np.sort(true)[-BUDGET:].sum(), rel=1e-5)


def test_quest_ranks_pages_by_their_upper_bound() -> None:
    """arXiv 2406.10774, algorithm 1: sum over dims of max(q * max, q * min)."""
    layer, page = RandomLayer(6), 8
    mask = layer.chosen(made(f"quest:page={page}", layer))
    for b, h, t in places():
        here = LENGTHS[b] + t
        bounds = {}
        for number in range(here // page):
            keys = layer.k[b, h, number * page : (number + 1) * page].double().numpy()
            low, high = keys.min(axis=0), keys.max(axis=0)
            queries = layer.q[b, h, :, here].double().numpy()
            bounds[number] = sum(max(x * lo, x * hi) for q in queries for x, lo, hi in zip(q, low, high, strict=True))
        ranked = sorted(bounds, key=lambda number: -bounds[number])[: BUDGET // page - 1]
        wanted = [c for c in range(here + 1) if c // page in {*ranked, here // page}]
        assert tokens_of(mask[b, h, 0, t]) == wanted


def test_streamingllm_keeps_sinks_and_a_window() -> None:
    layer = RandomLayer()
    mask = layer.chosen(made("streamingllm", layer))
    for b, h, t in places():
        here = LENGTHS[b] + t
        assert tokens_of(mask[b, h, 0, t]) == [0, 1, 2, 3, *range(here - (BUDGET - 4) + 1, here + 1)]


def test_snapkv_keeps_what_the_window_votes_for() -> None:
    """arXiv 2404.14469, listing 1: softmax, sum over the window, pooling, top-k; then a token leaves for a new one."""
    layer, window, kernel = RandomLayer(7), 8, 3
    mask = layer.chosen(made(f"snapkv:window={window}:kernel={kernel}", layer))
    for b, h, t in places():
        length = LENGTHS[b]
        prefix = length - window
        votes = np.zeros(prefix)
        for g in range(G):
            mine = np.zeros(prefix)
            for p in range(prefix, length):
                scores = SCALE * layer.k[b, h, : p + 1].double().numpy() @ layer.q[b, h, g, p].double().numpy()
                mine += softmax(scores)[:prefix]
            padded = np.pad(mine, kernel // 2)
            votes += [padded[i : i + kernel].sum() / kernel for i in range(prefix)]
        new = t + 1
        kept = np.argsort(-votes, kind="stable")[: BUDGET - window - new]
        assert tokens_of(mask[b, h, 0, t]) == [*sorted(kept.tolist()), *range(prefix, length + new)]


def test_snapkv_in_the_end_keeps_the_newest() -> None:
    layer = RandomLayer(7)
    mask = layer.chosen(made("snapkv:window=32", layer, 36), count=30)
    assert tokens_of(mask[0, 0, 0, 29]) == list(range(LENGTHS[0] + 30 - 36, LENGTHS[0] + 30))


def test_triattention_scores_distances_to_come() -> None:
    """arXiv 2604.04921's trigonometric series, term by term, and eviction token by token."""
    layer = RandomLayer(8)
    mask = layer.chosen(made("triattention", layer, 60), count=4)
    rotary = layer.rotary(0)
    scale = float(rotary.scale[0])

    def chunk(x: Sequence[float], position: int, f: int) -> complex:
        """A frequency chunk before RoPE."""
        first, second = rotary.pairs[f]
        return complex(x[first], x[second]) * cmath.exp(-1j * position * float(rotary.inv_freq[f])) / scale

    for b in range(B):
        h, length = b, LENGTHS[b]
        keys = layer.k[b, h].double().tolist()
        queries = layer.q[b, h].double().tolist()
        alive = list(range(length))
        for t in range(-1, 4):
            here = length + t
            if t >= 0:
                alive.append(here)
            table = []
            for g in range(G):
                row = dict.fromkeys(alive, 0.0)
                for f in range(D // 2):
                    seen = [chunk(queries[g][p], p, f) for p in range(length)]
                    centre, size = sum(seen) / length, sum(map(abs, seen)) / length
                    for c in alive:
                        key = chunk(keys[c], c, f)
                        phase = cmath.phase(centre) - cmath.phase(key)
                        terms = [math.cos(float(rotary.inv_freq[f]) * (here - c + 2**o) + phase) for o in range(17)]
                        row[c] += scale**2 * abs(key) * (abs(centre) * sum(terms) / 17 + size - abs(centre))
                values = np.array([row[c] for c in alive])
                table.append((values - values.mean()) / values.std())
            best = np.max(table, axis=0)
            best[alive.index(here)] = np.inf
            alive = sorted(alive[i] for i in np.argsort(-best, kind="stable")[:60])
            if t >= 0:
                assert tokens_of(mask[b, h, 0, t]) == alive


def test_padding_evicts_nothing() -> None:
    layer = RandomLayer(8)
    plain = layer.chosen(made("triattention", layer), count=6)
    selector = made("triattention", layer)
    selector.start(layer.prompt())
    step = layer.step(0, 6)
    step.valid[0, 2:] = False  # row 0 has two tokens, then padding
    selector.select(step)
    later = layer.step(2, 4)
    assert torch.equal((selector.select(later) & later.seen)[0, :, 0], plain[0, :, 0, 2:])


def test_random_chunks_differ_by_seed_and_head() -> None:
    layer = RandomLayer()
    dims = [made(f"random:seed={seed}:n_tip=3", layer).dims for seed in (0, 0, 1)]  # type: ignore[attr-defined]
    assert torch.equal(dims[0], dims[1]) and not torch.equal(dims[0], dims[2])
    assert not torch.equal(dims[0][0], dims[0][1])


def test_restricted_attention_is_attention_over_the_chosen() -> None:
    layer = RandomLayer()
    step, mask = layer.step(0, STEPS), layer.chosen(made("streamingllm", layer))
    values = torch.randn(B, HKV, C, D, generator=torch.Generator().manual_seed(1))
    out = restricted_attention(step, mask, values)
    for b, h, t in places():
        chosen = tokens_of(mask[b, h, 0, t])
        wanted = attend(step.q[b, h, :, t].numpy(), layer.k[b, h, chosen].numpy(), values[b, h, chosen].numpy(), SCALE)
        np.testing.assert_allclose(out[b, h, :, t].numpy(), wanted, atol=1e-5)


def test_bytes_read_to_choose() -> None:
    layer, lengths = RandomLayer(), torch.tensor([1000.0, 20.0])
    row = 4 * D  # a key and a value in bfloat16
    expected = {
        "fasa:n_tip=4:labels=int4": 1000 * (4 + 2.0), "fasa:n_tip=4:labels=prefix": 1000 * 16.0,
        "quest:page=8": 125 * row, "oracle": 960 * row / 2, "snapkv": 0.0, "streamingllm": 0.0,
    }  # fmt: skip
    for spec, wanted in expected.items():
        selector = made(spec, layer)
        selector.start(layer.prompt())
        found = torch.as_tensor(selector.index_bytes(lengths, row)).expand(2)
        assert found.tolist() == [wanted, 0.0], spec


def test_methods_are_parsed() -> None:
    found = parse_methods("quest,fasa:n_tip=16:labels=prefix, quest", [64, 128])
    assert [(method.label, method.budget) for method in found] == [
        ("dense", 1), ("quest", 64), ("quest", 128), ("fasa:n_tip=16:labels=prefix", 64),
        ("fasa:n_tip=16:labels=prefix", 128),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "budget", "words"),
    [
        ("magic", 64, "unknown method 'magic'"),
        ("fasa:colour=red", 64, "no option 'colour=red'"),
        ("fasa:n_tip=few", 64, "not a whole number"),
        ("fasa:n_tip", 64, "no option 'n_tip'"),
        ("fasa:labels=int2", 64, "unknown labels 'int2'"),
        ("fasa", 16, "do not fit into a budget of 16"),
        ("quest", 8, "pages of 16 tokens do not fit"),
        ("quest:page=0", 8, "pages of 0 tokens"),
        ("snapkv", 16, "a window of 32 does not fit"),
        ("snapkv:kernel=4", 64, "not an odd number"),
        ("streamingllm:sink=64", 64, "64 sinks do not fit"),
        ("oracle", 0, "must not be negative"),
    ],
)
def test_refused(spec: str, budget: int, words: str) -> None:
    with pytest.raises(FasaError, match=words):
        parse_method(spec, budget)
