"""`structs.py` mirrors `fasa.h`, as a C compiler sees it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fasa_trt.core.labels import LABEL_KINDS
from fasa_trt.core.spec import REDUCTION_CODES
from fasa_trt.plugins.library import KERNELS
from fasa_trt.plugins.torch import ops, structs

COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")

STRUCTS: dict[str, type[ctypes.Structure]] = {
    "fasa_pool": structs.Pool,
    "fasa_labels": structs.Labels,
    "fasa_decode_params": structs.DecodeParams,
    "fasa_append_params": structs.AppendParams,
    "fasa_prefill_params": structs.PrefillParams,
}
CONSTANTS = {
    **{f"FASA_LABELS_{name.upper()}": value for name, value in LABEL_KINDS.items()},
    **{f"FASA_REDUCE_{name.upper()}": value for name, value in REDUCTION_CODES.items()},
    **{f"FASA_{str(dtype).removeprefix('torch.').upper()}": value for dtype, value in ops.DTYPES.items()},
    "FASA_OK": 0,
    "FASA_DENSE_AUTO": -1,
}
# What C makes of a field: an enum is an unsigned int.
KIND_OF = """
#define KIND(x) _Generic((x), float: 'f', int32_t: 'i', unsigned: 'i', int64_t: 'q', size_t: 'z', default: 'p')
"""
KINDS = {
    ctypes.c_float: "f",
    ctypes.c_int32: "i",
    ctypes.c_int: "i",
    ctypes.c_int64: "q",
    ctypes.c_size_t: "z",
    ctypes.c_void_p: "p",
}


def compile_c(lines: list[str], folder: Path, *options: str) -> None:
    """Any warning is an error."""
    (folder / "main.c").write_text("\n".join(lines) + "\n")
    command = [str(COMPILER), "-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{KERNELS}", "main.c", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def zeros(struct: type[ctypes.Structure]) -> str:
    """An initialiser with a zero for every field: the compiler objects to more or fewer than there are."""
    parts = [zeros(kind) if issubclass(kind, ctypes.Structure) else "0" for _, kind, *_ in struct._fields_]
    return "{" + ", ".join(parts) + "}"


def test_structs_and_constants(tmp_path: Path) -> None:
    lines = ['#include "fasa.h"', "#include <stdio.h>", KIND_OF, "int main(void) {"]
    expected = []
    for name, struct in STRUCTS.items():
        lines.append(f"    {name} {name}_ = {zeros(struct)};")
        lines.append(f'    printf("{name} %zu\\n", sizeof {name}_);')
        expected.append(f"{name} {ctypes.sizeof(struct)}")
        for field, kind, *_ in struct._fields_:
            lines.append(
                f'    printf("{name}.{field} %zu %zu %c\\n", offsetof({name}, {field}), sizeof {name}_.{field},'
                f" KIND({name}_.{field}));"
            )
            place = getattr(struct, field)
            expected.append(f"{name}.{field} {place.offset} {place.size} {KINDS.get(kind, 'p')}")
    for name, value in CONSTANTS.items():
        lines.append(f'    printf("{name} %d\\n", {name});')
        expected.append(f"{name} {value}")
    compile_c([*lines, "}"], tmp_path, "-o", "main")
    printed = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == expected


def test_every_function_of_the_header_is_declared(tmp_path: Path) -> None:
    """Their signatures agree: ctypes' words for them, in C, are accepted for the header's functions."""

    class Library:
        def __init__(self) -> None:
            self.functions: dict[str, Any] = {}

        def __getattr__(self, name: str) -> Any:
            return self.functions.setdefault(name, ctypes.CFUNCTYPE(ctypes.c_int)())

    library = Library()
    structs.declare(library)  # type: ignore[arg-type]
    words: dict[Any, str] = {ctypes.POINTER(struct): f"const {name}*" for name, struct in STRUCTS.items()}
    words |= {ctypes.c_void_p: "void*", ctypes.c_size_t: "size_t", ctypes.c_char_p: "const char*"}
    lines = ['#include "fasa.h"']
    for name, function in library.functions.items():
        arguments = ", ".join(words.get(kind, "fasa_status") for kind in function.argtypes)
        result = words.get(function.restype) or ("int32_t" if name == "fasa_dense_below" else "fasa_status")
        lines.append(f"{result} (*check_{name})({arguments});")
        lines.append(f"void take_{name}(void) {{ check_{name} = {name}; }}")
    compile_c(lines, tmp_path, "-fsyntax-only")
    assert len(library.functions) == KERNELS.joinpath("fasa.h").read_text().count("\nFASA_API ")
