"""`fasa-trt serve` under load: many streaming clients, every text checked, against one request at a time.

python -m benchmarks.serving_load --minutes 3 --check
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.common import ROOT, SAMPLE_MODEL, main, run_facts, write_result
from fasa_trt.bench.cpu import random_profile
from fasa_trt.bench.record import summary
from fasa_trt.cli.console import out, say
from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.engine import build_engine
from fasa_trt.runtime.generate import load
from fasa_trt.runtime.sampling import Sampling

DEFAULT_OUTPUT = "benchmarks/results/cpu/serving-load.json"
TARGET = 2.5  # times the throughput of one request at a time
MEMORY_TARGET = 1.05  # times the resident memory after the warm-up
MODEL = "load"
LINES = ("def {}(values):\n    ", "class {}:\n    def __init__(self", "import os\nimport {}", "# {} of a list\nfor ")
NAMES = ("largest", "Stack", "counter", "parse", "Node", "total", "reader", "config")


@dataclass(frozen=True)
class Job:
    """A request, and what the engine answers when it is alone. Half of the jobs draw, half are greedy."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int
    text: str
    tokens: int

    def body(self) -> dict[str, Any]:
        asked = {"prompt": self.prompt, "max_tokens": self.max_tokens, "temperature": self.temperature}
        return {**asked, "seed": self.seed, "stream": True, "stream_options": {"include_usage": True}}


