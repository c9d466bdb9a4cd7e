"""Registering the plugin with a TensorRT that is already there, or about to be: a library stands in for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.tensorrt.conftest import official_headers, require_compiler
from tests.plugins.tensorrt.driver import HERE, compile_shared

REGISTERED = "registered FasaAttention 1 ai.fasa\n"


@pytest.fixture(scope="session", params=["10", "11", "official", "12"])
def tensorrt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_compiler()
    headers = official_headers()
    options = [f"-DFAKE_MAJOR={request.param}"]
    if request.param == "official":
        if headers is None:
            pytest.skip("needs TENSORRT_ROOT")
        options = ["-DFASA_TENSORRT_HEADERS=1", "-isystem", str(headers), "-Wno-deprecated-declarations"]
    exported = '-DFAKE_API=__attribute__((visibility("default")))'
    folder = tmp_path_factory.mktemp(f"tensorrt-{request.param}")
    return compile_shared(folder / "libnvinfer.so.1", [HERE / "fake_tensorrt.cpp"], exported, *options)


def run(code: str, **environment: str) -> tuple[str, str]:
    """What a new process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return done.stdout, done.stderr


def test_on_load(tensorrt: Path, stub_library: Path) -> None:
    """As in a server: preloaded into a program that knows nothing of it."""
    out, error = run("print('done')", LD_PRELOAD=str(stub_library), FASA_TRT_REGISTER=str(tensorrt))
    if "tensorrt-12" in str(tensorrt):
        assert out == "done\n"
        assert error == "[fasa] FasaAttention: cannot register: TensorRT 12 is not known, only 10 and 11\n"
    else:
        assert (out, error) == (REGISTERED + "done\n", "")


def test_without_the_variable_nothing_happens(stub_library: Path) -> None:
    assert run("print('done')", LD_PRELOAD=str(stub_library), FASA_TRT_REGISTER="") == ("done\n", "")


def test_when_called(tensorrt: Path, stub_library: Path) -> None:
    """The second time TensorRT refuses."""
    code = f"""
import ctypes
register = ctypes.CDLL({str(stub_library)!r}).fasa_trt_register
print(register({str(tensorrt).encode()!r}), register({str(tensorrt).encode()!r}))
"""
    if "tensorrt-12" in str(tensorrt):
        pytest.skip("not a TensorRT that is known")
    out, error = run(code, FASA_TRT_REGISTER="")
    assert out == 2 * REGISTERED + "0 1\n"
    assert error.endswith("cannot register: TensorRT refuses, perhaps because it is registered already\n")


@pytest.mark.parametrize(("named", "message"), [("libmissing.so", "libmissing.so"), ("libc.so.6", "is not TensorRT")])
def test_what_is_no_tensorrt(stub_library: Path, named: str, message: str) -> None:
    code = f"import ctypes; assert ctypes.CDLL({str(stub_library)!r}).fasa_trt_register({named.encode()!r}) == 1"
    error = run(code, FASA_TRT_REGISTER="")[1]
    assert error.startswith("[fasa] FasaAttention: cannot register: ") and message in error
