"""How kernels are timed: replays of CUDA graphs for a whole step, the profiler for its parts."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Calls = list[Callable[[], Any]]
WARM_UP = 3  # replays
CALLS_IN_A_GRAPH = 8  # at least: launching the graph must not show


def replay_us(calls: Calls, repeats: int = 30, in_a_graph: int = CALLS_IN_A_GRAPH) -> list[float]:
    """Microseconds of one call, for each of `repeats` replays of a graph that makes every call at least once, and
    `in_a_graph` of them at least.

    The calls work on different buffers, so that the L2 cache cannot serve the next one.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
            call()
    torch.cuda.current_stream().wait_stream(side)
    rounds = -(-in_a_graph // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    samples = []
    for _ in range(repeats + WARM_UP):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        samples.append(round(start.elapsed_time(stop) * 1e3 / (rounds * len(calls)), 3))
    return samples[WARM_UP:]


def stages_us(calls: Calls) -> dict[str, float]:
    """Mean microseconds a call spends in each kernel, by the profiler. It runs kernels apart: where a kernel starts
    while the one before it ends, the stages add up to more than the step takes. Nothing should be timed behind it: in
    a process in which the profiler has run, replays took 0.4 to 2.4 us a call longer on an H200."""
    from torch.profiler import ProfilerActivity, profile

    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = -(-CALLS_IN_A_GRAPH // len(calls))
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(rounds):
            for call in calls:
                call()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in found.key_averages():
        if event.device_time_total:
            name = kernel_name(event.key)
            times[name] = times.get(name, 0.0) + event.device_time_total / (rounds * len(calls))
    return {name: round(time, 2) for name, time in times.items()}


def kernel_name(signature: str) -> str:
    """`score` of "void fasa::(anonymous namespace)::score<float, 8>(Params)": no namespaces, no template arguments."""
    plain = signature.replace("(anonymous namespace)::", "").replace("<unnamed>::", "")
    found = re.match(r"(?:void )?(?:\w+::)*(\w+)", plain)
    return found.group(1) if found else signature


def bandwidth() -> float:
    """Bytes per second that a large element-wise kernel moves, read and written."""
    a, b = (torch.zeros(1 << 30, device="cuda") for _ in range(2))

    def negate() -> Tensor:
        return torch.neg(a, out=b)

    moved = 2 * a.numel() * a.element_size()
    return moved / (median(replay_us([negate], 10)) * 1e-6)


def median(samples: Sequence[float]) -> float:
    return statistics.median(samples)
