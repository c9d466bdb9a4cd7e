"""`fasa-trt plugin`: compiles the CUDA libraries for a GPU architecture and says where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fasa_trt.cli import options as opt

app = typer.Typer(
    name="plugin",
    help="The CUDA kernels, for TensorRT and for PyTorch: compile their libraries ahead of use, and find them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

KINDS = ("tensorrt", "torch")
Arch = Annotated[
    list[str] | None,
    typer.Option(
        "--arch",
        help="Compute capability without its dot, like 90; native: of the GPUs here; all. Repeatable.",
        show_default="native",
    ),
]
HeadDim = Annotated[
    list[int] | None,
    typer.Option("--head-dim", help="Head dimension to compile for. Repeatable.", show_default="all there are"),
]


@app.command("build")
def build(
    arch: Arch = None,
    head_dim: HeadDim = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="tensorrt (the plugin library, libfasa_trt_plugin) | torch (the kernels for PyTorch's operators).",
            show_default="both",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Also copy the library to this file, for a machine without nvcc."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Compile even what the cache has.")] = False,
    json_output: opt.Json = False,
) -> None:
    """Compile the CUDA libraries, unless the cache has them, and print their paths.

    That takes no GPU and no TensorRT, but nvcc (CUDA 12.8 or newer) and FlashInfer's headers.
    What was not compiled ahead is when it is first used.

    Example: fasa-trt plugin build --arch 90 --head-dim 128
    """
    from fasa_trt.core.atomic import write_bytes
    from fasa_trt.core.errors import FasaError

    kinds = _kinds(kind)
    architectures = _architectures(arch)
    if output is not None and (len(kinds), len(architectures)) != (1, 1):
        raise FasaError("--output takes one library", hint="name one --kind and one --arch")
    libraries = _build(kinds, architectures, head_dim, force=force)
    if output is not None:
        write_bytes(output, Path(libraries[0]["path"]).read_bytes())
        libraries[0]["copy"] = str(output)
    if json_output:
        from fasa_trt.cli.console import print_json

        print_json({"libraries": libraries})
        return
    from fasa_trt.cli.console import say

    for library in libraries:
        done = "was in the cache" if library["cached"] else f"compiled in {library['seconds']:.0f} s"
        say(f"{library['kind']}, sm_{library['arch']}: {done}")
        print(library.get("copy", library["path"]))


@app.command("path")
def path(
    arch: Arch = None,
    head_dim: HeadDim = None,
    kind: Annotated[str, typer.Option(help="tensorrt (the plugin library) | torch (the kernels alone).")] = "tensorrt",
) -> None:
    """Print the path of the library that the cache has, and nothing else, for scripts. Compiles nothing.

    A library for more head dimensions than are asked for will do.

    Example: LD_PRELOAD=$(fasa-trt plugin path --arch 90) FASA_TRT_REGISTER=libnvinfer.so.10 trtllm-serve ...
    """
    from fasa_trt.core.errors import FasaError
    from fasa_trt.plugins import library

    (chosen,) = _kinds(kind)
    head_dims = sorted(set(head_dim or library.HEAD_DIMS))
    found = {name: library.find(name, head_dims, plugin=chosen == "tensorrt") for name in _architectures(arch)}
    missing = [name for name, file in found.items() if file is None]
    if missing:
        options = [f"--arch {name}" for name in missing] + [f"--head-dim {dim}" for dim in sorted(set(head_dim or ()))]
        raise FasaError(
            f"no {chosen} library of these kernels in {library.cache_directory()}",
            hint=f"run fasa-trt plugin build --kind {chosen} {' '.join(options)}",
        )
    for file in found.values():
        print(file)


def _build(
    kinds: tuple[str, ...], architectures: list[str], head_dim: list[int] | None, *, force: bool
) -> list[dict[str, Any]]:
    import time

    from fasa_trt.cli.console import progress
    from fasa_trt.plugins import library

    head_dims = sorted(set(head_dim or library.HEAD_DIMS))
    libraries = []
    with progress() as report:
        for name in architectures:
            for number, kind in enumerate(kinds):
                compiled: list[str] = []
                stage = f"{kind} sm_{name}"

                def note(source: str, done: int, total: int, stage: str = stage, made: list[str] = compiled) -> None:
                    made.append(source)
                    report(stage, done, total)

                start = time.perf_counter()
                if force and number:  # the first kind has compiled the objects that this one shares
                    library.path(name, head_dims, plugin=kind == "tensorrt").unlink(missing_ok=True)
                make = library.build_plugin if kind == "tensorrt" else library.build
                file = make(name, head_dims, force=force and not number, progress=note)
                entry = {"kind": kind, "arch": name, "head_dims": head_dims, "path": str(file)}
                libraries.append({**entry, "seconds": round(time.perf_counter() - start, 2), "cached": not compiled})
    return libraries


def _kinds(kind: str | None) -> tuple[str, ...]:
    from fasa_trt.core.errors import FasaError

    if kind is None:
        return KINDS
    if kind not in KINDS:
        raise FasaError(f"unknown kind of library {kind!r}", hint=" or ".join(KINDS))
    return (kind,)


def _architectures(names: list[str] | None) -> list[str]:
    """What --arch asks for, each once. Raises FasaError for unknown ones, before the first is compiled."""
    from fasa_trt.core.errors import FasaError
    from fasa_trt.plugins.library import ARCHITECTURES
    from fasa_trt.runtime.machine import architecture, cuda

    found: list[str] = []
    for name in names or ["native"]:
        if name == "all":
            found += ARCHITECTURES
        elif name == "native":
            gpus = cuda().gpus
            if not gpus:
                raise FasaError("no GPU here to compile for", hint=f"--arch {' | '.join(ARCHITECTURES)} | all")
            found += [architecture(gpu.compute_capability) for gpu in gpus]
        else:
            found.append(name.removeprefix("sm_").replace(".", ""))
    for name in found:
        if name not in ARCHITECTURES:
            raise FasaError(f"unknown GPU architecture {name!r}", hint=f"one of {', '.join(ARCHITECTURES)}")
    return list(dict.fromkeys(found))
