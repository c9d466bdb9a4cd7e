"""`fasa-trt serve`: an engine directory behind OpenAI's HTTP protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fasa_trt.cli import options as opt

ACCESS = "Access"


def serve(
    engine_dir: Annotated[Path, typer.Argument(help="Engine directory from fasa-trt build.")],
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=ACCESS)] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", rich_help_panel=ACCESS)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="FASA_API_KEY",
            help="Key that clients must send; the environment hides it from other users.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="What clients call the engine.", show_default="the directory's name")
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Answers that may wait; further ones get status 429.")] = 256,
    max_body: Annotated[int, typer.Option(min=1, help="MiB of a request; longer ones get status 413.")] = 8,
    shutdown_timeout: Annotated[int, typer.Option(min=0, help="Seconds that answers get to end at a stop.")] = 30,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log each request on stdout.")] = False,
    threads: opt.Threads = None,
    provider: opt.Provider = None,
    kv_fraction: opt.KvFraction = None,
    no_verify: opt.NoVerify = False,
) -> None:
    """Serve an engine to OpenAI clients: completions, chat, streaming; /health and /metrics beside them.

    Example: fasa-trt serve engine --port 8000

    Requests join and leave the running batch between any two tokens. Ctrl-C or SIGTERM lets answers end first.
    """
    from fasa_trt.cli.console import say
    from fasa_trt.core.errors import FasaError

    if api_key == "":
        raise FasaError("the API key is empty", hint="set FASA_API_KEY, or unset it to let everybody in")
    try:
        from fasa_trt.serving.openai.app import Settings, create_app
        from fasa_trt.serving.openai.server import is_loopback, listen, run, url_of
    except ModuleNotFoundError as error:
        raise FasaError(f"serving needs {error.name}", hint="pip install fasa-trt[serve]") from None
    from fasa_trt.runtime.generate import load
    from fasa_trt.runtime.service import Service

    listen(host, port).close()  # tells of a port in use before the engine loads, which may take minutes
    engine = load(engine_dir, threads=threads, provider=provider, kv_fraction=kv_fraction, verify=not no_verify)
    settings = Settings(
        model_name or engine_dir.resolve().name,
        api_key=api_key,
        max_queue=max_queue,
        max_body_bytes=max_body * 2**20,
    )
    with listen(host, port) as listening, Service(engine) as service:
        if api_key is None and not is_loopback(listening):
            say("warning: no API key: whoever reaches this address may use the engine (set FASA_API_KEY)")
        say(f"serving {settings.model_name} on {url_of(listening)}/v1")
        run(create_app(service, settings), listening, shutdown_timeout=shutdown_timeout, access_log=access_log)
