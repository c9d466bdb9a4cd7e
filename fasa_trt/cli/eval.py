"""`fasa-trt eval`: what sparse decoding costs in quality, against full attention and other methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasa_trt.cli import options as opt

if TYPE_CHECKING:
    from fasa_trt.core.checkpoint import Checkpoint
    from fasa_trt.core.profile import Profile

TASKS, RUN = "Tasks", "Run"
# device: contexts, budgets, samples
DEFAULTS = {"cpu": ("2048,4096", "64,256", 1), "cuda": ("4096,8192", "64,128,256,512", 8)}
PROFILE = "profile.safetensors"
CPU_CALIBRATION = {"samples": 2, "length": 2048}  # seconds; a profile of one's own is better


def evaluate(
    model: opt.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for results.json and plots.")],
    profile: Annotated[
        Path | None, typer.Option(help="Of fasa-trt calibrate.", show_default="calibrates on bundled text")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="dense | fasa | oracle | quest | snapkv | streamingllm | triattention | random, with options like "
            "fasa:n_tip=16:labels=prefix:reduction=sampled_softmax. dense always runs. fasa keeps the first layer "
            "dense, as build does: quest:dense_layers=1 does so, too, and fasa:dense_layers=0 does not."
        ),
    ] = "fasa,oracle,quest,snapkv,streamingllm",
    budgets: Annotated[
        str | None, typer.Option(help="Tokens attended per step.", show_default="64,256; GPU 64,128,256,512")
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="perplexity_code | perplexity_prose | perplexity_text | recall | copy | niah_multikey | "
            "niah_multivalue | niah_multiquery | variable_tracking | common_words | qa | generation | longbench | "
            "ruler | aime.",
            rich_help_panel=TASKS,
        ),
    ] = "perplexity_code,recall",
    contexts: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a prompt and its answer.", show_default="2048,4096; GPU 4096,8192", rich_help_panel=TASKS
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Documents of each task and context.", show_default="1; GPU 8", rich_help_panel=TASKS),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with .jsonl files of LongBench, RULER or AIME.", rich_help_panel=TASKS),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="File, folder or .jsonl for perplexity_text.", rich_help_panel=TASKS),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Length of long answers.", show_default="1024; aime: the context", rich_help_panel=TASKS
        ),
    ] = None,
    ask: Annotated[
        str,
        typer.Option(
            help="decode: questions come token by token after the document | prefill: they are the prompt's end, as in "
            "most papers | auto: as the task says.",
            rich_help_panel=TASKS,
        ),
    ] = "auto",
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.", rich_help_panel=TASKS)] = False,
    seed: Annotated[int, typer.Option(help="Of the documents.", rich_help_panel=TASKS)] = 1_000_000,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda | cuda:N.", rich_help_panel=RUN)] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="auto | float32 | float16 | bfloat16. auto: the checkpoint's own, float32 on a CPU.",
            rich_help_panel=RUN,
        ),
    ] = "auto",
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Cached tokens at once.", show_default="what fits", rich_help_panel=RUN),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores", rich_help_panel=RUN)
    ] = None,
    force: opt.Force = False,
    json_output: opt.Json = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Measure the quality of sparse decoding: FASA, other methods and full attention over the same prompts.

    Every document is read once, densely. Then each method decodes, attending to no more than its budget. Stopped runs
    go on where they were when the same command is given again.

    Example: fasa-trt eval --model examples/models/fasa-tiny --methods fasa,quest --budgets 64,128 -o eval
    """
    from rich.markup import escape

    from fasa_trt.calibrate.load import resolve_device
    from fasa_trt.cli.console import out, print_json, progress, say
    from fasa_trt.core.checkpoint import open_checkpoint
    from fasa_trt.evaluation.methods import parse_methods
    from fasa_trt.evaluation.report import tables_of
    from fasa_trt.evaluation.results import Results
    from fasa_trt.evaluation.run import EvalPlan, run
    from fasa_trt.evaluation.tasks import parse_tasks
    from fasa_trt.evaluation.tasks.base import TaskSettings

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    place = resolve_device(device)
    default_contexts, default_budgets, default_samples = DEFAULTS.get(place.type, DEFAULTS["cpu"])
    plan = EvalPlan(
        tasks=parse_tasks(tasks),
        methods=parse_methods(methods, numbers("--budgets", budgets or default_budgets)),
        contexts=numbers("--contexts", contexts or default_contexts),
        settings=TaskSettings(samples or default_samples, seed, data, text, new_tokens),
        ask=ask,
        batch_tokens=batch_tokens,
    )
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    plan.check_contexts(int(checkpoint.config.max_position_embeddings))
    config = {
        "model": checkpoint.path.name,
        "fingerprint": checkpoint.fingerprint,
        "profile": None if profile is None else digest(profile),
        "methods": list(dict.fromkeys(method.label for method in plan.methods)),
        "options": {method.label: method.options for method in plan.methods},
        "budgets": sorted({method.budget for method in plan.methods if method.uses_budget}),
        "tasks": [task.name for task in plan.tasks],
        "contexts": list(plan.contexts),
        "samples": plan.settings.samples,
        "seed": seed,
        "data": None if data is None else str(data),
        "text": None if text is None else str(text),
        "new_tokens": new_tokens,
        "ask": ask,
        "chat": chat,
        "device": place.type,
        "dtype": dtype,
    }
    results = Results.open(output, config, environment(), force=force)
    if results.records:
        say(f"going on with {len(results.records)} results in {escape(str(output))}")
    measured = None
    if any(method.uses_profile for method in plan.methods):
        measured = profile_for(checkpoint, profile, output, place.type, trust_remote_code)
    from fasa_trt.evaluation.model import load_eval_model

    loaded = load_eval_model(
        checkpoint, profile=measured, device=device, dtype=dtype, chat=chat, trust_remote_code=trust_remote_code
    )
    with progress() as report:
        run(loaded, plan, results, report)
    found = results.to_json()
    plots = draw(found, output)
    if json_output:
        print_json({"output": str(output), **{key: value for key, value in found.items() if key != "records"}})
    else:
        for table in tables_of(found["rows"]):
            out.print(table)
    for path in (results.path, *plots):
        say(f"[green]wrote[/] {escape(str(path))}")


