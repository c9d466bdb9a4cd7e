"""TensorRT's plugin library: which file it is, what tells it from another, and how a TensorRT gets to know it."""

from __future__ import annotations

import ctypes
import hashlib
import os
from pathlib import Path
from typing import Any

from fasa_trt.core.engine_dir import sha256
from fasa_trt.core.errors import FasaError
from fasa_trt.plugins import library, toolchain

CREATOR = ("FasaAttention", "1", "ai.fasa")  # name, version and namespace, as in tensorrt/fasa_attention.h
VARIABLE = "FASA_TRT_PLUGIN"  # names a library that was built elsewhere
SOURCE_SUFFIXES = (".h", ".cpp", ".cu", ".cuh")
FILE = f"libfasa_trt_plugin{library.SUFFIX}"  # what a copy is called

_loaded: dict[str, tuple[Path, Any, ctypes.CDLL]] = {}  # by TensorRT's module


def find(head_dim: int, architecture: str | None = None) -> Path | None:
    """The library with kernels for `head_dim`, where there is one: the file that $FASA_TRT_PLUGIN names, or one that
    the cache has of the sources as they are. architecture: "90" for compute capability 9.0; None takes any, which is
    enough to build an engine. Raises FasaError when the variable names no file, or the architecture is unknown."""
    named = os.environ.get(VARIABLE)
    if named:
        if not Path(named).is_file():
            raise FasaError(f"{VARIABLE} names {named}, which is no file", hint="name libfasa_trt_plugin, or unset it")
        return Path(named).resolve()
    for name in library.ARCHITECTURES if architecture is None else (architecture,):
        file = library.find(name, (head_dim,), plugin=True)
        if file is not None:
            return file
    return None


def missing(head_dim: int, architecture: str | None = None) -> str | None:
    """What keeps `provide` from giving a library, in words; None when it will."""
    try:
        if find(head_dim, architecture) is not None:
            return None
        if architecture is None:
            return "there is no GPU here to compile the plugin library for, and --arch names none"
        toolchain.find_nvcc()
        toolchain.find_flashinfer()
        toolchain.find_tensorrt_headers()
    except FasaError as error:
        return str(error)
    return None


def provide(head_dim: int, architecture: str | None = None, *, progress: library.Progress | None = None) -> Path:
    """The library that `find` finds, else one that is compiled now, in minutes. Raises FasaError when neither can be
    done."""
    found = find(head_dim, architecture)
    if found is not None:
        return found
    if architecture is None:
        raise FasaError(
            "no plugin library is at hand, and no GPU here to compile it for", hint=f"--arch, or set {VARIABLE}"
        )
    return library.build_plugin(architecture, (head_dim,), progress=progress)


def describe(file: Path) -> dict[str, Any]:
    """What an engine's manifest says of the library that it was built with: name, sha256, version of the plugin's
    interface, and a digest of the sources where they are ours. Another library with equal sources serves it, too:
    another GPU architecture's, or one for more head_dims."""
    ours = file.parent == library.cache_directory() and not os.environ.get(VARIABLE)  # else of sources unknown
    return {
        "name": file.name,
        "sha256": sha256(file),
        "version": CREATOR[1],
        "sources": source_digest() if ours else None,
    }


def source_digest() -> str:
    """Of the kernels and of the plugin around them; the same for every architecture and compiler."""
    digest = hashlib.sha256()
    for folder in (library.KERNELS, library.TENSORRT):
        for file in sorted(folder.iterdir()):
            if file.suffix in SOURCE_SUFFIXES:
                digest.update(file.name.encode() + b"\0" + sha256(file).encode())
    return digest.hexdigest()[:16]


def load(trt: Any, file: Path) -> None:
    """Loads the library into this process and registers its creator with `trt`, a TensorRT's Python module.

    One library is registered at a time; it is never unloaded, as networks and engines that it took part in may live
    on. Where a creator is registered already by other means, it stays: what a plan holds of a plugin is its name and
    its attributes, whichever library read them. Raises FasaError when it cannot be loaded or has no creator.
    """
    known = _loaded.get(trt.__name__)
    if known is not None and known[0] == file:
        return
    registry = trt.get_plugin_registry()
    try:
        pinned = ctypes.CDLL(str(file))  # TensorRT's own loading says nothing when it fails
    except OSError as error:
        raise FasaError(f"the plugin library does not load: {error}", hint="fasa-trt plugin build --force") from None
    if known is not None:
        registry.deregister_library(known[1])
        del _loaded[trt.__name__]
    if registry.get_creator(*CREATOR) is not None:
        return
    handle = registry.load_library(str(file))
    if registry.get_creator(*CREATOR) is None:
        raise FasaError(
            f"{file} has no TensorRT plugin {CREATOR[0]}", hint="make one with fasa-trt plugin build --kind tensorrt"
        )
    _loaded[trt.__name__] = file, handle, pinned
