"""The decode loop: its logits are transformers', its rows add up. On a CPU with stand-ins for the operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fasa_trt.bench import e2e, linears
from fasa_trt.bench import weights as weights_module
from fasa_trt.bench.caches import CachedAttention, Labels, Place, Side, fasa_attend
from fasa_trt.bench.e2e import HEADROOM, buffers_of, check_points, dense_attend, run_e2e
from fasa_trt.bench.kernels import cache, dense
from fasa_trt.bench.kernels.cache import make_paged
from fasa_trt.bench.loop import DecodeLoop
from fasa_trt.bench.record import new_record
from fasa_trt.bench.shapes import SHAPES, check_config, config_of
from fasa_trt.bench.weights import Weights, checkpoint_weights, random_weights
from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.core.spec import SparseSpec
from tests.kernels_on_cpu import operators_on_cpu
from tests.models import VARIANTS, make_model

CPU = torch.device("cpu")
BATCH, CONTEXT, STEPS = 2, 64, 20


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cache, "DEVICE", "cpu")
    with operators_on_cpu():
        yield


def make_loop(weights: Weights, spec: SparseSpec | None, context: int = CONTEXT) -> DecodeLoop:
    """Over empty caches, one for each layer. spec: None for dense attention."""
    place = Place.of(BATCH, 1, context, CPU)
    heads = (weights.heads, weights.kv_heads, weights.head_dim)
    pools = make_paged(context, BATCH, len(weights.layers), heads)
    paged = dataclasses.replace(pools, pools=[pool.to(weights.dtype) for pool in pools.pools], lengths=place.lengths)
    if spec is None:
        attend, labels = dense_attend(dense.fasa_dense, paged), Labels.none(paged.pools)
        attention = CachedAttention(weights, paged, place, Side(labels, attend))
    else:
        labels = Labels.random(paged.pools, spec.n_tip or 0)
        ours = Side(Labels.none(paged.pools), dense_attend(dense.fasa_dense, paged))
        sparse = Side(labels, fasa_attend(paged, labels, place, spec))
        attention = CachedAttention(weights, paged, place, sparse, dict.fromkeys(spec.dense_layers, ours))
    return DecodeLoop(weights, attention, torch.zeros(BATCH, dtype=torch.long))


def logits_of(loop: DecodeLoop, ids: Tensor) -> Tensor:
    """[batch, T, vocab], a token after the other."""
    found = []
    for column in ids.T:
        loop.tokens.copy_(column)
        loop.step()
        found.append(loop.logits)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("variant", ["llama", "llama-tied-mha", "llama-3", "mistral", "qwen2-yarn", "qwen3"])
@pytest.mark.parametrize("budget", [None, 32])
def test_logits_are_those_of_transformers(
    variant: str, budget: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense, and FASA within the budget, which is dense."""
    overrides = {"mlp_bias": False} if variant == "llama-3" else {}
    directory = make_model(variant, tmp_path, **overrides)
    weights = checkpoint_weights(open_checkpoint(directory), device=CPU, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.randint(2, 97, (BATCH, STEPS), generator=torch.Generator().manual_seed(0))
    loop = make_loop(weights, None if budget is None else SparseSpec(budget=budget, n_tip=8, sink=1, recent=4))
    with torch.no_grad():
        wanted = plain(ids).logits
    got = logits_of(loop, ids)
    assert (got - wanted).abs().max() < 2e-4 * wanted.abs().max()
    assert torch.equal(loop.tokens, got[:, -1].argmax(-1))


def test_beyond_the_budget_it_is_another_thing(tmp_path: Path) -> None:
    weights = checkpoint_weights(open_checkpoint(make_model("llama", tmp_path)), device=CPU, dtype=torch.float32)
    ids = torch.randint(2, 97, (BATCH, STEPS), generator=torch.Generator().manual_seed(0))
    got, wanted = (logits_of(make_loop(weights, spec), ids) for spec in (SparseSpec(8, 4, sink=1, recent=4), None))
    torch.testing.assert_close(got[:, :8], wanted[:, :8])
    assert (got[:, 8:] - wanted[:, 8:]).abs().max() > 1e-2


def test_dense_layers_attend_to_everything(tmp_path: Path) -> None:
    weights = checkpoint_weights(open_checkpoint(make_model("llama", tmp_path)), device=CPU, dtype=torch.float32)
    ids = torch.randint(2, 97, (BATCH, STEPS), generator=torch.Generator().manual_seed(0))
    specs = [SparseSpec(8, 4, sink=1, recent=4, dense_layers=layers) for layers in ((), (0,), (0, 1, 2))]
    sparse, mixed, dense_ = (logits_of(make_loop(weights, spec), ids) for spec in specs)
    assert torch.equal(dense_, logits_of(make_loop(weights, None), ids))
    for one, other in ((sparse, mixed), (mixed, dense_)):
        assert (one[:, 8:] - other[:, 8:]).abs().max() > 1e-3


def test_places_advance_and_start_again() -> None:
    place = Place.of(2, 5, 7, CPU)
    seen = []
    for _ in range(5):
        seen.append((place.lengths.tolist(), place.position.tolist()))
        place.advance()
    assert [lengths[0] for lengths, _ in seen] == [5, 6, 7, 5, 6]
    assert all(position[1] == lengths[1] - 1 for lengths, position in seen)
    assert place.lengths.dtype == place.position.dtype == torch.int32


@pytest.mark.parametrize("shape", SHAPES)
def test_named_shapes(shape: str) -> None:
    """Their parameters, counted without memory for them."""
    config, meta = config_of(shape), torch.device("meta")

    def get(name: str, size: tuple[int, ...]) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=meta)

    weights = weights_module._weights(config, get, (False, False), qk_norm=shape == "qwen3-8b", device=meta)
    billions = {"llama-3.1-8b": 7.50, "llama-3.2-1b": 1.24, "qwen3-8b": 7.57}[shape]  # the embedding not counted
    assert weights.nbytes / 2e9 == pytest.approx(billions, abs=0.01)


