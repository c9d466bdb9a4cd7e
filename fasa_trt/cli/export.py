"""`fasa-trt export`: the ONNX model alone, for people who bring their own runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fasa_trt.cli import options as opt


def export(
    model: opt.Model,
    profile: Annotated[
        Path | None, typer.Option(help="Profile from fasa-trt calibrate; without one every layer is dense.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="ONNX file to write; weights go beside it.")] = Path(
        "model.onnx"
    ),
    target: opt.Target = None,
    lowering: opt.Lowering = None,
    dtype: opt.Dtype = None,
    max_seq_len: opt.MaxSeqLen = None,
    max_batch_size: opt.MaxBatchSize = None,
    max_num_tokens: opt.MaxNumTokens = None,
    tokens_per_block: opt.TokensPerBlock = None,
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
    force: opt.Force = False,
    json_output: opt.Json = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Write a model as ONNX with its dominant chunks baked in, weights streamed.

    The plugin lowering (--target tensorrt, tensorrt-llm; opset 20) has one FasaAttention node a layer and
    TensorRT-LLM's bindings. The standard one (onnxruntime; opset 24) is plain ONNX; for tensorrt-rtx the cache's
    capacity is fixed to --max-seq-len. [bold]fasa-trt build[/] does this and all the rest.
    """
    from fasa_trt.cli.console import human_bytes, print_json, progress, say
    from fasa_trt.cli.settings import resolve
    from fasa_trt.core.checkpoint import open_checkpoint
    from fasa_trt.core.errors import FasaError
    from fasa_trt.core.profile import Profile

    if output.exists() and not force:
        raise FasaError(f"{output} exists already", hint="choose another -o, or replace it with --force")
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    config = resolve(
        checkpoint, config_file, settings, "onnxruntime",
        target=target, lowering=lowering, dtype=dtype, max_seq_len=max_seq_len, max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens, tokens_per_block=tokens_per_block, budget=budget, n_tip=n_tip, labels=labels,
        reduction=reduction, rule=rule, sink=sink, recent=recent, dense_layers=dense_layers,
    )  # fmt: skip
    measured = None if profile is None else Profile.load(profile)
    if measured is None:
        say("no --profile: every layer attends densely")
    from fasa_trt.export.engine import export_model
    from fasa_trt.export.onnx_model import WEIGHTS_SUFFIX

    with progress() as report:
        exported = export_model(checkpoint, measured, config, output, lambda done, total: report("export", done, total))
    size = sum(file.stat().st_size for file in (output, output.with_name(output.name + WEIGHTS_SUFFIX)))
    sparse = sum(plan.sparse for plan in exported.layers)
    if json_output:
        facts = {"file": str(output), "bytes": size, "sparse_layers": sparse}
        print_json({**facts, "config": config.to_json(), "notes": config.notes})
    else:
        say(f"[green]wrote[/] {output}: {human_bytes(size)}, {sparse} of {len(exported.layers)} layers sparse")
