"""Sizes of labels."""

from __future__ import annotations

import pytest

from fasa_trt.core.labels import LABEL_KINDS, label_bytes, scale_bytes

SIZES = [("prefix", 0, 0), ("int4", 24, 2), ("int8", 48, 2), ("fp8", 48, 0)]


@pytest.mark.parametrize(("kind", "label", "scale"), SIZES)
def test_bytes(kind: str, label: int, scale: int) -> None:
    assert (label_bytes(kind, 24), scale_bytes(kind)) == (label, scale)


def test_every_kind_has_a_number() -> None:
    assert {kind: LABEL_KINDS[kind] for kind, _, _ in SIZES} == LABEL_KINDS
    assert sorted(LABEL_KINDS.values()) == [0, 1, 2, 3]
