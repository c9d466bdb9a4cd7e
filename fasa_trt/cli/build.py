"""`fasa-trt build`: calibrate unless there is a profile, export, and write an engine directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasa_trt.cli import options as opt

if TYPE_CHECKING:
    from fasa_trt.core.checkpoint import Checkpoint
    from fasa_trt.core.engine_dir import EngineDirectory
    from fasa_trt.core.profile import Profile
    from fasa_trt.export.config import BuildConfig


FINISHING = ("from_onnx", "output", "arch", "force", "json_output")  # parameters that --from-onnx goes with


def build(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Checkpoint directory or Hugging Face model ID.")
    ] = None,
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
    lowering: opt.Lowering = None,
    arch: opt.Arch = None,
    dtype: opt.Dtype = None,
    max_seq_len: opt.MaxSeqLen = None,
    max_batch_size: opt.MaxBatchSize = None,
    max_num_tokens: opt.MaxNumTokens = None,
    tokens_per_block: opt.TokensPerBlock = None,
    tp_size: opt.TpSize = None,
    pp_size: opt.PpSize = None,
    budget: opt.Budget = None,
    n_tip: opt.NTip = None,
    labels: opt.Labels = None,
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
    stop_before_engine: Annotated[
        bool,
        typer.Option(
            "--stop-before-engine", help="Leave the ONNX model, to be finished where the GPU and TensorRT are."
        ),
    ] = False,
    from_onnx: Annotated[
        Path | None,
        typer.Option("--from-onnx", help="Finish what --stop-before-engine wrote, in place of --model."),
    ] = None,
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
    from fasa_trt.cli.settings import command_line, gpu_architecture, resolve
    from fasa_trt.core.checkpoint import open_checkpoint
    from fasa_trt.core.engine_dir import check_replaceable
    from fasa_trt.core.profile import Profile
    from fasa_trt.runtime.targets import default_target

    flags = dict(
        target=target, lowering=lowering, arch=arch, dtype=dtype, max_seq_len=max_seq_len,
        max_batch_size=max_batch_size, max_num_tokens=max_num_tokens, tokens_per_block=tokens_per_block,
        tp_size=tp_size, pp_size=pp_size, budget=budget, n_tip=n_tip, labels=labels, reduction=reduction, rule=rule,
        sink=sink, recent=recent, dense_layers=dense_layers,
    )  # fmt: skip
    if (model is None) == (from_onnx is None):
        raise typer.BadParameter("name the model with --model, or what to finish with --from-onnx", param_hint="-m")
    if from_onnx is not None:
        from fasa_trt.cli.finish import finish

        finish(from_onnx, output, arch, _others(ctx), force=force, json_output=json_output)
        return
    assert model is not None
    fallback = default_target()
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    config = resolve(checkpoint, config_file, settings, fallback, **flags)
    measured = None if profile is None else Profile.load(profile)
    if dry_run:
        _describe(checkpoint, measured, config, json_output)
        return
    check_replaceable(output, force)
    from fasa_trt.export.finish import BUILDERS, check_can_stop, check_tools

    if stop_before_engine:
        check_can_stop(config.target)
    elif config.target in BUILDERS:
        gpu = gpu_architecture()
        check_tools(config.target, config.lowering, head_dim=checkpoint.head_dim, arch=config.arch, gpu=gpu)
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
        engine = build_engine(
            checkpoint,
            measured,
            config,
            output,
            force=force,
            command=command_line(),
            stop_before_engine=stop_before_engine,
            report=report,
        )
    _tell(engine, config, stopped=stop_before_engine, json_output=json_output)


def _others(ctx: typer.Context) -> list[str]:
    """Options that were given and mean nothing beside --from-onnx."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    return [param.opts[0] for param in ctx.command.params if param.name in given - {*FINISHING}]


def _tell(engine: EngineDirectory, config: BuildConfig, *, stopped: bool, json_output: bool) -> None:
    from fasa_trt.cli.console import err, print_json, say

    if json_output:
        print_json({"engine": str(engine.path), "config": config.to_json(), "notes": config.notes})
        return
    layers = engine.fasa["layers"]
    sparse = sum(layer["n_tip"] > 0 for layer in layers)
    err.print(
        f"[green]{'exported' if stopped else 'built'}[/] {engine.path}: {config.lowering} lowering, "
        f"budget {config.budget}, n_tip {config.n_tip}, {config.labels} labels, {config.dtype}, "
        f"{sparse} of {len(layers)} layers sparse",
        soft_wrap=True,
    )
    if not sparse:
        say("[yellow]warning:[/] FASA has nothing to do: every layer is dense, has no RoPE or slides a short window")
    if stopped:
        err.print(
            f"finish it where the GPU is: fasa-trt build --from-onnx {engine.path} -o engine", soft_wrap=True
        )  # unwrapped, so that the command can be copied
    elif config.target == "onnxruntime":
        err.print(f'try it: fasa-trt generate {engine.path} --prompt "..."', soft_wrap=True)


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
    from fasa_trt.export.sizes import estimate

    sizes = estimate(checkpoint, profile, config)
    if json_output:
        print_json({"config": config.to_json(), "notes": config.notes, "sizes": sizes})
        return
    table = Table("setting", "value", title=f"would build {checkpoint.path.name}")
    for key, value in config.to_json().items():
        table.add_row(key, "" if value is None else str(value))
    table.add_section()
    table.add_row("sparse layers", f"{sizes['sparse_layers']} of {sizes['layers']}")
    table.add_row("weights", human_bytes(sizes["weight_bytes"]))
    table.add_row("KV cache per token", human_bytes(sizes["kv_bytes_per_token"]))
    if sizes["label_bytes_per_token"]:
        table.add_row("of that, labels", human_bytes(sizes["label_bytes_per_token"]))
    if sizes["block_bytes"]:
        table.add_row("KV cache per block", human_bytes(sizes["block_bytes"]))
    table.add_row("KV cache, all rows full", human_bytes(sizes["kv_bytes"]))
    table.add_row("KV read per cached token, dense", human_bytes(sizes["kv_read_per_token_dense"]))
    fixed = human_bytes(sizes["kv_read_fixed_fasa"])
    table.add_row(
        "KV read per cached token, FASA", f"{human_bytes(sizes['kv_read_per_token_fasa'])}, and {fixed} a step"
    )
    out.print(table)