def test_models_that_the_loop_does_not_know() -> None:
    with pytest.raises(FasaError, match="unknown shape 'gpt'"):
        config_of("gpt")
    from transformers import CONFIG_MAPPING

    for variant, message in (
        ("gemma2", "its architecture is gemma2"),
        ("mistral-sliding", "a sliding window"),
        ("llama-3", "its MLP has biases"),
    ):
        model_type, differences = VARIANTS[variant]
        with pytest.raises(FasaError, match=message):
            check_config(CONFIG_MAPPING[model_type](**differences))


def test_points() -> None:
    check_points([(4096, 1)], SparseSpec())
    for point in ((4100, 1), (320, 1), (4096, 0)):
        with pytest.raises(FasaError, match="cannot be measured"):
            check_points([point], SparseSpec())


def small_weights(**changes: Any) -> Weights:
    from transformers import LlamaConfig

    config = LlamaConfig(
        **{
            "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, **changes,
        }
    )  # fmt: skip
    return random_weights(config, device=CPU, dtype=torch.float32)


def test_buffers() -> None:
    """Every layer its own cache where there is memory, else as many as fit, twice."""
    weights, spec = small_weights(), SparseSpec(n_tip=8)
    one = 2 * 2 * 32 * 4 * 128 * 3
    labels = 2 * 10 * 128 * 3
    assert buffers_of(weights, 128, 3, spec, 100 * one) == 3
    assert buffers_of(weights, 128, 3, spec, 2 * (2 * one + labels)) == 2
    assert buffers_of(weights, 128, 3, spec, one) == 0


