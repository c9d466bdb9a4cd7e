"""`fasa-trt plugin`: compiles the CUDA kernels' library for a GPU architecture and says where it is."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fasa_trt.cli import options as opt

app = typer.Typer(
    name="plugin",
    help="The CUDA kernels: compile their library ahead of use, and find it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

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
    force: Annotated[bool, typer.Option("--force", help="Compile even what the cache has.")] = False,
    json_output: opt.Json = False,
) -> None:
    """Compile the CUDA kernels, unless the cache has them, and print the library's path.

    That takes no GPU, but nvcc (CUDA 12.8 or newer) and FlashInfer's headers.
    Kernels that were not compiled ahead are when they are first used.

    Example: fasa-trt plugin build --arch 90 --head-dim 128
    """
    libraries = _build(arch, head_dim, force=force)
    if json_output:
        from fasa_trt.cli.console import print_json

        print_json({"libraries": libraries})
        return
    from fasa_trt.cli.console import say

    for library in libraries:
        done = "was in the cache" if library["cached"] else f"compiled in {library['seconds']:.0f} s"
        say(f"sm_{library['arch']}: {done}")
        print(library["path"])


@app.command("path")
def path(arch: Arch = None, head_dim: HeadDim = None) -> None:
    """Print the path of the library that the cache has, and nothing else, for scripts. Compiles nothing.

    Example: library=$(fasa-trt plugin path --arch 90)
    """
    from fasa_trt.core.errors import FasaError
    from fasa_trt.plugins import library

    head_dims = sorted(set(head_dim or library.HEAD_DIMS))
    found = [(name, library.path(name, head_dims)) for name in _architectures(arch)]
    missing = [name for name, file in found if not file.is_file()]
    if missing:
        options = [f"--arch {name}" for name in missing] + [f"--head-dim {dim}" for dim in sorted(set(head_dim or ()))]
        raise FasaError(
            f"no library of these kernels in {library.cache_directory()}",
            hint=f"run fasa-trt plugin build {' '.join(options)}",
        )
    for _, file in found:
        print(file)


def _build(names: list[str] | None, head_dim: list[int] | None, *, force: bool) -> list[dict[str, Any]]:
    import time

    from fasa_trt.cli.console import progress
    from fasa_trt.plugins import library

    head_dims = sorted(set(head_dim or library.HEAD_DIMS))
    architectures = _architectures(names)
    libraries = []
    with progress() as report:
        for name in architectures:
            compiled: list[str] = []

            def note(source: str, done: int, total: int, name: str = name, compiled: list[str] = compiled) -> None:
                compiled.append(source)
                report(f"sm_{name}", done, total)

            start = time.perf_counter()
            file = library.build(name, head_dims, force=force, progress=note)
            entry = {"arch": name, "head_dims": head_dims, "path": str(file)}
            libraries.append({**entry, "seconds": round(time.perf_counter() - start, 2), "cached": not compiled})
    return libraries


def _architectures(names: list[str] | None) -> list[str]:
    """What --arch asks for, each once. Raises FasaError for unknown ones, before the first is compiled."""
    from fasa_trt.core.errors import FasaError
    from fasa_trt.plugins.library import ARCHITECTURES
    from fasa_trt.runtime.machine import cuda

    found: list[str] = []
    for name in names or ["native"]:
        if name == "all":
            found += ARCHITECTURES
        elif name == "native":
            gpus = cuda().gpus
            if not gpus:
                raise FasaError("no GPU here to compile for", hint=f"--arch {' | '.join(ARCHITECTURES)} | all")
            found += ["".join(map(str, gpu.compute_capability)) for gpu in gpus]
        else:
            found.append(name.removeprefix("sm_").replace(".", ""))
    for name in found:
        if name not in ARCHITECTURES:
            raise FasaError(f"unknown GPU architecture {name!r}", hint=f"one of {', '.join(ARCHITECTURES)}")
    return list(dict.fromkeys(found))
