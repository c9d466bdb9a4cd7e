"""Starts tritonserver on a repository: `python -m fasa_trt.serving.triton.server REPOSITORY [tritonserver options]`.

The server is the one on PATH or in NVIDIA's containers, or else the one in the nvidia-pytriton package, of which only
the binaries are used. That one runs models with this Python and all that is installed for it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fasa_trt.core.errors import FasaError
from fasa_trt.plugins.library import cache_directory

CONTAINER = Path("/opt/tritonserver/bin/tritonserver")
ADDRESSES = ("--http-address", "--grpc-address", "--metrics-address")
STUB = "triton_python_backend_stub"
NUMPY = "pip install 'numpy<2' into an environment of its own, or use NVIDIA's tritonserver container"
INSTALL = "pip install --no-deps nvidia-pytriton, or use NVIDIA's tritonserver container"

# https://nvd.nist.gov/vuln/detail/CVE-2025-23310 and its kin, all of them mended in Triton 25.07.
OLD = (
    "nvidia-pytriton's tritonserver has known security holes, keep other machines away from it (use NVIDIA's container)"
)


@dataclass(frozen=True)
class Server:
    """arguments: the program and what it needs to be told; environment: beside this process's."""

    arguments: tuple[str, ...]
    environment: dict[str, str]


def find_server() -> Server:
    """Raises FasaError where there is no tritonserver, or the package's cannot run this Python."""
    found = shutil.which("tritonserver") or (str(CONTAINER) if CONTAINER.is_file() else None)
    if found:
        return Server((found,), {})
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise FasaError("tritonserver is not installed", hint=INSTALL)
    root = Path(spec.submodule_search_locations[0])
    server, libraries = root / "tritonserver", root.parent / "nvidia_pytriton.libs"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / STUB
    if not stub.is_file():
        raise FasaError(f"nvidia-pytriton's tritonserver does not run Python {version} models", hint="update it")
    numpy = importlib.metadata.version("numpy")
    if int(numpy.split(".")[0]) > 1:  # it would read garbage from every tensor
        raise FasaError(f"nvidia-pytriton's tritonserver needs numpy 1.26, not {numpy}", hint=NUMPY)
    python_library = Path(sysconfig.get_config_var("LIBDIR") or "")
    path = [str(libraries), os.environ.get("LD_LIBRARY_PATH", "")]
    if (python_library / str(sysconfig.get_config_var("INSTSONAME"))).is_file():  # else the loader must know it
        path.insert(0, str(python_library))
    return Server(
        (str(server / "bin" / "tritonserver"), f"--backend-directory={_backends(server, stub)}"),
        {
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, path)),
            # Its Python looks there for the environment that it is to be.
            "PATH": os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", "")]),
        },
    )


def command(repository: Path, options: list[str]) -> Server:
    """The whole command. Listens on loopback where the options name no address. Raises FasaError as `find_server`
    does, and when there is no repository."""
    if not any((model / "config.pbtxt").is_file() for model in repository.glob("*")):
        raise FasaError(f"{repository} is not a model repository", hint="make one with fasa-trt triton-repo")
    server = find_server()
    named = {option.partition("=")[0] for option in options}
    addresses = [f"{name}=127.0.0.1" for name in ADDRESSES if name not in named]
    arguments = (*server.arguments, f"--model-repository={repository.resolve()}", *addresses, *options)
    return Server(arguments, server.environment)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m fasa_trt.serving.triton.server REPOSITORY [tritonserver options]")
    try:
        server = command(Path(sys.argv[1]), sys.argv[2:])
    except FasaError as error:
        sys.exit(f"error: {error}")
    outside = [option for option in server.arguments if _is_open(option)]
    if outside and server.environment:  # the package's
        print(f"warning: {outside[0]}: {OLD}", file=sys.stderr, flush=True)
    os.execve(server.arguments[0], server.arguments, {**os.environ, **server.environment})


def _is_open(option: str) -> bool:
    name, _, address = option.partition("=")
    return name in ADDRESSES and address not in ("127.0.0.1", "localhost", "::1")


def _backends(server: Path, stub: Path) -> Path:
    """The package's backends, with the stub of this Python among them; the server looks for it nowhere else."""
    size = stub.stat()
    folder = cache_directory() / f"triton-backends-{stub.parent.name}-{size.st_size}-{int(size.st_mtime)}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            shutil.copytree(server / "backends", Path(made) / "backends")
            shutil.copy2(stub, Path(made) / "backends" / "python" / STUB)
            try:
                (Path(made) / "backends").rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    except OSError as error:
        raise FasaError(f"cannot write {folder}: {error.strerror or error}", hint="set FASA_TRT_CACHE") from None
    return folder


if __name__ == "__main__":
    main()
