"""Whole decode steps on one GPU: dense against FASA, a CUDA graph each, in the same run with the same weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fasa_trt.bench.caches import Attend, CachedAttention, Labels, Place, Side, fasa_attend, no_attend
from fasa_trt.bench.kernels import dense
from fasa_trt.bench.kernels.cache import TOKENS, Paged, make_paged
from fasa_trt.bench.kernels.rows import fastest
from fasa_trt.bench.kernels.timing import median, replay_us
from fasa_trt.bench.linears import Choice, fastest_linears
from fasa_trt.bench.loop import DecodeLoop
from fasa_trt.bench.record import summary
from fasa_trt.bench.weights import Weights
from fasa_trt.core.errors import FasaError
from fasa_trt.core.labels import label_bytes, scale_bytes
from fasa_trt.core.spec import SparseSpec

POINTS = ((4096, 1), (8192, 16), (32768, 1), (32768, 8), (32768, 32), (131072, 1), (131072, 8))  # context, batch
MEMORY = 75 << 30  # bytes to stay within
SPARE = 5 << 30  # workspaces, activations, graphs, what is not torch's
HEADROOM = 64  # a step's context is between context - HEADROOM and context
CANDIDATES = 8  # caches that dense kernels are compared on
Write = Callable[[dict[str, Any]], None]


def run_e2e(
    record: dict[str, Any],
    shape: str,
    weights: Weights,
    points: Sequence[tuple[int, int]],
    spec: SparseSpec,
    *,
    repeats: int,
    write: Write,
    kernels: Mapping[str, dense.Kernel] = dense.KERNELS,
    memory: int = MEMORY,
) -> dict[str, Any]:
    """Adds to `record`, which `new_record` made, a row for each (context, batch). write gets it after every row.

    Raises FasaError for contexts that FASA has nothing to do with, and settings that the model does not allow.
    """
    check_points(points, spec)
    heads = (weights.heads, weights.kv_heads, weights.head_dim)
    known, missing = dense.usable(kernels, heads)
    if not known:
        raise FasaError(f"no dense kernel runs here to compare with: {missing}", hint="run fasa-trt doctor")
    spec = spec.resolve(
        head_dim=weights.head_dim,
        num_layers=len(weights.layers),
        max_seq_len=max(context for context, _ in points),
        quantised=True,
    )
    record.update(
        shape=shape,
        dtype=str(weights.dtype).removeprefix("torch."),
        layers=len(weights.layers),
        weight_bytes=weights.nbytes,
        sparse=spec.to_json(),
        labels="4bit",
        repeats=repeats,
        missing=missing,
        note="median milliseconds of one step, a CUDA graph each; random keys and labels; SDPA and FlashInfer attend "
        f"to exactly `context` tokens, the others to context - {HEADROOM} .. context",
        linear_us={},
        rows=[],
        skipped=[],
    )
    linears: dict[int, Choice] = {}
    for context, batch in points:
        start = time.perf_counter()
        torch.cuda.empty_cache()
        free = min(memory - torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]) - SPARE
        buffers = buffers_of(weights, context, batch, spec, free)
        if not buffers:
            record["skipped"].append({"context": context, "batch": batch, "why": "no memory for one layer's cache"})
            print(f"{context:7d} x {batch:3d}: skipped, no memory for one layer's cache", flush=True)
            continue
        if batch not in linears:
            linears[batch] = fastest_linears(weights, batch, min(repeats, 10))
            record["linear_us"].update(linears[batch].measured)
        row = measure(weights, context, batch, buffers, spec, known, linears[batch], repeats)
        row.update(run_id=record["run_id"], shape=shape, seconds=round(time.perf_counter() - start, 1))
        record["rows"].append(row)
        print(describe(row), flush=True)
        write(record)
    if not record["rows"]:
        raise FasaError("no point fits into the GPU's memory", hint="smaller contexts or batches")
    return record


def measure(
    weights: Weights,
    context: int,
    batch: int,
    buffers: int,
    spec: SparseSpec,
    kernels: Mapping[str, dense.Kernel],
    linears: Choice,
    repeats: int,
) -> dict[str, Any]:
    """One row. spec: resolved. Both sides and the step without attention use the same weights and the same pools."""
    place = Place.of(batch, context - HEADROOM, context, weights.device)
    heads = (weights.heads, weights.kv_heads, weights.head_dim)
    paged = dataclasses.replace(make_paged(context, batch, buffers, heads), lengths=place.lengths)
    candidates = dense.dense_us(dataclasses.replace(paged, pools=paged.pools[:CANDIDATES]), kernels, min(repeats, 10))
    name = fastest(candidates)["dense_kernel"]
    if name is None:
        raise FasaError(f"no dense kernel runs at {context} x {batch}", hint="fewer tokens")

    def step_ms(side: Side, others: Mapping[int, Side] | None = None) -> list[float]:
        tokens = torch.arange(batch, device=weights.device)
        loop = DecodeLoop(
            weights, CachedAttention(weights, paged, place, side, others), tokens, linears=linears.linears
        )
        return [round(us / 1e3, 5) for us in replay_us([loop.step], repeats, in_a_graph=1)]

    unlabelled = Labels.none(paged.pools)
    rest = step_ms(Side(unlabelled, no_attend))
    dense_samples = step_ms(Side(unlabelled, dense_attend(kernels[name], paged)))
    torch.cuda.empty_cache()  # of the kernel's own copies
    labels = Labels.random(paged.pools, n_tip_of(spec))
    ours = Side(unlabelled, dense_attend(dense.fasa_dense, paged))  # a dense layer of FASA's has the library's kernel
    fasa_samples = step_ms(
        Side(labels, fasa_attend(paged, labels, place, spec)), dict.fromkeys(spec.dense_layers, ours)
    )
    times = {"dense": median(dense_samples), "fasa": median(fasa_samples), "rest": median(rest)}
    return {
        "context": context,
        "batch": batch,
        "dense_ms": times["dense"],
        "dense_kernel": name,
        "fasa_ms": times["fasa"],
        "speedup": round(times["dense"] / times["fasa"], 3),
        "rest_ms": times["rest"],
        "attention_share": {side: round(1 - times["rest"] / times[side], 4) for side in ("dense", "fasa")},
        "tokens_per_second": {side: round(1e3 * batch / times[side], 1) for side in ("dense", "fasa")},
        "kv_buffers": buffers,
        "kv_bytes": len(weights.layers) * layer_bytes(weights, context, batch),
        "label_bytes": (len(weights.layers) - len(spec.dense_layers)) * labels_bytes(weights, context, batch, spec),
        "dense_candidates_us": {kernel: median(samples) for kernel, samples in candidates.items()},
        "linears": linears.names,
        "spread_ms": {"dense": summary(dense_samples), "fasa": summary(fasa_samples), "rest": summary(rest)},
        "samples_ms": {"dense": dense_samples, "fasa": fasa_samples, "rest": rest},
    }


def dense_attend(kernel: dense.Kernel, paged: Paged) -> Attend:
    attends = kernel(paged)
    return lambda cache, q: attends[cache](q)


def check_points(points: Sequence[tuple[int, int]], spec: SparseSpec) -> None:
    """Raises FasaError for contexts that are not whole blocks or within the budget, and batches below 1."""
    for context, batch in points:
        if context % TOKENS or context - HEADROOM <= spec.budget:
            raise FasaError(
                f"a context of {context} cannot be measured with a budget of {spec.budget}",
                hint=f"a multiple of {TOKENS}, larger than {spec.budget + HEADROOM}",
            )
        if batch < 1:
            raise FasaError(f"a batch of {batch} cannot be measured", hint="1 or more")


def layer_bytes(weights: Weights, context: int, batch: int) -> int:
    """Of one layer's keys and values."""
    return 2 * weights.kv_heads * weights.head_dim * weights.dtype.itemsize * context * batch


def labels_bytes(weights: Weights, context: int, batch: int, spec: SparseSpec) -> int:
    """Of one layer's 4-bit labels and their scales."""
    return weights.kv_heads * (label_bytes("int4", n_tip_of(spec)) + scale_bytes("int4")) * context * batch


def n_tip_of(spec: SparseSpec) -> int:
    assert spec.n_tip is not None  # resolved
    return spec.n_tip


def buffers_of(weights: Weights, context: int, batch: int, spec: SparseSpec, free: int) -> int:
    """Caches that `free` bytes hold, one a layer at most. Dense kernels may want a copy in their own layout."""
    one = 2 * layer_bytes(weights, context, batch) + labels_bytes(weights, context, batch, spec)
    return max(0, min(len(weights.layers), free // one))


def describe(row: Mapping[str, Any]) -> str:
    share = row["attention_share"]
    return (
        f"{row['context']:7d} x {row['batch']:3d}: dense {row['dense_ms']:7.3f} ms ({row['dense_kernel']}, attention "
        f"{share['dense']:.0%}), fasa {row['fasa_ms']:7.3f} ms ({share['fasa']:.0%}), {row['speedup']:.2f}x, "
        f"{row['kv_buffers']} KV buffers"
    )
