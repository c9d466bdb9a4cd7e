"""The kernel benchmarks as far as they go without a GPU: bytes, conclusions, calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.kernels.__main__ import kernels
from fasa_trt.bench.kernels import cache, crossover, dense, prefill, rows, run, timing, topk
from fasa_trt.bench.kernels.cache import KV_HEADS, Q_HEADS, SPARE_BYTES, Paged, cache_bytes, copies_of
from fasa_trt.bench.kernels.crossover import crossover_length
from fasa_trt.bench.kernels.dense import calls_of, fasa_dense, one_line, reference, sdpa
from fasa_trt.bench.kernels.fasa import BUDGET, Variant, decode_calls, random_labels
from fasa_trt.bench.kernels.prefill import fasa_prefill
from fasa_trt.bench.kernels.prefill import sdpa as sdpa_prefill
from fasa_trt.bench.kernels.rows import REDUCTION_SHAPES, SHAPES, describe, fastest, variants_of
from fasa_trt.bench.kernels.timing import kernel_name
from fasa_trt.bench.kernels.topk import select_and_attend_us
from fasa_trt.bench.record import new_record
from fasa_trt.bench.report import html_report
from fasa_trt.core.errors import FasaError
from fasa_trt.core.spec import REDUCTIONS, SparseSpec


def paged(context: int, batch: int) -> Paged:
    blocks = context // 64
    return Paged(
        context=context,
        batch=batch,
        q=torch.randn(batch, Q_HEADS, 128, dtype=torch.bfloat16),
        pools=[torch.randn(batch * blocks, 1, 2, KV_HEADS, 64, 128, dtype=torch.bfloat16)],
        table=torch.randperm(batch * blocks).int().view(batch, blocks),
        lengths=torch.full((batch,), context, dtype=torch.int32),
    )


def test_bytes_of_a_step() -> None:
    chosen = 8 * BUDGET * 4 * 128
    assert Variant("int4", 32).bytes_of(1000, 3) == 3 * (8 * 1000 * (32 + 2) + chosen)
    assert Variant("int8", 32).bytes_of(1000, 1) == 8 * 1000 * (64 + 2) + chosen
    assert Variant("fp8", 32).bytes_of(1000, 1) == 8 * 1000 * 64 + chosen
    assert Variant("prefix", 16).bytes_of(1000, 1) == 8 * 1000 * 64 + chosen
    assert Variant("int4", 32, "per_head").bytes_of(1000, 1) == 8 * 1000 * 34 + 4 * chosen
    assert cache_bytes(32768, 8) == 32768 * 8 * 8 * 128 * 4


def test_caches_rotate_as_far_as_memory_goes() -> None:
    roomy = 130 << 30
    assert copies_of(4096, 1, roomy) == 64
    assert copies_of(32768, 1, roomy) == 16
    assert copies_of(131072, 8, roomy) == 2
    assert copies_of(131072, 64, 2 * cache_bytes(131072, 64) + SPARE_BYTES) == 1
    assert copies_of(131072, 64, 40 << 30) == 0
    for context, batch in SHAPES:  # an empty GPU of 80 GB holds every row twice
        assert copies_of(context, batch, 78 << 30) >= 2


def test_every_row_is_there() -> None:
    names = {(variant.labels, variant.n_tip, variant.reduction) for variant in variants_of(32768, 8)}
    plain = {("4bit", 32), ("8bit", 32), ("fp8", 32), ("prefix", 16), ("prefix", 24)}
    assert names == {(*label, SparseSpec.reduction) for label in plain} | {
        ("4bit", 32, reduction) for reduction in REDUCTIONS
    }
    assert len(list(variants_of(4096, 1))) == 5
    assert set(REDUCTION_SHAPES) <= set(SHAPES)


def test_the_fastest_dense_kernel_by_median() -> None:
    samples = {"a": [1.0, 9.0, 9.0], "b": [5.0, 6.0, 50.0]}
    assert fastest(samples) == {"dense_us": 6.0, "dense_kernel": "b"}
    assert fastest({}) == {"dense_us": None, "dense_kernel": None}
    row = {"context": 4096, "batch": 1, "labels": "4bit", "n_tip": 32, "reduction": "sum"}
    times = {"fasa_us": 3.0, "limit_us": 1.0, "limit_share": 0.333}
    assert "2.00x" in describe({**row, **times, **fastest(samples)})
    assert "no dense kernel" in describe({**row, **times, **fastest({})})


def points(pairs: list[tuple[float | None, float]], batch: int = 1) -> list[dict[str, Any]]:
    return [
        {"context": 512 << i, "batch": batch, "dense_us": dense, "fasa_us": fasa, "auto_us": fasa, "limit_us": fasa / 2}
        for i, (dense, fasa) in enumerate(pairs)
    ]


def test_crossover_is_for_good() -> None:
    assert crossover_length(points([(9, 10), (12, 10), (9, 11), (20, 12), (40, 14)]), 1) == 4096
    assert crossover_length(points([(9, 8), (12, 10)]), 1) == 512
    assert crossover_length(points([(12, 10), (9, 10)]), 1) is None
    assert crossover_length(points([(12, 10), (None, 10)]), 1) == 512
    assert crossover_length(points([(12, 10)], batch=4), 1) is None


def test_kernel_names() -> None:
    signature = "void fasa::(anonymous namespace)::score_labels<__nv_bfloat16, 8, true>(fasa_decode_params, int)"
    assert kernel_name(signature) == "score_labels"
    assert kernel_name("fasa::select_and_attend(int)") == "select_and_attend"
    assert kernel_name("Memset (Device)") == "Memset"
    assert select_and_attend_us({"score_labels": 5.0, "select_and_attend": 7.0, "dense": 1.5}) == 8.5


@pytest.mark.parametrize("variant", [Variant("int4", 32), Variant("fp8", 32), Variant("prefix", 16)])
def test_calls_fit_the_operators(variant: Variant) -> None:
    """The operators' fake versions take the calls, so the arguments are those of the schemas."""
    with FakeTensorMode():
        case = paged(1024, 2)
        for calls in (decode_calls(case, variant, dense_below=-1), calls_of(fasa_dense, case)):
            out = calls[0]()
            assert out.shape == case.q.shape and out.dtype == case.q.dtype
        q = torch.empty(1024, Q_HEADS, 128, dtype=torch.bfloat16)
        assert fasa_prefill(paged(1024, 1), q)[0]().shape == q.shape


