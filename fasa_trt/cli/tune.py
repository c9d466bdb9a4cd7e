"""`fasa-trt tune`: the settings that read least of the KV cache within a bound on the loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasa_trt.cli import options as opt
from fasa_trt.cli.eval import CPU_CALIBRATION, numbers

if TYPE_CHECKING:
    from fasa_trt.core.checkpoint import Checkpoint
    from fasa_trt.core.profile import Profile
    from fasa_trt.evaluation.tuning.result import Tuning

SEARCH = "Search"
DEFAULTS = {"cpu": (2048, 4), "cuda": (8192, 8)}  # device: tokens of a window, windows to search on


def tune(
    model: opt.Model,
    max_loss: Annotated[
        str,
        typer.Option(help="Bound on the next-token loss above full attention's, as a share of it: 0.5% or 0.005."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSON file for build --config; the plot goes beside it.")
    ] = Path("tuned.json"),
    profile: Annotated[
        Path | None, typer.Option(help="Of fasa-trt calibrate.", show_default="calibrates, and keeps it beside -o")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="File, folder or .jsonl to measure the loss on. Default: bundled text, half of it with questions "
            "about facts far back.",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(help="Budgets to try.", show_default="64,128,256,512,1024", rich_help_panel=SEARCH),
    ] = None,
    n_tips: Annotated[
        str | None,
        typer.Option(
            "--n-tips",
            help="Counts of dominant chunks to try.",
            show_default="all that the target's kernels have",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a window: the context that bytes and loss are counted at.",
            show_default="2048; GPU 8192",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Windows to search on; as many more are held out.",
            show_default="4; GPU 8",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Picks the windows.", rich_help_panel=SEARCH)] = 1,
    target: opt.Target = None,
    lowering: opt.Lowering = None,
    labels: opt.Labels = None,
    reduction: Annotated[
        str | None,
        typer.Option(
            help="How a group's query heads share a token set, as in build.",
            rich_help_panel=opt.SPARSITY,
            show_default="the better of sum and sampled_softmax",
        ),
    ] = None,
    rule: opt.Rule = None,
    sink: opt.Sink = None,
    recent: opt.Recent = None,
    device: Annotated[
        str, typer.Option(help="Where to search: auto | cpu | cuda | cuda:N.", rich_help_panel=SEARCH)
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="The model's in the search: auto | float32 | float16 | bfloat16. auto: the checkpoint's own, "
            "float32 on a CPU.",
            rich_help_panel=SEARCH,
        ),
    ] = "auto",
    force: opt.Force = False,
    json_output: opt.Json = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Choose n_tip, budget, reduction and dense layers: the least KV bytes per step within a bound on the loss.

    Decodes the ends of a few windows with every setting that the target can build, and compares the loss with full
    attention's. What is chosen keeps to the bound on windows that the search did not use, too.

    Example: fasa-trt tune --model examples/models/fasa-tiny --max-loss 0.5% -o tuned.json
    """
    from rich.markup import escape

    from fasa_trt.calibrate.load import resolve_device
    from fasa_trt.cli.console import err, print_json, progress, say
    from fasa_trt.cli.settings import resolve
    from fasa_trt.core.checkpoint import open_checkpoint
    from fasa_trt.runtime.targets import default_target

    bound = share("--max-loss", max_loss)
    config_file, plot, kept = outputs(output, profile, force=force)
    tried_budgets = None if budgets is None else numbers("--budgets", budgets)
    tried_n_tips = None if n_tips is None else numbers("--n-tips", n_tips)
    place = resolve_device(device)
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    default_length, default_windows = DEFAULTS.get(place.type, DEFAULTS["cpu"])
    longest = int(checkpoint.config.max_position_embeddings)
    size = min(default_length, longest) if length is None else length
    check_length(size, longest)

    base = resolve(
        checkpoint, None, None, default_target(), target=target, lowering=lowering, labels=labels, reduction=reduction,
        rule=rule, sink=sink, recent=recent, dense_layers="none",  # the search decides them
        budget=None if tried_budgets is None else min(tried_budgets),
        n_tip=None if tried_n_tips is None else min(tried_n_tips),
    )  # fmt: skip
    from fasa_trt.core.atomic import write_bytes
    from fasa_trt.evaluation.model import load_eval_model
    from fasa_trt.evaluation.tuning.grid import REDUCTIONS, build_settings, grid
    from fasa_trt.evaluation.tuning.plot import tradeoff_svg
    from fasa_trt.evaluation.tuning.search import tune as search
    from fasa_trt.evaluation.tuning.windows import tuning_windows

    reductions = REDUCTIONS if reduction is None else [reduction]
    settings = grid(checkpoint, base, length=size, n_tips=tried_n_tips, budgets=tried_budgets, reductions=reductions)
    measured = profile_for(
        checkpoint, profile, device, greedy=base.rule == "greedy", trust_remote_code=trust_remote_code
    )
    loaded = load_eval_model(
        checkpoint, profile=measured, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    count = windows or default_windows
    found = tuning_windows(loaded.encode, loaded.prefix, text, length=size, count=count, seed=seed)
    if len(found[0]) < count:
        say(f"[yellow]warning:[/] the text fills {len(found[0])} windows of {size} tokens to search on, not {count}")
    with progress() as report:
        tuning = search(loaded, settings, found, length=size, max_loss=bound, progress=report)
    if kept is not None:
        measured.save(kept)
    write_bytes(plot, tradeoff_svg(tuning))
    write_bytes(config_file, _json(build_settings(tuning.chosen.config)))
    written = [path for path in (config_file, plot, kept) if path is not None]
    if json_output:
        print_json({"config": str(config_file), "written": [str(path) for path in written], **tuning.to_json()})
    else:
        tell(tuning)
    for path in written:
        say(f"[green]wrote[/] {escape(str(path))}")
    command = f"fasa-trt build -m {model} --profile {profile or kept} --config {config_file} -o engine"
    err.print(f"build it: {escape(command)}", soft_wrap=True)  # unwrapped, so that the command can be copied


def share(option: str, text: str) -> float:
    """0.005 of "0.5%" or "0.005". Raises FasaError for what is no share from 0 to 1."""
    from fasa_trt.core.errors import FasaError

    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if rest or not 0 <= value < 1:
        raise FasaError(f"{option} {text!r} is not a share of the loss", hint="for example 0.5% or 0.005")
    return value


def outputs(output: Path, profile: Path | None, *, force: bool) -> tuple[Path, Path, Path | None]:
    """Files for settings, plot and the profile (None where there is one). Raises FasaError for names that build
    cannot read, and for files that exist."""
    from fasa_trt.core.errors import FasaError

    if output.suffix != ".json":
        raise FasaError(f"{output} is not a .json file, which build --config reads", hint="for example -o tuned.json")
    plot, kept = output.with_suffix(".svg"), None if profile is not None else output.with_suffix(".safetensors")
    for path in (output, plot, kept):
        if path is None or not path.exists():
            continue
        if path.is_dir():
            raise FasaError(f"{path} is a directory", hint="choose another -o")
        if not force:
            raise FasaError(f"{path} exists already", hint="choose another -o, or replace it with --force")
    return output, plot, kept


def check_length(length: int, longest: int) -> None:
    from fasa_trt.core.errors import FasaError

    if length > longest:
        raise FasaError(f"windows of {length} tokens are not possible", hint=f"--length {longest} at most")


def profile_for(
    checkpoint: Checkpoint, path: Path | None, device: str, *, greedy: bool, trust_remote_code: bool
) -> Profile:
    """The given profile or a new one. Raises FasaError for one of another model."""
    from fasa_trt.calibrate.calibrate import calibrate
    from fasa_trt.calibrate.load import resolve_device
    from fasa_trt.cli.console import progress, say
    from fasa_trt.core.profile import Profile

    if path is not None:
        profile = Profile.load(path)
        profile.check(checkpoint.fingerprint)
        return profile
    quick: dict[str, Any] = CPU_CALIBRATION if resolve_device(device).type == "cpu" else {}
    say("no --profile: calibrating on bundled text" + (", a short one on a CPU" if quick else ""))
    with progress() as report:
        return calibrate(
            checkpoint,
            device=device,
            greedy=greedy,
            trust_remote_code=trust_remote_code,
            progress=lambda done, total: report("calibrate", done, total),
            **quick,
        ).profile


def tell(tuning: Tuning) -> None:
    """A table of the trade-off, and the choice."""
    from rich.table import Table

    from fasa_trt.cli.console import human_bytes, out
    from fasa_trt.evaluation.tuning.result import frontier

    table = Table(title=f"loss against KV bytes read in a step at {tuning.length} tokens")
    for name in ("n_tip", "budget", "reduction", "dense layers", "KV read", "of dense", "loss", "held out"):
        table.add_column(name, justify="left" if name in ("reduction", "dense layers") else "right")
    shown = {point.config: point for point in (*frontier(tuning.points), tuning.chosen)}
    for point in sorted(shown.values(), key=lambda point: point.kv_bytes):
        config, chosen = point.config, point.config == tuning.chosen.config
        table.add_row(
            str(config.n_tip),
            str(config.budget),
            config.reduction,
            ",".join(map(str, config.dense_layers)),
            human_bytes(point.kv_bytes),
            f"{point.kv_bytes / tuning.dense_bytes:.1%}",
            f"{point.loss:+.2%}",
            "" if point.held_out is None else f"{point.held_out:+.2%}",
            style="bold green" if chosen else None,
        )
    out.print(table)
    chosen_point = tuning.chosen
    out.print(
        f"chosen: {chosen_point.name}; reads {chosen_point.kv_bytes / tuning.dense_bytes:.1%} of what full attention "
        f"does, bound {tuning.max_loss:.2%}",
        soft_wrap=True,
    )


def _json(settings: dict[str, Any]) -> bytes:
    import json

    return (json.dumps(settings, indent=2) + "\n").encode()
