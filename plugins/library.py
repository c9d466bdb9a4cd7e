"""Builds the kernel library for a GPU architecture and some head_dims, caches and loads it; builds TensorRT's plugin,
which is the same with the sources in `tensorrt/`.

A source whose name ends in a head_dim (`attend_128.cu`) is compiled for that head_dim only. The others are common to
all; those that mention FASA_HAS_ get `-DFASA_HAS_128=1` and so on for the head_dims of the library, which answers
FASA_UNSUPPORTED for the rest. Sources that include FlashInfer's headers get its include paths. Those with `hopper` in
their name are for compute capability 9.0 only, where FASA_HAS_HOPPER is defined. The plugin's sources get TensorRT's
headers and FASA_TENSORRT_HEADERS where TENSORRT_ROOT names the folder above `include`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import posixpath
import re
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path

from fasa_trt.core.errors import FasaError
from fasa_trt.plugins.toolchain import (
    WINDOWS,
    digest,
    find_flashinfer,
    find_nvcc,
    find_tensorrt_headers,
    run_nvcc,
    tensorrt_version,
    tools_version,
)

KERNELS = Path(__file__).resolve().parent / "kernels"
TENSORRT = Path(__file__).resolve().parent / "tensorrt"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
HOPPER = "90"
HEAD_DIMS = (64, 96, 128, 256)
SUFFIX = ".dll" if WINDOWS else ".so"
# FlashInfer's own libcudacxx comes first: the toolkit's may lack what it needs.
FLASHINFER_INCLUDES = ("cccl/libcudacxx/include", "include", "cutlass/include")
# CUTLASS calls constexpr host functions on the device; FlashInfer captures structured bindings.
HOPPER_FLAGS = ("--expt-relaxed-constexpr", "-DNDEBUG", "-diag-suppress", "1444,3357")
_LOCAL_INCLUDE = re.compile(rb'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)

Progress = Callable[[str, int, int], None]

_log = logging.getLogger("fasa_trt")


def cache_directory() -> Path:
    """Where built libraries are kept: $FASA_TRT_CACHE, else the user's cache directory."""
    named = os.environ.get("FASA_TRT_CACHE")
    if named:
        return Path(named)
    home = os.environ.get("LOCALAPPDATA") if WINDOWS else os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fasa-trt"


def path(architecture: str, head_dims: Sequence[int] = HEAD_DIMS, *, plugin: bool = False) -> Path:
    """Where `build` (with plugin: `build_plugin`) leaves the library of the sources as they are, whether or not it is
    there; where the compiler or FlashInfer is missing, what `find` finds. Raises FasaError when the architecture or a
    head_dim is unknown."""
    stem, version = _stem(architecture, head_dims, plugin), _found_version(plugin)
    if version is None:
        return find(architecture, head_dims, plugin=plugin) or cache_directory() / f"{stem}{SUFFIX}"
    return cache_directory() / f"{stem}-{version}{SUFFIX}"


def find(architecture: str, head_dims: Sequence[int] = HEAD_DIMS, *, plugin: bool = False) -> Path | None:
    """The library that the cache has of the sources as they are, with as few head_dims beside the wanted ones as
    possible: of the compiler that is here, or the newest where there is none. Raises FasaError as `path` does."""
    _check(architecture, head_dims)
    version, kept = _found_version(plugin) or "*", cache_directory()
    start = f"{_name(plugin)}-sm{architecture}-"
    there = {file.name.removeprefix(start).split("-")[0] for file in kept.glob(f"{start}*-{version}{SUFFIX}")}
    wanted, known = ({str(head_dim) for head_dim in some} for some in (head_dims, HEAD_DIMS))
    fitting = [sorted(map(int, named.split("."))) for named in there if wanted <= set(named.split(".")) <= known]
    for choice in sorted(fitting, key=lambda choice: (len(choice), choice)):
        built = list(kept.glob(f"{_stem(architecture, choice, plugin)}-{version}{SUFFIX}"))
        if built:
            return max(built, key=lambda file: file.stat().st_mtime)
    return None


