"""What a label of a cached token takes: the dominant dims of its key, by which a decode step scores it.

Numbers and layouts are those of `fasa_label_kind` in `plugins/kernels/fasa.h`.
"""

from __future__ import annotations

from typing import Literal, get_args

LabelKind = Literal["prefix", "int4", "int8", "fp8"]
LABEL_KINDS: dict[str, int] = {kind: code for code, kind in enumerate(get_args(LabelKind))}
SCALE_BYTES = 2  # float16, one a token and KV head


def label_bytes(kind: str, n_tip: int) -> int:
    """Of a token's label beside its key, for one KV head, without the scale: none for "prefix", which is read from the
    key itself. n_tip: frequency chunks, of two dims each."""
    return {"prefix": 0, "int4": 1, "int8": 2, "fp8": 2}[kind] * n_tip


def scale_bytes(kind: str) -> int:
    """Of the label's scale."""
    return SCALE_BYTES if kind in ("int4", "int8") else 0
