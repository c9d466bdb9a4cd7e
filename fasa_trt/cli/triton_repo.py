"""`fasa-trt triton-repo`: a model repository for Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fasa_trt.cli import options as opt


def triton_repo(
    engine_dir: Annotated[Path, typer.Argument(help="Engine directory from fasa-trt build.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model repository to write.")],
    copy: Annotated[bool, typer.Option("--copy", help="Copy the engine into it instead of naming its path.")] = False,
    instances: Annotated[
        int, typer.Option(help="Instances of the engine on each GPU or on the CPU; tensorrt-llm: of the tokenizer.")
    ] = 1,
    gpus: Annotated[str | None, typer.Option(help="GPUs that run it, like 0,1.", show_default="the first")] = None,
    max_requests: Annotated[
        int, typer.Option(help="Requests that an instance takes on, waiting ones included; further ones are refused.")
    ] = 256,
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming/--no-streaming",
            help="Answers may come in pieces (gRPC streams, HTTP generate_stream); else infer requests get whole ones.",
        ),
    ] = True,
    threads: Annotated[int | None, typer.Option(help="onnxruntime: CPU threads.", show_default="all cores")] = None,
    kv_fraction: Annotated[
        float | None, typer.Option(help="TensorRT: share of the free GPU memory for the KV cache.", show_default="0.9")
    ] = None,
    force: opt.Force = False,
    json_output: opt.Json = False,
) -> None:
    """Write a Triton model repository that serves an engine, and its start script.

    Example: fasa-trt triton-repo engine -o models && models/start.sh

    A tensorrt-llm engine gets TensorRT-LLM's models (ensemble, tensorrt_llm_bls and what they need); any other one
    model, fasa, that batches requests in flight on Triton's python backend.
    """
    from fasa_trt.cli.console import print_json, say
    from fasa_trt.core.errors import FasaError
    from fasa_trt.serving.triton.options import RepositoryOptions
    from fasa_trt.serving.triton.repository import START, write_repository

    try:
        numbers = tuple(int(gpu) for gpu in gpus.split(",")) if gpus else ()
    except ValueError:
        raise FasaError(f"--gpus {gpus} is not a list of numbers", hint="like 0,1") from None
    options = RepositoryOptions(instances, numbers, max_requests, streaming, threads, kv_fraction)
    made = write_repository(engine_dir, output, options, copy=copy, force=force)
    if json_output:
        print_json({"repository": str(made.path), "models": made.models})
    else:
        say(f"[green]wrote[/] {made.path}: {', '.join(made.models)}")
        say(f"serve it: {made.path / START}")
