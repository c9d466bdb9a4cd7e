"""`fasa-trt bench`: times kernels and whole decode steps here, and reports records of such runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasa_trt.cli import options as opt

if TYPE_CHECKING:
    from fasa_trt.core.spec import SparseSpec

app = typer.Typer(
    name="bench",
    help="Time FASA against dense attention on this machine, and report what was measured.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write the record, JSON with raw samples.")]
Report = Annotated[Path | None, typer.Option("--report", help="Write an HTML page with tables and figures.")]


@app.command("e2e")
def e2e(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Checkpoint directory or model ID.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights of this shape, GPU only: llama-3.1-8b | llama-3.2-1b | qwen3-8b.",
            show_default="llama-3.1-8b",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto | cuda | cpu")] = "auto",
    contexts: Annotated[str | None, typer.Option(help="Tokens, like 8192,32768.")] = None,
    batches: Annotated[str | None, typer.Option(help="Sequences in a step, like 1,8.")] = None,
    budget: Annotated[int, typer.Option(help="Tokens that FASA attends to.")] = 256,
    dense_layers: opt.DenseLayers = None,
    repeats: Annotated[int, typer.Option(min=2, help="Timed steps of each kind.")] = 30,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")] = None,
    output: Output = None,
    report: Report = None,
    json_output: opt.Json = False,
) -> None:
    """Time whole decode steps, dense and with FASA, in one run.

    On a GPU: a CUDA graph a step, against the fastest dense attention kernel installed. On a CPU: onnxruntime, against
    an engine without FASA; give it a small --model.

    Example: fasa-trt bench e2e --model examples/models/fasa-tiny --device cpu --contexts 8192 --report report.html
    """
    from fasa_trt.core.errors import FasaError

    if model is not None and shape is not None:
        raise FasaError("--model and --shape exclude each other")
    points = points_of(contexts, batches)
    on_gpu = uses_gpu(device)
    if not on_gpu and (model is None or shape is not None):
        raise FasaError("on a CPU, bench e2e needs a checkpoint", hint="--model DIR, a small one")
    spec = sparse_spec(budget, dense_layers)
    with recording(output, json_output) as write:
        if on_gpu:
            record = _on_gpu(model, shape or "llama-3.1-8b", points, spec, repeats, write)
        else:
            assert model is not None
            record = _on_cpu(model, points, spec, repeats, threads, write)
    conclude(record, report, json_output)


@app.command("kernels")
def kernels(
    only: Annotated[str | None, typer.Option(help="Some of rows,crossover,topk,prefill.", show_default="all")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few shapes, few repeats.")] = False,
    output: Output = None,
    report: Report = None,
    json_output: opt.Json = False,
) -> None:
    """Time the CUDA kernels of one layer against the fastest dense kernels installed; needs a GPU.

    Example: fasa-trt bench kernels --quick --report kernels.html
    """
    from fasa_trt.bench.kernels.run import chosen, run_kernels

    sections = chosen(only)
    with recording(output, json_output) as write:
        record = run_kernels(sections, quick=quick, commit=None, write=write)
    conclude(record, report, json_output)


@app.command("report")
def report_(
    records: Annotated[list[Path], typer.Argument(help="Records of one run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file.")] = Path("report.html"),
) -> None:
    """Write an HTML page about records. Those of different runs are refused: their times cannot be compared.

    Example: fasa-trt bench report e2e.json -o e2e.html
    """
    from fasa_trt.bench.record import read_record
    from fasa_trt.bench.report import html_report
    from fasa_trt.cli.console import say
    from fasa_trt.core.atomic import write_bytes

    write_bytes(output, html_report([read_record(path) for path in records]).encode())
    say(f"wrote {output}")


def sparse_spec(budget: int, dense_layers: str | None) -> SparseSpec:
    """Raises FasaError for what is no list of layers, or an impossible budget."""
    from fasa_trt.cli.settings import layer_list
    from fasa_trt.core.spec import SparseSpec

    layers = layer_list(dense_layers)
    return SparseSpec(budget, dense_layers=SparseSpec.dense_layers if layers is None else tuple(layers))


def points_of(contexts: str | None, batches: str | None) -> list[tuple[int, int]] | None:
    """Every context with every batch; None where neither is given. Raises FasaError for what are no numbers."""
    if contexts is None and batches is None:
        return None
    lengths = _numbers("--contexts", contexts or "8192")
    return [(context, batch) for batch in _numbers("--batches", batches or "1") for context in lengths]


def uses_gpu(device: str) -> bool:
    """Raises FasaError for an unknown device, or a GPU that is not there."""
    import torch

    from fasa_trt.core.errors import FasaError

    if device not in ("auto", "cuda", "cpu"):
        raise FasaError(f"unknown device {device!r}", hint="auto, cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise FasaError("no CUDA GPU here", hint="--device cpu with a small --model")
    return device != "cpu" and torch.cuda.is_available()


@contextlib.contextmanager
def recording(output: Path | None, json_output: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields what a run calls after every row. Its remarks go to stderr where stdout is for JSON."""
    from fasa_trt.bench.record import write_record

    def write(record: dict[str, Any]) -> None:
        if output is not None:
            write_record(output, record)

    with contextlib.redirect_stdout(sys.stderr) if json_output else contextlib.nullcontext():
        yield write


