"""`fasa-trt generate`: text from an engine directory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasa_trt.cli import options as opt

if TYPE_CHECKING:
    from fasa_trt.runtime.generate import Engine

SAMPLING = "Sampling"


def generate(
    engine_dir: Annotated[Path, typer.Argument(help="Engine directory from fasa-trt build.")],
    stdin: Annotated[str | None, typer.Argument(metavar="[-]", help="- reads the prompt from stdin.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Prompt; several run as one batch.")
    ] = None,
    prompt_file: Annotated[list[Path] | None, typer.Option(help="File that holds a prompt; repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens to generate at most.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Attend to every token, for comparison.")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends the text; repeatable.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING)] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest; 0: all.", rich_help_panel=SAMPLING)] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest up to this mass.", rich_help_panel=SAMPLING)] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(help="Keep those at least this likely, relative to the likeliest.", rich_help_panel=SAMPLING),
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes draws repeatable.", rich_help_panel=SAMPLING)] = None,
    threads: opt.Threads = None,
    provider: opt.Provider = None,
    kv_fraction: opt.KvFraction = None,
    no_verify: opt.NoVerify = False,
    json_output: opt.Json = False,
) -> None:
    """Generate text with FASA, streaming it as it comes.

    Example: fasa-trt generate engine --prompt-file notes.txt -n 64

    The closing line on stderr tells tokens, speed and the share of the KV cache that decoding read.
    """
    from fasa_trt.runtime.generate import load
    from fasa_trt.runtime.sampling import Sampling

    prompts = _prompts(stdin, prompt or [], prompt_file or [])
    sampling = Sampling(temperature, top_k, top_p, min_p, seed)
    engine = load(engine_dir, threads=threads, provider=provider, kv_fraction=kv_fraction, verify=not no_verify)
    pieces = engine.stream(
        prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop or (), chat=chat, dense=dense
    )
    if json_output:
        from fasa_trt.cli.console import print_json

        for _ in pieces:
            pass
        print_json(_as_json(engine))
        return
    if len(prompts) == 1:
        for piece in pieces:
            print(piece.text, end="", flush=True)
        print()
    else:  # rows interleave, so each is printed when all are done
        for _ in pieces:
            pass
        for row, completion in enumerate(engine.completions):
            print(f"--- {row} ---\n{completion.text}")
    print(closing_line(engine), file=sys.stderr)


def closing_line(engine: Engine) -> str:
    stats = engine.statistics
    return (
        f"prompt {stats.prompt_tokens} tokens ({stats.prefill_rate:.0f}/s), "
        f"new {stats.new_tokens} tokens ({stats.decode_rate:.1f}/s), KV read {stats.kv_share:.1%} of dense"
    )


def _as_json(engine: Engine) -> dict[str, Any]:
    from dataclasses import asdict

    stats = engine.statistics
    rates = {"prefill_rate": stats.prefill_rate, "decode_rate": stats.decode_rate, "kv_share": stats.kv_share}
    return {
        "completions": [asdict(completion) for completion in engine.completions],
        "statistics": {**asdict(stats), **rates},
        "backend": engine.backend.describe(),
    }


def _prompts(stdin: str | None, prompts: list[str], files: list[Path]) -> list[str]:
    from fasa_trt.core.errors import FasaError

    if stdin not in (None, "-"):
        raise FasaError(f"unexpected argument {stdin!r}", hint='pass text with --prompt "...", or - for stdin')
    found = list(prompts)
    for file in files:
        try:
            found.append(file.read_text("utf-8"))
        except OSError as error:
            raise FasaError(f"cannot read {file}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise FasaError(f"{file} is not UTF-8 text") from None
    if stdin == "-":
        found.append(sys.stdin.read())
    if not found:
        raise FasaError("no prompt", hint='pass --prompt "...", --prompt-file FILE or - for stdin')
    return found
