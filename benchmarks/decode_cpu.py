"""One decode step on the CPU, dense and with FASA, at a long context.

python -m benchmarks.decode_cpu --check
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from benchmarks.common import ROOT, SAMPLE_MODEL, main, run_facts, write_result
from benchmarks.pair import dense_and_fasa
from fasa_trt.bench.cpu import Timed, filled
from fasa_trt.bench.record import summary
from fasa_trt.cli import options as opt
from fasa_trt.cli.console import out, progress
from fasa_trt.cli.settings import layer_list
from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.export.config import BuildConfig
from fasa_trt.runtime.traffic import kv_elements_read

DEFAULT_OUTPUT = "benchmarks/results/cpu/decode.json"
TARGET = 0.5  # of the dense step's time
SHORT = 1  # tokens in the cache of the step that stands for everything but attention
WARM_UP = 2  # steps before each block: the other engine's memory leaves the processor's caches


def decode_cpu(
    model: Annotated[str, typer.Option(help="Checkpoint whose shape is measured.", show_default="fasa-tiny")] = str(
        SAMPLE_MODEL
    ),
    context: Annotated[int, typer.Option(min=2, help="Tokens that a step attends to, its own included.")] = 16384,
    budget: Annotated[int | None, typer.Option(help="Tokens that FASA attends to.", show_default="256")] = None,
    n_tip: Annotated[int | None, typer.Option(help="Chunks that FASA scores.", show_default="3/8 of them")] = None,
    dense_layers: opt.DenseLayers = None,
    rounds: Annotated[int, typer.Option(min=2, help="Blocks of each kind.")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps in a block.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")] = None,
    seed: Annotated[int, typer.Option(help="Of the profile and the tokens in the cache.")] = 0,
    output: Annotated[Path, typer.Option(help="Result file.", show_default=DEFAULT_OUTPUT)] = ROOT / DEFAULT_OUTPUT,
    check: Annotated[
        bool, typer.Option("--check", help=f"Exit with 1 unless a FASA step takes at most {TARGET:g} of a dense one.")
    ] = False,
) -> None:
    """Time decode steps of one sequence on the CPU: a dense engine against a FASA engine of the same checkpoint.

    The dense engine is exported without a profile, so nothing of FASA is in it. The FASA engine has default settings,
    but a profile of random rankings, and the cache holds random tokens: the time depends on neither, the text would.
    Blocks of dense, FASA and short steps take turns. Short steps run on a second dense engine with one token in its
    cache: they are what a step costs without attention. [italic]attention[/] is the rest, and for FASA includes
    scoring, selection and gathering.

    Example: python -m benchmarks.decode_cpu --context 8192 --threads 1 --output decode-8k.json
    """
    facts = run_facts()
    checkpoint = open_checkpoint(model)
    flags = {
        "budget": budget,
        "n_tip": n_tip,
        "dense_layers": layer_list(dense_layers),
        "max_seq_len": context,
        "max_batch_size": 1,
    }
    config = BuildConfig.resolve(checkpoint, flags=flags)
    if context <= config.budget + 1:
        raise FasaError(f"a context of {context} is within the budget: FASA is dense there", hint="raise --context")
    with tempfile.TemporaryDirectory(prefix="fasa-decode-") as directory, progress() as report:
        dense, fasa = dense_and_fasa(checkpoint, config, Path(directory), seed)
        engines = {
            name: filled(engine, length, 1, seed, threads, progress=lambda *done, name=name: report(name, *done))
            for name, engine, length in (
                ("dense", dense, context - 1),
                ("fasa", fasa, context - 1),
                ("short", dense, SHORT),
            )
        }
        samples: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(rounds):
            block(engines, samples, steps, backwards=number % 2 == 1)
            report("rounds", number + 1, rounds)
        backend = engines["fasa"].backend.describe()
    read, full = kv_elements_read(fasa, np.array([context]), sparse=True)
    result = {
        "benchmark": "decode_cpu",
        **facts,
        "model": checkpoint.path.name,
        "weights": "the checkpoint's",
        "profile": "random rankings",
        "cache": "prefill of random tokens",
        "context": context,
        "batch": 1,
        "config": config.to_json(),
        "threads": threads,
        "backend": backend,
        "seed": seed,
        "kv_share_read": read / full,
        **conclude(samples),
    }
    show(result)
    write_result(output, result)
    if check and not result["met"]:
        raise typer.Exit(1)


def block(engines: Mapping[str, Timed], samples: Mapping[str, list[float]], steps: int, *, backwards: bool) -> None:
    """Some steps of each engine; every other round in reverse, so that drift meets all alike."""
    for name in sorted(engines, reverse=backwards):
        for _ in range(WARM_UP):
            engines[name].step()
        samples[name] += [engines[name].step() for _ in range(steps)]


def conclude(samples: Mapping[str, list[float]]) -> dict[str, Any]:
    """Times in milliseconds; ratios of medians."""
    times = {name: summary([1e3 * seconds for seconds in values]) for name, values in samples.items()}
    dense, fasa, short = (times[name]["median"] for name in ("dense", "fasa", "short"))
    return {
        "step_ms": times,
        "attention_ms": {"dense": dense - short, "fasa": fasa - short},
        "step_ratio": fasa / dense,
        "attention_ratio": (fasa - short) / (dense - short),
        "target": TARGET,
        "met": fasa <= TARGET * dense,
        "samples_ms": {name: [round(1e3 * seconds, 4) for seconds in values] for name, values in samples.items()},
    }


def show(result: dict[str, Any]) -> None:
    title = f"{result['model']}, {result['context']} tokens, batch 1, budget {result['config']['budget']}"
    table = Table("decode", "KV read", "step, ms", "quartiles", "attention, ms", "tokens/s", title=title)
    for name, share in (("dense", 1.0), ("fasa", result["kv_share_read"])):
        times, attention = result["step_ms"][name], result["attention_ms"][name]
        spread = f"{times['quartile_1']:.2f} - {times['quartile_3']:.2f}"
        pace = f"{1e3 / times['median']:.0f}"
        table.add_row(name, f"{share:.0%}", f"{times['median']:.2f}", spread, f"{attention:.2f}", pace)
    table.add_row("ratio", "", f"{result['step_ratio']:.3f}", "", f"{result['attention_ratio']:.3f}", "")
    out.print(table)
    verdict = "met" if result["met"] else "[red]missed[/]"
    out.print(f"target: a FASA step takes at most {TARGET:g} of a dense one: {verdict}")


if __name__ == "__main__":
    main(decode_cpu)