def conclude(record: dict[str, Any], report: Path | None, json_output: bool) -> None:
    from rich.table import Table

    from fasa_trt.bench.report import html_report, tables_of
    from fasa_trt.cli.console import out, print_json, say
    from fasa_trt.core.atomic import write_bytes

    if report is not None:
        write_bytes(report, html_report([record]).encode())
        say(f"wrote {report}")
    if json_output:
        print_json(record)
        return
    where = record.get("gpu") or f"CPU ({record['cpu']}), no GPU was used"
    for table in tables_of(record):
        drawn = Table(*table.columns, title=f"{table.title}, on {where}")
        for row in table.rows:
            drawn.add_row(*row)
        out.print(drawn)


def _on_gpu(
    model: str | None,
    shape: str,
    points: list[tuple[int, int]] | None,
    spec: SparseSpec,
    repeats: int,
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    import torch

    from fasa_trt.bench.e2e import POINTS, check_points, run_e2e
    from fasa_trt.bench.record import new_record
    from fasa_trt.bench.shapes import config_of
    from fasa_trt.bench.weights import checkpoint_weights, random_weights
    from fasa_trt.core.checkpoint import open_checkpoint

    chosen = POINTS if points is None else points
    check_points(chosen, spec)
    record, device, dtype = new_record("e2e"), torch.device("cuda"), torch.bfloat16
    if model is None:
        weights, source = random_weights(config_of(shape), device=device, dtype=dtype), "random"
    else:
        checkpoint = open_checkpoint(model)
        weights = checkpoint_weights(checkpoint, device=device, dtype=dtype)
        source, shape = "the checkpoint's", checkpoint.path.name
    return run_e2e({**record, "weights": source}, shape, weights, chosen, spec, repeats=repeats, write=write)


def _on_cpu(
    model: str,
    points: list[tuple[int, int]] | None,
    spec: SparseSpec,
    repeats: int,
    threads: int | None,
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    from fasa_trt.bench.cpu import POINTS, run_cpu
    from fasa_trt.bench.record import new_record
    from fasa_trt.core.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model)
    record = {**new_record("e2e"), "weights": "the checkpoint's"}
    for fact in ("gpu", "gpu_memory", "driver", "cuda", "cudnn"):  # it may have a GPU, but that is not what is timed
        record.pop(fact, None)
    return run_cpu(record, checkpoint, points or POINTS, spec, repeats=repeats, threads=threads, write=write)


def _numbers(option: str, text: str) -> list[int]:
    from fasa_trt.core.errors import FasaError

    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise FasaError(f"{option} {text!r} is not a list of positive numbers", hint="for example 8192,32768")
    return found