def test_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole run, whose steps are made once instead of timed: what was attended decides the pretended time."""
    weights, times = small_weights(), iter([1000.0, 4000.0, 2000.0] * 2)

    def replay_us(calls: list[Any], repeats: int = 30, in_a_graph: int = 8) -> list[float]:
        calls[0]()
        return [next(times)] * repeats if in_a_graph == 1 else [7.0] * repeats

    for part in (e2e, dense, linears):
        monkeypatch.setattr(part, "replay_us", replay_us)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    written: list[int] = []
    record = run_e2e(
        new_record("e2e", "abc"),
        "tiny",
        weights,
        [(192, 1), (128, 2), (128, 1 << 40)],
        SparseSpec(budget=16, n_tip=8, sink=1, recent=4),
        repeats=3,
        write=lambda found: written.append(len(found["rows"])),
        kernels={"fasa dense": dense.fasa_dense, "absent": absent},
    )
    row = record["rows"][0]
    assert (row["dense_ms"], row["fasa_ms"], row["rest_ms"], row["speedup"]) == (4.0, 2.0, 1.0, 2.0)
    assert row["attention_share"] == {"dense": 0.75, "fasa": 0.5}
    assert row["dense_kernel"] == "fasa dense" and row["run_id"] == record["run_id"]
    assert row["kv_buffers"] == 3 and row["kv_bytes"] == 3 * 2 * 2 * 32 * 4 * 192
    assert record["rows"][1]["tokens_per_second"] == {"dense": 500.0, "fasa": 1000.0}
    assert set(record["linear_us"]) == {"qkv", "o", "gate_up", "down", "lm_head"}
    assert record["missing"] == {"absent": "ImportError: no module"}
    assert [skipped["batch"] for skipped in record["skipped"]] == [1 << 40]
    assert written == [1, 2]
    assert "2.00x" in capsys.readouterr().out


def test_a_row_times_a_matrix() -> None:
    x, weight = torch.randn(1, 300).bfloat16(), torch.randn(70, 300).bfloat16()
    torch.testing.assert_close(linears.one_row(x, weight), torch.nn.functional.linear(x, weight), atol=0.2, rtol=0.02)
    linears.check(linears.one_row(x, weight), torch.nn.functional.linear(x, weight))
    with pytest.raises(ValueError, match="wrong result"):
        linears.check(x, -x)
    assert linears.fastest_linears(small_weights(), 2, 3) == linears.Choice()


def absent(paged: Any) -> list[dense.Attend]:
    raise ImportError("no module")


@pytest.mark.gpu
class TestOnGpu:
    @pytest.fixture(autouse=True)
    def on_the_gpu(self, on_the_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache, "DEVICE", "cuda")

    def weights(self) -> Weights:
        from transformers import LlamaConfig

        config = LlamaConfig(
            vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8,
            num_key_value_heads=2, head_dim=64,
        )  # fmt: skip
        return random_weights(config, device=torch.device("cuda"), dtype=torch.bfloat16)

    def test_a_graph_computes_what_transformers_does(self, tiny_dir: Path) -> None:
        """Replays follow the tokens and the lengths on the device; FASA within its budget is dense."""
        device = torch.device("cuda")
        weights = checkpoint_weights(open_checkpoint(tiny_dir), device=device, dtype=torch.bfloat16)
        plain: Any = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.bfloat16)
        plain = plain.to(device).eval()
        ids = torch.randint(2, 2000, (BATCH, STEPS), generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad():
            wanted = plain(ids).logits.float()
        place = Place.of(BATCH, 1, 128, device)
        paged = make_paged(128, BATCH, len(weights.layers), (weights.heads, weights.kv_heads, weights.head_dim))
        paged = dataclasses.replace(paged, lengths=place.lengths)
        labels = Labels.random(paged.pools, 32)
        attend = fasa_attend(paged, labels, place, SparseSpec(n_tip=32))
        loop = DecodeLoop(weights, CachedAttention(weights, paged, place, Side(labels, attend)), ids[:, 0].clone())
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loop.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loop.step()
        place.lengths.fill_(1)
        place.position.fill_(0)
        got = []
        for column in ids.T:
            loop.tokens.copy_(column)
            graph.replay()
            got.append(loop.logits.float().clone())
        error = (torch.stack(got, dim=1) - wanted).abs().max() / wanted.abs().max()
        assert error < 0.05

    def test_a_run(self) -> None:
        """Real graphs of a small model: every field of a row, and positive times."""
        record = run_e2e(
            new_record("e2e"), "small", self.weights(), [(2048, 1), (1024, 4)], SparseSpec(n_tip=32), repeats=3,
            write=lambda _: None, memory=torch.cuda.memory_allocated() + e2e.SPARE + (1 << 30),
        )  # fmt: skip
        assert len(record["rows"]) == 2 and not record["skipped"]
        for row in record["rows"]:
            assert 0 < row["rest_ms"] <= row["dense_ms"] * 1.5
            assert row["fasa_ms"] > 0 and row["kv_buffers"] == 3
            assert "fasa dense" in row["dense_candidates_us"]
        assert HEADROOM < 1024