@dataclass
class Tally:
    """Of one phase. wrong: answers that were not the expected ones, as they came."""

    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_text: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def serving_load(
    model: Annotated[str, typer.Option(help="Checkpoint that is served.", show_default="fasa-tiny")] = str(
        SAMPLE_MODEL
    ),
    clients: Annotated[int, typer.Option(min=1, help="That ask at the same time.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the engine's batch; other clients wait.")] = 16,
    minutes: Annotated[float, typer.Option(help="Of load, in all rounds together.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="That the load is split into.")] = 6,
    alone_seconds: Annotated[float, typer.Option(help="Of one request at a time, beside each round.")] = 10.0,
    max_seq_len: Annotated[int, typer.Option(min=96, help="Of the engine.")] = 256,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine.", show_default="all cores")] = None,
    output: Annotated[Path, typer.Option(help="Result file.", show_default=DEFAULT_OUTPUT)] = ROOT / DEFAULT_OUTPUT,
    check: Annotated[
        bool, typer.Option("--check", help=f"Exit with 1 unless all texts are right and the gain is {TARGET:g}x.")
    ] = False,
) -> None:
    """Load a server with streaming clients, each of which asks again as soon as it has its answer.

    The engine has a profile of random rankings: the texts are nonsense, but reproducible. Each is first generated
    alone, in this process; what a client gets must be that text, and as many tokens. One request at a time is measured
    on the same server between rounds of load; a round counts against the two beside it. Clients and server share the
    processor.

    Example: python -m benchmarks.serving_load --clients 8 --minutes 0.5 --output load.json
    """
    facts = run_facts()
    with tempfile.TemporaryDirectory(prefix="fasa-load-") as directory:
        checkpoint = open_checkpoint(model)
        flags = {"max_seq_len": max_seq_len, "max_batch_size": batch}
        config = BuildConfig.resolve(checkpoint, flags={**flags, "budget": min(256, max_seq_len // 2)})
        engine_dir = Path(directory) / MODEL
        build_engine(checkpoint, random_profile(checkpoint, 0), config, engine_dir)
        jobs = make_jobs(engine_dir, max(clients, 8), max_seq_len, threads)
        with server(engine_dir, threads) as url:
            seconds = 60 * minutes / rounds
            result = asyncio.run(
                measure(url, jobs, clients, rounds=rounds, seconds=seconds, alone_seconds=alone_seconds)
            )
    settings = {"clients": clients, "batch": batch, "threads": threads, "minutes": minutes, "config": config.to_json()}
    result = {"benchmark": "serving_load", **facts, "model": checkpoint.path.name, **settings, **result}
    show(result)
    write_result(output, result)
    if check and not result["met"]:
        raise typer.Exit(1)


def make_jobs(engine_dir: Path, count: int, max_seq_len: int, threads: int | None) -> list[Job]:
    """Different prompts of different lengths, with what the engine answers to each alone."""
    engine = load(engine_dir, threads=threads, provider="cpu")
    jobs = []
    for number in range(count):
        line, name = LINES[number % len(LINES)], NAMES[number // len(LINES) % len(NAMES)]
        prompt = line.format(f"{name}_{number}") * (1 + number % 3)
        temperature = 0.8 * (number % 2)
        length = min(32 + number % 5 * 16, max_seq_len - len(engine.encode(prompt)))
        sampling = Sampling(temperature, seed=number)
        (answer,) = engine.generate(prompt, max_new_tokens=length, sampling=sampling)
        jobs.append(Job(prompt, length, temperature, number, answer.text, len(answer.tokens)))
    return jobs


@contextlib.contextmanager
def server(engine_dir: Path, threads: int | None) -> Iterator[str]:
    """`fasa-trt serve` in a process of its own, on a free loopback port; yields its URL."""
    command = [sys.executable, "-m", "fasa_trt.cli.main", "serve", str(engine_dir), "--port", "0"]
    command += [] if threads is None else ["--threads", str(threads)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        if "http://" not in said:
            raise FasaError(f"the server did not start: {said.strip() or process.wait()}")
        yield "http://" + said.partition("http://")[2].strip().removesuffix("/v1")
    finally:
        process.terminate()
        process.wait(60)


async def measure(
    url: str, jobs: list[Job], clients: int, *, rounds: int, seconds: float, alone_seconds: float
) -> dict[str, Any]:
    """Rounds of load, with one request at a time between them, so that both meet the same other work on the machine."""
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)) as http:
        await drive(http, jobs, clients, 0)  # every client once: caches and buffers are as large as they get
        alone, load = [await drive(http, jobs, 1, alone_seconds)], []
        memory = [await resident_bytes(http)]
        for number in range(rounds):
            load.append(await drive(http, jobs, clients, seconds))
            memory.append(await resident_bytes(http))
            alone.append(await drive(http, jobs, 1, alone_seconds))
            say(f"round {number + 1} of {rounds}: {load[-1].rate:.0f} tokens/s, alone {alone[-1].rate:.0f}")
        metrics = (await http.get("/metrics")).text
    return conclude(alone, load, memory, metrics)


async def drive(http: httpx.AsyncClient, jobs: list[Job], clients: int, seconds: float) -> Tally:
    """Each client asks for one job after the other until the time is over, and at least once."""
    tally, todo = Tally(), itertools.cycle(jobs)
    started = time.perf_counter()

    async def client() -> None:
        while True:
            await ask(http, next(todo), tally)
            if time.perf_counter() - started >= seconds:
                return

    await asyncio.gather(*(client() for _ in range(clients)))
    tally.seconds = time.perf_counter() - started
    return tally


async def ask(http: httpx.AsyncClient, job: Job, tally: Tally) -> None:
    started, text, tokens = time.perf_counter(), "", 0
    async for chunk in chunks(http, job.body()):
        for choice in chunk.get("choices", ()):
            if choice["text"] and not text:
                tally.first_text.append(time.perf_counter() - started)
            text += choice["text"]
        tokens = chunk.get("usage", {}).get("completion_tokens", tokens)
    if (text, tokens) != (job.text, job.tokens):
        tally.wrong.append(f"{job.prompt!r}: {tokens} tokens {text!r}, not {job.tokens} {job.text!r}")
    tally.answers += 1
    tally.tokens += tokens


async def chunks(http: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise FasaError(f"status {response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


async def resident_bytes(http: httpx.AsyncClient) -> int:
    """Of the server; 0 where the system does not tell."""
    return int(sample((await http.get("/metrics")).text, "process_resident_memory_bytes"))


def sample(metrics: str, name: str) -> float:
    """Sum of the samples of a metric in Prometheus' text format."""
    lines = [line for line in metrics.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def conclude(alone: list[Tally], load: list[Tally], memory: list[int], metrics: str) -> dict[str, Any]:
    """alone: before the first round, and after each. The gain is the median of the rounds' own gains."""
    gains = [
        2 * tally.rate / (before.rate + after.rate)
        for tally, (before, after) in zip(load, itertools.pairwise(alone), strict=True)
    ]
    gain = statistics.median(gains)
    wrong = [text for tally in (*alone, *load) for text in tally.wrong]
    growth = memory[-1] / memory[0] if memory[0] else 1.0
    return {
        "answers": sum(tally.answers for tally in load),
        "tokens": sum(tally.tokens for tally in load),
        "tokens_per_second": {
            "load": sum(tally.tokens for tally in load) / sum(tally.seconds for tally in load),
            "alone": sum(tally.tokens for tally in alone) / sum(tally.seconds for tally in alone),
            "load_rounds": [round(tally.rate, 1) for tally in load],
            "alone_rounds": [round(tally.rate, 1) for tally in alone],
        },
        "gain": gain,
        "gains": gains,
        "target": TARGET,
        "first_text_seconds": {
            "alone": summary([seconds for tally in alone for seconds in tally.first_text]),
            "load": summary([seconds for tally in load for seconds in tally.first_text]),
        },
        "wrong": len(wrong),
        "wrong_examples": wrong[:3],
        "resident_bytes": memory,
        "memory_growth": growth,
        "server_cpu_seconds": sample(metrics, "process_cpu_seconds_total"),
        "met": not wrong and gain >= TARGET and growth <= MEMORY_TARGET,
    }


def show(result: dict[str, Any]) -> None:
    rates, first = result["tokens_per_second"], result["first_text_seconds"]
    out.print(f"{result['answers']} answers of {result['clients']} clients, {result['wrong']} wrong")
    out.print(f"tokens/s: {rates['load']:.0f}, one at a time {rates['alone']:.0f}: {result['gain']:.2f}x")
    out.print(f"first text: median {first['load']['median']:.2f} s, alone {first['alone']['median']:.3f} s")
    out.print(f"resident memory: x{result['memory_growth']:.3f} over the load")
    out.print(f"target: no wrong text, {TARGET:g}x, memory flat: {'met' if result['met'] else '[red]missed[/]'}")


if __name__ == "__main__":
    main(serving_load)
