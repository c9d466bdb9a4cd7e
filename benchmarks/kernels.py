"""The CUDA decode step against the fastest dense attention of the same run, on one GPU.

    python -m benchmarks.kernels --output benchmarks/results/h200/kernels.json

Llama-3.1-8B's attention (32 query heads on 8 KV heads, head_dim 128), microseconds per layer and step: medians of
CUDA-graph replays over several buffers, so that the L2 cache cannot serve the next step.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import run_facts, write_result

Q_HEADS, KV_HEADS, HEAD_DIM, TOKENS = 32, 8, 128, 64
BUDGET, SINK, RECENT = 256, 4, 32
SHAPES = ((4096, 1), (8192, 16), (32768, 1), (32768, 8), (32768, 32), (131072, 1), (131072, 8))
LABELS = (("int4", 32), ("int8", 32), ("prefix", 16), ("prefix", 24))
ROTATE_BYTES = 1 << 30  # of cache that the copies hold together, at least


def replay_us(calls: Sequence[Callable[[], Any]], repeats: int = 30) -> list[float]:
    """Microseconds of one call, for each of `repeats` replays of a graph that makes every call at least once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
            call()
    torch.cuda.current_stream().wait_stream(side)
    rounds = max(1, 8 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    samples = []
    for _ in range(repeats + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(stop) * 1e3 / (rounds * len(calls)))
    return samples[3:]


def stage_us(call: Callable[[], Any]) -> dict[str, float]:
    """Mean microseconds of each kernel, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(10):
            call()
        torch.cuda.synchronize()
    names = {"score": "score_", "select_and_attend": "select_and_attend"}
    times = {
        stage: [event.device_time_total / event.count for event in found.key_averages() if part in event.key]
        for stage, part in names.items()
    }
    return {stage: round(sum(values), 2) for stage, values in times.items() if values}


def dense_us(length: int, batch: int, copies: int) -> dict[str, list[float]]:
    """torch SDPA, by backend; contiguous caches, which is the easiest case for it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(batch, Q_HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    caches = [
        torch.randn(2, batch, KV_HEADS, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(copies)
    ]
    found = {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):

        def attend(cache: Tensor, backend: Any = backend) -> None:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(q, cache[0], cache[1], enable_gqa=True)

        try:
            found[f"torch SDPA {name}"] = replay_us([lambda c=cache: attend(c) for cache in caches])  # type: ignore[misc]
        except RuntimeError:
            continue
    return found


def fasa_calls(length: int, batch: int, copies: int, kind: str, n_tip: int) -> list[Callable[[], Tensor]]:
    """Decode steps over `copies` independent pools with shuffled blocks and random labels."""
    from fasa_trt.plugins.torch.ops import decode

    blocks = length // TOKENS
    q = torch.randn(batch, Q_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((batch,), length, device="cuda", dtype=torch.int32)
    width = {"prefix": 0, "int4": n_tip, "int8": 2 * n_tip}[kind]
    calls: list[Callable[[], Tensor]] = []
    for _ in range(copies):
        pool = torch.randn(batch * blocks, 1, 2, KV_HEADS, TOKENS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        order = torch.randperm(batch * blocks, device="cuda", dtype=torch.int32).view(batch, 1, blocks) * 2
        offsets = torch.cat([order, order + 1], dim=1).contiguous()
        labels = torch.randint(0, 256, (batch * blocks, TOKENS, KV_HEADS, width), device="cuda", dtype=torch.uint8)
        scales = torch.rand(batch * blocks, TOKENS, KV_HEADS, device="cuda").half() + 0.5
        cache = (q, pool, 0, offsets, lengths, labels, scales, kind, n_tip, length)
        calls.append(partial(decode, *cache, BUDGET, SINK, RECENT, HEAD_DIM**-0.5, 0.0, "sum"))
    return calls


def copy_bandwidth() -> float:
    """Bytes per second that a large element-wise kernel moves, read and written."""
    a, b = (torch.zeros(1 << 30, device="cuda") for _ in range(2))
    return 8 * a.numel() / (statistics.median(replay_us([lambda: torch.neg(a, out=b)], 10)) * 1e-6)


def rows(shapes: Sequence[tuple[int, int]], labels: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    bandwidth = copy_bandwidth()
    print(f"bandwidth {bandwidth / 1e12:.2f} TB/s", flush=True)
    found = []
    for length, batch in shapes:
        cache = 2 * KV_HEADS * HEAD_DIM * 2 * length * batch
        copies = max(1, min(8, -(-ROTATE_BYTES // cache)))
        dense = dense_us(length, batch, copies)
        torch.cuda.empty_cache()
        fastest = min(dense, key=lambda name: statistics.median(dense[name]))
        for kind, n_tip in labels:
            calls = fasa_calls(length, batch, copies, kind, n_tip)
            samples = replay_us(calls)
            width = {"prefix": 4 * n_tip, "int8": 2 * n_tip + 2, "int4": n_tip + 2}[kind]
            moved = batch * KV_HEADS * (length * width + BUDGET * 4 * HEAD_DIM)
            row: dict[str, Any] = {
                "context": length,
                "batch": batch,
                "dtype": "bfloat16",
                "labels": {"int4": "4bit", "int8": "8bit"}.get(kind, kind),
                "n_tip": n_tip,
                "reduction": "sum",
                "budget": BUDGET,
                "dense_us": statistics.median(dense[fastest]),
                "dense_kernel": fastest,
                "fasa_us": statistics.median(samples),
                "stages_us": stage_us(calls[0]),
                "limit_us": moved / bandwidth * 1e6,
                "dense_samples": dense,
                "fasa_samples": samples,
            }
            found.append(row)
            print(
                f"{length:7d} x {batch:3d} {row['labels']:>6} n_tip {n_tip}: dense {row['dense_us']:7.1f} ({fastest}), "
                f"fasa {row['fasa_us']:6.1f} {row['stages_us']}, limit {row['limit_us']:6.1f}, "
                f"{row['dense_us'] / row['fasa_us']:5.2f}x",
                flush=True,
            )
            del calls
            torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--commit", help="of the kernels, where this is not a git checkout")
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    arguments = parser.parse_args()
    shapes = ((32768, 8), (131072, 1)) if arguments.quick else SHAPES
    result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows(shapes, LABELS)}
    if arguments.output:
        facts = run_facts()
        write_result(arguments.output, {**facts, "commit": arguments.commit or facts["commit"], **result})


if __name__ == "__main__":
    main()
