"""The C++ examples, compiled and run against hand-written declarations (`declarations/`), with a played engine behind
them; and compiled against TensorRT's own headers where TENSORRT_ROOT names them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_tensorrt import BLOCK, HEAD_DIM, LENGTH, PLAN, TOKENS, config
from tests.simulated_engine import VOCAB, alone

SOURCES = Path(__file__).resolve().parents[2] / "examples" / "cpp"
DECLARATIONS = Path(__file__).resolve().parent / "declarations"
DEFINES = [f"-DBLOCK={BLOCK}", f"-DHEAD_DIM={HEAD_DIM}", f"-DVOCAB={VOCAB}"]
COMPILER = shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(COMPILER is None or sys.platform == "win32", reason="needs g++ or clang++")


def compile_with(*arguments: str | Path) -> None:
    command = [str(COMPILER), "-std=c++17", "-Wall", "-Wextra", "-Werror", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run(program: Path, *arguments: object) -> tuple[int, list[int], str]:
    done = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, timeout=60)
    return done.returncode, [int(line) for line in done.stdout.split()], done.stderr


@pytest.fixture(scope="module")
def embed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("embed") / "tensorrt_embed"
    checked = "-fsanitize=address,undefined", "-fno-sanitize-recover=all"  # writes beside the pool show
    compile_with(*DEFINES, *checked, "-isystem", DECLARATIONS, SOURCES / "tensorrt_embed.cpp", "-o", program)
    return program


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0")  # the example leaves memory to the end of the process
    (tmp_path / "config.json").write_text(json.dumps(config(), indent=2), "utf-8")
    (tmp_path / "rank0.engine").write_bytes(PLAN)
    return tmp_path


@pytest.mark.parametrize("length", [1, 7, BLOCK, TOKENS, TOKENS + 1, 55])
def test_embed_gives_the_engine_s_answer(length: int, embed: Path, engine: Path) -> None:
    """Prompts of one chunk and of several, in two pools, to the end of the sequence or to the end of text."""
    prompt = [(3 * i + 1) % VOCAB for i in range(length)]
    status, answer, errors = run(embed, engine, "plugin", 40, *prompt)
    assert (status, errors) == (0, "")
    assert answer == alone(prompt, 40, {3}, LENGTH)


def test_embed_without_heads_per_layer(embed: Path, engine: Path) -> None:
    content = config()
    del content["pretrained_config"]["num_kv_heads_per_layer"]
    content["fasa"]["eos_token_ids"] = []
    (engine / "config.json").write_text(json.dumps(content), "utf-8")
    assert run(embed, engine, "plugin", 12, 1, 2)[1] == alone([1, 2], 12, set(), LENGTH)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "plugin", 3, 1], "cannot read nowhere/config.json"),
        (["ENGINE", "other", 3, 1], "other has no plugin FasaAttention"),
        (["ENGINE", "plugin", 3, *[1] * LENGTH], "the prompt does not fit this engine"),
        (["CORRUPT", "plugin", 3, 1], "TensorRT cannot load the engine"),
        (["ENGINE"], "usage: tensorrt_embed ENGINE_DIR"),
    ],
)
def test_embed_says_what_is_wrong(arguments: list[object], message: str, embed: Path, engine: Path) -> None:
    if arguments[0] == "CORRUPT":
        (engine / "rank0.engine").write_bytes(b"")
    status, answer, errors = run(embed, *(engine if a in ("ENGINE", "CORRUPT") else a for a in arguments))
    assert status != 0 and not answer and message in errors and errors.count("\n") == 1


def test_executor(tmp_path: Path) -> None:
    program, library, stranger = (tmp_path / name for name in ("trtllm_executor", "plugin.so", "other.so"))
    compile_with("-isystem", DECLARATIONS, SOURCES / "trtllm_executor.cpp", "-o", program, "-ldl")
    for file, name in ((library, "fasa_trt_register"), (stranger, "another")):
        source = file.with_suffix(".cpp")
        check = 'std::strcmp(library, "libnvinfer.so.10") != 0'
        source.write_text(f'#include <cstring>\nextern "C" int {name}(const char* library) {{ return {check}; }}\n')
        compile_with("-shared", "-fPIC", source, "-o", file)
    assert run(program, tmp_path, library, 5, 50, 1, 2) == (0, [3, 4, 5, 6, 7], "")
    assert run(program, tmp_path, library, 9, 5, 1, 2) == (0, [3, 4, 5], "")
    for plugin, first, message in (
        (library, 99, "the request is refused"),
        (stranger, 1, "other.so does not register the plugin FasaAttention"),
        (tmp_path / "nowhere.so", 1, "the plugin library does not load: "),
    ):
        status, answer, errors = run(program, tmp_path, plugin, 5, 50, first)
        assert status == 1 and not answer and message in errors


def test_cmake_builds_both(tmp_path: Path) -> None:
    """The build finds TensorRT and TensorRT-LLM by their roots: here the declarations, beside empty libraries."""
    if shutil.which("cmake") is None or shutil.which("nvcc") is None:
        pytest.skip("needs cmake and the CUDA toolkit")
    root = tmp_path / "root"
    shutil.copytree(DECLARATIONS, root / "include")
    (root / "lib").mkdir()
    (tmp_path / "empty.cpp").touch()
    for name in ("nvinfer", "tensorrt_llm", "nvinfer_plugin_tensorrt_llm"):
        compile_with("-shared", "-fPIC", tmp_path / "empty.cpp", "-o", root / "lib" / f"lib{name}.so")
    flags = f"-DCMAKE_CXX_FLAGS={' '.join(DEFINES)}"
    roots = {"TENSORRT_ROOT": str(root), "TENSORRT_LLM_ROOT": str(root)}
    for command in (["-S", SOURCES, "-B", tmp_path / "build", flags], ["--build", tmp_path / "build"]):
        arguments = ["cmake", *map(str, command)]
        done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, **roots})
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "build" / "tensorrt_embed").is_file() and (tmp_path / "build" / "trtllm_executor").is_file()


def test_embed_compiles_with_tensorrt_s_own_headers() -> None:
    root = os.environ.get("TENSORRT_ROOT")
    nvcc = shutil.which("nvcc")
    if not root or nvcc is None:
        pytest.skip("needs TENSORRT_ROOT and the CUDA toolkit")
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    compile_with(
        "-fsyntax-only", "-isystem", Path(root) / "include", "-isystem", toolkit, SOURCES / "tensorrt_embed.cpp"
    )
