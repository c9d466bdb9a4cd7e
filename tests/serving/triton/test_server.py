"""Finding a tritonserver, and what it is told."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fasa_trt.core.errors import FasaError
from fasa_trt.serving.triton import server

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No server on PATH, none of a container, an empty cache."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FASA_TRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(server, "CONTAINER", tmp_path / "none")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that looks like nvidia-pytriton, in an environment with numpy 1.26."""
    root = tmp_path / "site" / "pytriton"
    stub = root / "tritonserver" / "python_backend_stubs" / VERSION / server.STUB
    backend = root / "tritonserver" / "backends" / "python" / "libtriton_python.so"
    for file in (stub, backend):
        file.parent.mkdir(parents=True)
        file.write_text(file.name)
    spec = importlib.machinery.ModuleSpec("pytriton", None, is_package=True)
    spec.submodule_search_locations = [str(root)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.26.4")
    return root


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "models" / "fasa").mkdir(parents=True)
    (tmp_path / "models" / "fasa" / "config.pbtxt").write_text("")
    return tmp_path / "models"


def test_none_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FasaError, match=r"tritonserver is not installed \(pip install --no-deps nvidia-pytriton"):
        server.find_server()


def test_server_on_path_comes_first(package: Path, tmp_path: Path, repository: Path) -> None:
    (tmp_path / "tritonserver").write_text("#!/bin/sh\n")
    (tmp_path / "tritonserver").chmod(0o755)
    found = server.command(repository, ["--http-address=0.0.0.0", "--log-verbose=1"])
    assert found.environment == {}
    assert found.arguments == (
        str(tmp_path / "tritonserver"),
        f"--model-repository={repository}",
        "--grpc-address=127.0.0.1",
        "--metrics-address=127.0.0.1",
        "--http-address=0.0.0.0",
        "--log-verbose=1",
    )


def test_package(package: Path, tmp_path: Path, repository: Path) -> None:
    found = server.command(repository, [])
    assert found.arguments[0] == str(package / "tritonserver" / "bin" / "tritonserver")
    backends = Path(found.arguments[1].removeprefix("--backend-directory="))
    assert {file.name for file in (backends / "python").iterdir()} == {server.STUB, "libtriton_python.so"}
    assert str(tmp_path / "site" / "nvidia_pytriton.libs") in found.environment["LD_LIBRARY_PATH"].split(os.pathsep)
    assert found.environment["PATH"].split(os.pathsep)[0] == str(Path(sys.prefix) / "bin")
    assert server.command(repository, []) == found  # from the cache
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [backends.name]


def test_package_that_cannot_run_this_python(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.4.6")
    with pytest.raises(FasaError, match=r"needs numpy 1\.26, not 2\.4\.6"):
        server.find_server()
    (package / "tritonserver" / "python_backend_stubs" / VERSION / server.STUB).unlink()
    with pytest.raises(FasaError, match=f"does not run Python {VERSION} models"):
        server.find_server()


def test_cache_that_cannot_be_written(package: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(FasaError, match=r"cannot write .*cache.* \(set FASA_TRT_CACHE\)"):
        server.find_server()


def test_no_repository(tmp_path: Path) -> None:
    with pytest.raises(FasaError, match="is not a model repository"):
        server.command(tmp_path, [])


def test_errors_are_one_line(tmp_path: Path) -> None:
    module = [sys.executable, "-m", "fasa_trt.serving.triton.server"]
    for arguments, reason in (([], "usage:"), ([str(tmp_path / "none")], "error: ")):
        done = subprocess.run([*module, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith(reason) and len(done.stderr.splitlines()) == 1
