"""`fasa-trt build`: calibrate unless there is a profile, export, and write an engine directory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasa_trt.cli import options as opt

if TYPE_CHECKING:
    from fasa_trt.core.checkpoint import Checkpoint
    from fasa_trt.core.profile import Profile
    from fasa_trt.export.config import BuildConfig


def build(
    model: opt.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Engine directory to write.")] = Path("engine"),
    profile: Annotated[
        Path | None,
        typer.Option(help="Use this profile instead of calibrating.", rich_help_panel=opt.CALIBRATION),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Calibrate on this file, directory or .jsonl.", rich_help_panel=opt.CALIBRATION),
    ] = None,
    samples: Annotated[int, typer.Option(help="Sequences to calibrate on.", rich_help_panel=opt.CALIBRATION)] = 8,
    length: Annotated[int, typer.Option(help="Tokens of each.", rich_help_panel=opt.CALIBRATION)] = 8192,
    seed: Annotated[int, typer.Option(help="Picks the calibration windows.", rich_help_panel=opt.CALIBRATION)] = 0,
    target: opt.Target = None,
    dtype: opt.Dtype = None,
    max_seq_len: opt.MaxSeqLen = None,
    max_batch_size: opt.MaxBatchSize = None,
    budget: opt.Budget = None,
    n_tip: opt.NTip = None,
    reduction: opt.Reduction = None,
    rule: opt.Rule = None,
    sink: opt.Sink = None,
    recent: opt.Recent = None,
    dense_layers: opt.DenseLayers = None,
    config_file: opt.ConfigFile = None,
    settings: opt.Settings = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved settings and sizes, write nothing.")
    ] = False,
    force: opt.Force = False,
    json_output: opt.Json = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Make an engine directory from a model, ready for [bold]fasa-trt generate[/].

    Calibrates the model's dominant frequency chunks (or takes --profile), bakes them into an exported model and
    builds it for a target.

    Example: fasa-trt build --model meta-llama/Llama-3.1-8B-Instruct --budget 256 -o llama-8b
    """
    from fasa_trt.cli.console import progress, say
    from fasa_trt.cli.settings import resolve
    from fasa_trt.core.checkpoint import open_checkpoint
    from fasa_trt.core.engine_dir import check_replaceable
    from fasa_trt.core.profile import Profile
    from fasa_trt.runtime.targets import default_target

    fallback = default_target()
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    config = resolve(
        checkpoint, config_file, settings, fallback,
        target=target, dtype=dtype, max_seq_len=max_seq_len, max_batch_size=max_batch_size, budget=budget, n_tip=n_tip,
        reduction=reduction, rule=rule, sink=sink, recent=recent, dense_layers=dense_layers,
    )  # fmt: skip
    measured = None if profile is None else Profile.load(profile)
    if dry_run:
        _describe(checkpoint, measured, config, json_output)
        return
    check_replaceable(output, force)
    if target is None:
        say(f"target: [bold]{config.target}[/]")
    from fasa_trt.export.engine import build_engine

    with progress() as report:
        if measured is None:
            measured = _calibrate(
                checkpoint,
                report,
                text=text,
                samples=samples,
                length=length,
                seed=seed,
                greedy=config.rule == "greedy",
                trust_remote_code=trust_remote_code,
            )
        command = "fasa-trt " + " ".join(sys.argv[1:])
        engine = build_engine(checkpoint, measured, config, output, force=force, command=command, report=report)
    if json_output:
        from fasa_trt.cli.console import print_json

        print_json({"engine": str(engine.path), "config": config.to_json()})
    else:
        layers = engine.fasa["layers"]
        sparse = sum(layer["n_tip"] > 0 for layer in layers)
        say(
            f"[green]built[/] {engine.path}: budget {config.budget}, n_tip {config.n_tip}, {config.dtype}, "
            f"{sparse} of {len(layers)} layers sparse"
        )
        if not sparse:
            say(
                "[yellow]warning:[/] FASA has nothing to do: every layer is dense, has no RoPE or slides a short window"
            )
        if config.target == "onnxruntime":
            say(f'try it: fasa-trt generate {output} --prompt "..."')


def _calibrate(checkpoint: Checkpoint, report: Any, **options: Any) -> Profile:
    from fasa_trt.calibrate.calibrate import calibrate as run
    from fasa_trt.cli.console import say

    calibration = run(checkpoint, progress=lambda done, total: report("calibrate", done, total), **options)
    for warning in calibration.warnings():
        say(f"[yellow]warning:[/] {warning}")
    return calibration.profile


def _describe(checkpoint: Checkpoint, profile: Profile | None, config: BuildConfig, json_output: bool) -> None:
    from rich.table import Table

    from fasa_trt.cli.console import human_bytes, out, print_json
    from fasa_trt.export.engine import estimate

    sizes = estimate(checkpoint, profile, config)
    if json_output:
        print_json({"config": config.to_json(), "sizes": sizes})
        return
    table = Table("setting", "value", title=f"would build {checkpoint.path.name}")
    for key, value in config.to_json().items():
        table.add_row(key, str(value))
    table.add_section()
    table.add_row("sparse layers", f"{sizes['sparse_layers']} of {sizes['layers']}")
    table.add_row("weights", human_bytes(sizes["weight_bytes"]))
    table.add_row("KV cache per token", human_bytes(sizes["kv_bytes_per_token"]))
    table.add_row("KV cache, all rows full", human_bytes(sizes["kv_bytes"]))
    table.add_row("KV read per cached token, dense", human_bytes(sizes["kv_read_per_token_dense"]))
    fixed = human_bytes(sizes["kv_read_fixed_fasa"])
    table.add_row(
        "KV read per cached token, FASA", f"{human_bytes(sizes['kv_read_per_token_fasa'])}, and {fixed} a step"
    )
    out.print(table)
