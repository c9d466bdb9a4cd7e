"""What the exporter believes of the kernels is what their header says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fasa_trt.core.labels import LABEL_KINDS
from fasa_trt.core.spec import REDUCTION_CODES, REDUCTIONS
from fasa_trt.export import plugin_limits
from fasa_trt.export.plugin_limits import default_labels, default_n_tip, fits_label_head, nearest_n_tip

HEADER = Path(__file__).parents[2] / "plugins" / "kernels" / "fasa.h"


def test_codes_and_limits_are_those_of_the_kernels() -> None:
    text = HEADER.read_text("utf-8")

    def code(name: str) -> int:
        found = re.search(rf"\b{name} = (-?\d+)", text)
        assert found, name
        return int(found[1])

    assert set(REDUCTION_CODES) == set(REDUCTIONS)
    assert {name: code(f"FASA_REDUCE_{name.upper()}") for name in REDUCTIONS} == REDUCTION_CODES
    assert {kind: code(f"FASA_LABELS_{kind.upper()}") for kind in LABEL_KINDS} == LABEL_KINDS

    def numbers(field: str) -> tuple[int, ...]:
        found = re.search(rf"int32_t {field};\s*/\*([\d, or]+)", text)
        assert found, field
        return tuple(int(number) for number in re.findall(r"\d+", found[1]))

    assert numbers("head_dim") == plugin_limits.HEAD_DIMS
    assert numbers("n_tip") == plugin_limits.N_TIPS


def test_nearest_n_tip() -> None:
    assert [nearest_n_tip(n, 128) for n in (1, 9, 12, 24, 30, 60)] == [8, 8, 16, 24, 32, 64]
    assert nearest_n_tip(32, 64) == 32
    assert nearest_n_tip(48, 96) == 48


def test_what_fits_into_a_label_head() -> None:
    """A row of 128 elements of 16 bits is 256 bytes: 4-bit labels of 32 chunks take 32 for each KV head."""
    assert fits_label_head("int4", 32, 8, 128) and not fits_label_head("int4", 32, 9, 128)
    assert fits_label_head("int8", 16, 8, 128) and not fits_label_head("int8", 32, 8, 128)
    assert fits_label_head("fp8", 32, 4, 128) and not fits_label_head("fp8", 32, 5, 128)


def test_default_labels_and_n_tip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_limits, "READABLE", ("prefix",))
    assert default_labels(8, 128, None) == "prefix"
    monkeypatch.setattr(plugin_limits, "READABLE", ("prefix", "int4"))
    assert [default_labels(heads, 128, None) for heads in (1, 8, 9, 32)] == ["int4", "int4", "prefix", "prefix"]
    assert [default_labels(8, 128, n_tip) for n_tip in (8, 32, 48)] == ["int4", "int4", "prefix"]
    assert [default_n_tip("prefix", 8, head_dim) for head_dim in (64, 96, 128, 256)] == [16, 16, 24, 48]
    assert [default_n_tip("int4", 8, head_dim) for head_dim in (64, 96, 128, 256)] == [16, 24, 32, 64]
    assert [default_n_tip("int8", heads, 128) for heads in (4, 8, 16, 32)] == [32, 16, 8, 32], "the last is refused"