def test_labels_are_numbers() -> None:
    labels, scales = random_labels(Variant("fp8", 32), 20, torch.device("cpu"))
    assert labels.shape == (20, 64, 8, 64) and scales.shape == (20, 64, 8)
    assert not labels.view(torch.float8_e4m3fn).float().isnan().any()
    assert random_labels(Variant("int4", 32), 2, torch.device("cpu"))[0].shape == (2, 64, 8, 32)
    assert random_labels(Variant("prefix", 32), 2, torch.device("cpu"))[0].numel() == 0


def test_the_check_of_dense_kernels() -> None:
    """Paged caches unfold to the sequences that their table names; SDPA on them agrees with the float32 reference."""
    case = paged(192, 2)
    pool = case.pools[0]
    unfolded = case.contiguous(pool)
    block = int(case.table[1, 2])
    torch.testing.assert_close(unfolded[1, 1, 3, 128:192], pool[block, 0, 1, 3])
    assert case.offsets[1, 0, 2] == 2 * block and case.offsets[1, 1, 2] == 2 * block + 1
    got = sdpa("MATH", case)[0](case.q)
    assert got.shape == case.q.shape
    assert (got.float() - reference(case)).abs().max() < 0.02


def test_prefill_is_causal() -> None:
    case = paged(128, 1)
    q = torch.randn(128, Q_HEADS, 128, dtype=torch.bfloat16)
    got = sdpa_prefill("MATH", case, q)[0]().float()
    v = case.contiguous(case.pools[0])[1, 0].repeat_interleave(Q_HEADS // KV_HEADS, dim=0)
    torch.testing.assert_close(got[0], v[:, 0].float())
    assert got.shape == q.shape
    last = dataclasses.replace(case, q=q[127:])  # the last query sees all: it is a decode step
    torch.testing.assert_close(got[127:], reference(last), atol=0.02, rtol=0.02)


def test_sections() -> None:
    assert run.chosen(None) == run.SECTIONS
    assert run.chosen("topk, rows") == ("rows", "topk")
    with pytest.raises(FasaError, match="no such section: 'speed'"):
        run.chosen("rows,speed")
    assert one_line(RuntimeError("first\nsecond")) == "RuntimeError: first"
    assert one_line(KeyError()) == "KeyError: KeyError"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(FasaError, match="no CUDA GPU here"):
        kernels()


def test_nothing_is_timed_behind_the_profiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []

    def stand_in(name: str, result: Any) -> Callable[..., Any]:
        def section(*arguments: object, **options: object) -> Any:
            done.append(name)
            return result

        return section

    monkeypatch.setattr(run, "require_gpu", lambda: None)
    monkeypatch.setattr(run, "new_record", lambda *arguments: {"gpu": "Example"})
    monkeypatch.setattr(timing, "bandwidth", lambda: 4e12)
    monkeypatch.setattr(dense, "usable", lambda: ({}, {}))
    monkeypatch.setattr(rows, "rows", stand_in("rows", {"rows": [1], "dense": []}))
    monkeypatch.setattr(crossover, "crossover", stand_in("crossover", {}))
    monkeypatch.setattr(topk, "topk", stand_in("topk", {"rows": [2]}))
    monkeypatch.setattr(prefill, "prefill", stand_in("prefill", {}))
    monkeypatch.setattr(rows, "add_stages", lambda found: done.append(f"stages of {found}"))
    monkeypatch.setattr(topk, "add_stages", lambda found: done.append(f"stages of {found}"))
    written: list[int] = []
    run.run_kernels(run.SECTIONS, quick=True, commit=None, write=lambda result: written.append(len(done)))
    assert done == ["rows", "crossover", "topk", "prefill", "stages of [1]", "stages of [2]"]
    assert written == [1, 2, 3, 4, 5, 6]

    def unprofiled(found: object) -> None:
        raise RuntimeError("no profiler here")

    monkeypatch.setattr(rows, "add_stages", unprofiled)
    del done[:], written[:]
    run.run_kernels(run.SECTIONS, quick=True, commit=None, write=lambda result: written.append(len(done)))
    assert done[4:] == ["stages of [2]"] and written == [1, 2, 3, 4, 4, 5]
    assert "rows: stages left out: RuntimeError: no profiler here" in capsys.readouterr().out


def test_every_section(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sections, over tensors without contents: every call is made once instead of timed."""

    def replay_us(calls: list[Callable[[], Any]], repeats: int = 30) -> list[float]:
        calls[0]()
        return [float(len(calls))] * repeats

    def stages_us(calls: list[Callable[[], Any]]) -> dict[str, float]:
        calls[0]()
        return {"score_labels": 2.0, "select_and_attend": 3.0}

    for module in (rows, crossover, dense, topk, prefill):
        for stand_in in (replay_us, stages_us):
            if hasattr(module, stand_in.__name__):
                monkeypatch.setattr(module, stand_in.__name__, stand_in)
    monkeypatch.setattr(prefill, "timed", lambda calls, wanted, repeats: {"us": calls[0]().shape[0], "tflops": 1.0})
    monkeypatch.setattr(cache, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (130 << 30, 141 << 30))

    def broken(_: Paged) -> list[dense.Attend]:
        raise RuntimeError("out of memory")

    kernels: dict[str, dense.Kernel] = {"broken": broken, "fasa dense": fasa_dense}
    with FakeTensorMode():
        table = rows.rows(kernels, 4e12, quick=True, repeats=2)
        curve = crossover.crossover(kernels, 4e12, quick=True, repeats=2)
        selection = topk.topk(quick=True, repeats=2)
        assert not any("stages_us" in row for row in table["rows"])
        rows.add_stages(table["rows"])
        topk.add_stages(selection["rows"])
        long = prefill.prefill(quick=True, repeats=2)
    assert len(table["rows"]) == 14 and len(table["dense"]) == 2
    assert all(row["dense_kernel"] == "fasa dense" and row["fasa_us"] == row["dense_us"] for row in table["rows"])
    assert all(row["stages_us"] == {"score_labels": 2.0, "select_and_attend": 3.0} for row in table["rows"])
    assert len(curve["points"]) == 8 and curve["from"] == {"1": None, "16": None}
    assert selection["rows"][0]["fasa_select_and_attend_us"] == 3.0
    assert "stages_us" in selection["rows"][0]["kernels"]["torch.topk float32"]
    assert long["rows"][0]["kernels"]["fasa prefill"]["us"] == 4096
    record = {**new_record("kernels"), **table, "crossover": curve, "topk": selection, "prefill": long}
    assert "1.00x" in html_report([record])
