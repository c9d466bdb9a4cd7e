"""The settings that a search tries, and the KV bytes that an engine with them reads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.core.profile import Profile
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.plugin_limits import N_TIPS, fits_label_head
from fasa_trt.export.sizes import estimate

BUDGETS = (64, 128, 256, 512, 1024)
REDUCTIONS = ("sum", "sampled_softmax")  # that read the same bytes and score all tokens in one pass
EIGHTHS = (1, 2, 3, 4, 6)  # of the frequency chunks, where no kernel limits the choice
WRITTEN = (
    "target", "lowering", "labels", "budget", "n_tip", "reduction", "rule", "sink", "recent", "dense_layers",
)  # fmt: skip


def grid(
    checkpoint: Checkpoint,
    base: BuildConfig,
    *,
    length: int,
    n_tips: Sequence[int] | None = None,
    budgets: Sequence[int] | None = None,
    reductions: Sequence[str] = REDUCTIONS,
) -> list[BuildConfig]:
    """`base` with every reduction, n_tip and budget; None for those that suit the target and windows of `length`
    tokens.

    base: a resolved configuration. Raises FasaError for given values that its target cannot build, or budgets that
    leave nothing out of `length` tokens.
    """
    if "per_head" in reductions:
        raise FasaError(
            "tuning counts one token set for each KV head, per_head has one for each query head",
            hint="--reduction sum, sampled_softmax or mean_softmax",
        )
    if n_tips is None:
        n_tips = possible_n_tips(checkpoint, base)
    if budgets is None:
        budgets = [budget for budget in BUDGETS if base.sink + base.recent <= budget < length]
    if not budgets or max(budgets) >= length:
        wrong = f"a budget of {max(budgets)}" if budgets else "every budget"
        raise FasaError(f"{wrong} covers a window of {length} tokens", hint="raise --length or lower --budgets")
    settings = base.to_json()
    return [
        BuildConfig.resolve(checkpoint, flags={**settings, "reduction": reduction, "n_tip": n_tip, "budget": budget})
        for reduction, n_tip, budget in itertools.product(reductions, sorted(n_tips), sorted(budgets))
    ]


def possible_n_tips(checkpoint: Checkpoint, base: BuildConfig) -> list[int]:
    """Counts of dominant chunks that the lowering of `base` can score tokens by, ascending."""
    chunks = checkpoint.head_dim // 2
    if base.lowering == "standard":
        return sorted({max(1, chunks * eighths // 8) for eighths in EIGHTHS})
    kind = base.label_kind
    return [
        n_tip
        for n_tip in N_TIPS
        if n_tip <= chunks
        and (kind == "prefix" or fits_label_head(kind, n_tip, checkpoint.num_kv_heads, checkpoint.head_dim))
    ]


def kv_bytes(checkpoint: Checkpoint, profile: Profile | None, config: BuildConfig, length: int) -> tuple[int, int]:
    """Bytes that one decode step of a row of `length` tokens reads, and that it would read densely. Layers with a
    short sliding window, which are the same in both, do not count."""
    sizes = estimate(checkpoint, profile, config)
    read = sizes["kv_read_per_token_fasa"] * length + sizes["kv_read_fixed_fasa"]
    return int(read), int(sizes["kv_read_per_token_dense"] * length)


def build_settings(config: BuildConfig) -> dict[str, Any]:
    """What `fasa-trt build --config` needs of `config`: everything that the loss was measured with, no sizes."""
    settings = config.to_json()
    return {key: settings[key] for key in WRITTEN}