def numbers(option: str, text: str) -> list[int]:
    """[64, 128] of "64,128", each once. Raises FasaError."""
    from fasa_trt.core.errors import FasaError

    try:
        found = list(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise FasaError(f"{option} {text!r} is not a list of positive numbers", hint="for example 64,256")
    return found


def digest(profile: Path) -> str:
    """Name and hash of a profile file: a run goes on with the same one only. Raises FasaError without the file."""
    import hashlib

    from fasa_trt.core.errors import FasaError

    if not profile.is_file():
        raise FasaError(f"no such profile: {profile}", hint="make one with fasa-trt calibrate")
    return f"{profile.name} {hashlib.sha256(profile.read_bytes()).hexdigest()[:16]}"


def profile_for(
    checkpoint: Checkpoint, path: Path | None, output: Path, device: str, trust_remote_code: bool
) -> Profile:
    """The given profile, the one of a run that goes on, or a new one, which is kept in `output`. Raises FasaError."""
    from fasa_trt.calibrate.calibrate import calibrate
    from fasa_trt.cli.console import progress, say
    from fasa_trt.core.profile import Profile

    kept = output / PROFILE
    if path is not None or kept.is_file():
        profile = Profile.load(path or kept)
        profile.check(checkpoint.fingerprint)
        return profile
    quick: dict[str, Any] = CPU_CALIBRATION if device == "cpu" else {}
    say("no --profile: calibrating on bundled text" + (", a short one on a CPU" if quick else ""))
    with progress() as report:
        profile = calibrate(
            checkpoint,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=lambda done, total: report("calibrate", done, total),
            **quick,
        ).profile
    profile.save(kept)
    return profile


def environment() -> dict[str, Any]:
    """Machine and versions, for the record."""
    import platform

    import torch

    from fasa_trt.runtime.machine import package_version

    return {
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in ("fasa_trt", "torch", "transformers")},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def draw(found: dict[str, Any], output: Path) -> list[Path]:
    """The plots' paths; none, with a remark, where matplotlib is missing."""
    from fasa_trt.cli.console import say

    try:
        from fasa_trt.evaluation.plots import write_plots
    except ImportError as error:
        say(f"[yellow]warning:[/] no plots: {error}")
        return []
    return write_plots(found["rows"], found["records"], output)
