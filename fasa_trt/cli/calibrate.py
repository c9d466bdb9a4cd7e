"""`fasa-trt calibrate`: measure a model's frequency chunks and write the profile that an engine is baked from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fasa_trt.cli import options as opt


def calibrate(
    model: opt.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Profile to write.")] = Path("profile.safetensors"),
    report: Annotated[
        Path | None,
        typer.Option(help="Also draw a heat map: into a .png file, or into a directory together with its numbers."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Calibrate on this file, directory or .jsonl. Default: bundled code and prose, half of it with "
            "questions about facts far back.",
            rich_help_panel=opt.CALIBRATION,
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Windows of text to measure on.", rich_help_panel=opt.CALIBRATION)
    ] = 8,
    length: Annotated[
        int,
        typer.Option(min=1, help="Tokens in each; time grows with its square.", rich_help_panel=opt.CALIBRATION),
    ] = 8192,
    queries: Annotated[
        int, typer.Option(min=1, help="Decode steps measured in each.", rich_help_panel=opt.CALIBRATION)
    ] = 16,
    seed: Annotated[int, typer.Option(help="Picks the windows.", rich_help_panel=opt.CALIBRATION)] = 0,
    greedy: Annotated[
        bool,
        typer.Option(
            "--greedy",
            help="Also rank chunks by forward selection (build --rule greedy). Takes several times longer.",
            rich_help_panel=opt.CALIBRATION,
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda | cuda:N.", rich_help_panel=opt.CALIBRATION)] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="The model's: auto | float32 | float16 | bfloat16. auto: the checkpoint's own, float32 on a CPU.",
            rich_help_panel=opt.CALIBRATION,
        ),
    ] = "auto",
    force: opt.Force = False,
    json_output: opt.Json = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Measure which RoPE frequency chunks of each attention head predict its attention.

    Runs the model over a few windows of text, once. The profile holds measurements, not a choice: rule, n_tip and
    budget are decided by [bold]fasa-trt build[/], as often as you like.

    The table tells how many of the keys that matter most the chosen chunks find, on text that they were not chosen on.

    Example: fasa-trt calibrate --model meta-llama/Llama-3.1-8B-Instruct -o llama.safetensors --report report
    """
    from fasa_trt.cli.console import out, print_json, progress, say
    from fasa_trt.core.checkpoint import open_checkpoint
    from fasa_trt.core.errors import FasaError

    if output.is_dir():
        raise FasaError(f"{output} is a directory", hint="give the profile a file name")
    if output.exists() and not force:
        raise FasaError(f"{output} exists already", hint="choose another -o, or replace it with --force")
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    from fasa_trt.calibrate.calibrate import calibrate as run
    from fasa_trt.calibrate.report import report_files, summarize, summary_table, write_report

    if report is not None:
        report_files(report)  # says now, not after minutes, that there can be no report
    with progress() as bar:
        calibration = run(
            checkpoint,
            text=text,
            samples=samples,
            length=length,
            queries=queries,
            seed=seed,
            greedy=greedy,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=lambda done, total: bar("calibrate", done, total),
        )
    calibration.profile.save(output)
    title = f"{Path(model).name}: dominant frequency chunks"
    written = [] if report is None else write_report(calibration, report, title=title)
    summary = summarize(calibration)
    for warning in summary["warnings"]:
        say(f"[yellow]warning:[/] {warning}")
    if json_output:
        print_json({"profile": str(output), "report": [str(file) for file in written], **summary})
        return
    out.print(summary_table(summary))
    for file in (output, *written):
        say(f"[green]wrote[/] {file}")
