"""`fasa-trt`: registers the verbs and turns errors into one line."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from fasa_trt.cli import (
    bench,
    build,
    calibrate,
    doctor,
    eval,
    export,
    generate,
    inspect,
    plugin,
    serve,
    triton_repo,
    tune,
)
from fasa_trt.core.errors import FasaError

app = typer.Typer(
    name="fasa-trt",
    help="Frequency-aware sparse attention: [bold]calibrate[/] a model once, [bold]build[/] an engine, "
    "[bold]generate[/] with a fraction of the KV cache read.",
    epilog="Any command takes --debug for a full traceback. "
    "Start with: fasa-trt build --model DIR --budget 256 -o engine && fasa-trt generate engine --prompt 'Hello'",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("calibrate")(calibrate.calibrate)
app.command("tune")(tune.tune)
app.command("export")(export.export)
app.command("build")(build.build)
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
app.command("triton-repo")(triton_repo.triton_repo)
app.command("inspect")(inspect.inspect)
app.command("eval")(eval.evaluate)
app.command("doctor")(doctor.doctor)
app.add_typer(plugin.app)
app.add_typer(bench.app)


def _version(wanted: bool) -> None:
    if wanted:
        from fasa_trt import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # transformers' own bars and notices would tear into ours
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def main() -> None:
    """Entry point. Exit status 0 done, 1 an error that the user can mend, 2 wrong usage, 3 a bug, 130 interrupted
    (click sees to that one, and to closed pipes)."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) != len(sys.argv) - 1
    try:
        app(args=arguments)
    except FasaError as error:
        if debug:
            raise
        _fail(str(error), 1)
    except Exception as error:
        if debug:
            raise
        _fail(f"unexpected {type(error).__name__}: {error} (this is a bug; run again with --debug for details)", 3)


def _fail(message: str, status: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