def _found_version(plugin: bool) -> str | None:
    """Of the compiler and the headers, as a library's name has it; None where they are missing."""
    headers = tensorrt_version() if plugin else ""
    try:
        return tools_version(find_nvcc(), find_flashinfer()) + headers
    except FasaError:
        return None


def build(
    architecture: str,
    head_dims: Sequence[int] = HEAD_DIMS,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """The kernel library for compute capability `architecture` ("90" for 9.0), built unless the cache has it.

    The library and its objects are cached by the content of what they are compiled from and with, so an edited kernel
    is always rebuilt and a second set of head_dims reuses what is common. `progress(name, done, total)` is called
    after each object; `force` compiles everything again. Raises FasaError when the architecture or a head_dim is
    unknown, the compiler or FlashInfer is missing, or the compiler fails.
    """
    return _build(architecture, head_dims, False, force, progress)


def build_plugin(
    architecture: str,
    head_dims: Sequence[int] = HEAD_DIMS,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """TensorRT's plugin library, the kernels included, whose objects it shares with `build`. TensorRT itself is not
    needed. Raises FasaError as `build` does, and for a TENSORRT_ROOT without headers."""
    return _build(architecture, head_dims, True, force, progress)


def _build(architecture: str, head_dims: Sequence[int], plugin: bool, force: bool, progress: Progress | None) -> Path:
    target = path(architecture, head_dims, plugin=plugin)
    if target.is_file() and not force:
        return target
    compiler = _Compiler(find_nvcc(), find_flashinfer(), architecture, head_dims)
    sources = _sources(architecture, head_dims, plugin)
    try:
        objects = cache_directory() / "objects"
        objects.mkdir(parents=True, exist_ok=True)
        made = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = {pool.submit(compiler.compile, source, objects, force): source for source in sources}
            try:
                for done, job in enumerate(as_completed(jobs), start=1):
                    made.append(job.result())
                    if progress:
                        progress(jobs[job].stem, done, len(jobs))
            except FasaError:
                pool.shutdown(cancel_futures=True)
                raise
        compiler.link(sorted(made), target)
    except OSError as error:
        raise FasaError(f"cannot write {target.parent}: {error.strerror or error}", hint="set FASA_TRT_CACHE") from None
    return target


def load(architecture: str, head_dims: Sequence[int] = HEAD_DIMS) -> ctypes.CDLL:
    """The library for a GPU and some head_dims: one that the cache has, also for more head_dims, else built now, as a
    warning in the log "fasa_trt" announces. Raises FasaError as `build` does."""
    return _load(architecture, tuple(sorted(set(head_dims))))


@cache
def _load(architecture: str, head_dims: tuple[int, ...]) -> ctypes.CDLL:
    file = find(architecture, head_dims)
    if file is None:
        find_nvcc(), find_flashinfer()  # nothing is announced that cannot be done
        what = f"compute capability {architecture[:-1]}.{architecture[-1]}, head_dim {', '.join(map(str, head_dims))}"
        _log.warning("compiling the CUDA kernels for %s: minutes, once (fasa-trt plugin build does it ahead)", what)
        file = build(architecture, head_dims)
    return ctypes.CDLL(str(file))


class _Compiler:
    """nvcc with the flags for one library."""

    def __init__(self, nvcc: Path, flashinfer: Path, architecture: str, head_dims: Sequence[int]) -> None:
        self.nvcc, self.flashinfer, self.architecture = nvcc, flashinfer, architecture
        self.selection = [f"-DFASA_HAS_{head_dim}=1" for head_dim in sorted(set(head_dims))]
        self.selection += ["-DFASA_HAS_HOPPER=1"] if architecture == HOPPER else []

    def flags(self, source: Path, content: bytes) -> list[str]:
        hopper = _is_hopper(source)
        target = f"{self.architecture}{'a' if hopper else ''}"
        flags = ["-std=c++17", "-O3", "-gencode", f"arch=compute_{target},code=sm_{target}"]
        flags += HOPPER_FLAGS if hopper else ()
        flags += ["-Xcompiler", "/MD,/Zc:preprocessor,/O2" if WINDOWS else "-fPIC,-fvisibility=hidden"]
        if b"FASA_HAS_" in content:
            flags += self.selection
        if b"<flashinfer/" in content:
            flags += [f"-I{self.flashinfer / path}" for path in FLASHINFER_INCLUDES]
        if b"FASA_TENSORRT_HEADERS" in content and (headers := find_tensorrt_headers()):
            flags += [f"-I{headers}", "-DFASA_TENSORRT_HEADERS=1", f"-DFASA_TENSORRT_VERSION=0x{tensorrt_version()}"]
        return flags

    def compile(self, source: Path, directory: Path, force: bool) -> Path:
        """The object file of a source, compiled unless the cache has it."""
        content = _content(source)
        flags = self.flags(source, content)
        named = [flag for flag in flags if not flag.startswith("-I")]  # where FlashInfer lies does not matter
        version = tools_version(self.nvcc, self.flashinfer if b"<flashinfer/" in content else None)
        target = directory / f"{source.stem}-{digest(content, *named, version)}.o"
        if force or not target.is_file():
            with tempfile.TemporaryDirectory(dir=directory, prefix=".") as work:
                made = Path(work) / "made.o"
                run_nvcc(self.nvcc, source.name, *flags, "-c", source, "-o", made)
                made.replace(target)
        return target

    def link(self, objects: list[Path], target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as work:
            made = Path(work) / f"made{SUFFIX}"
            run_nvcc(self.nvcc, target.name, "-shared", "-cudart", "static", *objects, "-o", made)
            try:
                made.replace(target)
            except PermissionError:  # Windows: another process has built it and loaded it
                if not target.is_file():
                    raise


def _check(architecture: str, head_dims: Sequence[int]) -> None:
    if architecture not in ARCHITECTURES:
        raise FasaError(f"unknown GPU architecture {architecture!r}", hint=f"one of {', '.join(ARCHITECTURES)}")
    unknown = [head_dim for head_dim in head_dims if head_dim not in HEAD_DIMS]
    if unknown or not head_dims:
        raise FasaError(
            f"no kernels for head_dim {unknown[0]}" if unknown else "no head_dim to build kernels for",
            hint=f"one of {', '.join(map(str, HEAD_DIMS))}",
        )


def _name(plugin: bool) -> str:
    return "libfasa_trt_plugin" if plugin else "libfasa_kernels"


def _stem(architecture: str, head_dims: Sequence[int], plugin: bool) -> str:
    """The start of a library's name: what it is for, and the content of its sources."""
    _check(architecture, head_dims)
    flags = Path(__file__).read_bytes()
    content = digest(flags, *(_content(source) for source in _sources(architecture, head_dims, plugin)))
    return f"{_name(plugin)}-sm{architecture}-{'.'.join(map(str, sorted(set(head_dims))))}-{content}"


def _sources(architecture: str, head_dims: Sequence[int], plugin: bool) -> list[Path]:
    """The longest to compile first."""
    files = [file for file in sorted(KERNELS.glob("*.cu")) if _head_dim(file) in (None, *head_dims)]
    files = [file for file in files if architecture == HOPPER or not _is_hopper(file)]
    adapter = [*TENSORRT.glob("*.cpp"), *TENSORRT.glob("*.cu")] if plugin else []
    return sorted(files, key=lambda file: not _is_hopper(file)) + sorted(adapter)


def _is_hopper(source: Path) -> bool:
    return "hopper" in source.stem


def _head_dim(source: Path) -> int | None:
    """The head_dim that a source is for; None for all."""
    last = source.stem.rsplit("_", 1)[-1]
    return int(last) if last.isdigit() else None


def _content(source: Path) -> bytes:
    """A source with all files that it includes from its folder and from beside it."""
    seen: dict[str, bytes] = {}
    names = [source.name]
    while names:
        name = names.pop()
        if name not in seen and (source.parent / name).is_file():
            seen[name] = (source.parent / name).read_bytes()
            folder = posixpath.dirname(name)
            names += [
                posixpath.normpath(posixpath.join(folder, found.decode()))
                for found in _LOCAL_INCLUDE.findall(seen[name])
            ]
    return b"".join(name.encode() + b"\0" + seen[name] for name in sorted(seen))
