"""What the exporter believes of the kernels is what their header says."""

from __future__ import annotations

import re
from pathlib import Path

from fasa_trt.core.spec import REDUCTIONS
from fasa_trt.export import plugin_limits
from fasa_trt.export.plugin import REDUCTION_CODES
from fasa_trt.export.plugin_limits import LABEL_KINDS, nearest_n_tip

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
