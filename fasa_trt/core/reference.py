"""FASA in one screen: the definition that every other execution is tested against.

Source: "FASA: Frequency-aware Sparse Attention", arXiv 2602.03152, sections on token importance prediction (TIP) and
focused attention computation (FAC). Written for one KV head and one decode step; float32 or float64, never fast.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasa_trt.core.spec import SAMPLE_EVERY, SAMPLE_RUN, SparseSpec

Array = NDArray[Any]


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sampled(length: int) -> Array:
    """The sample of `sampled_softmax`, bool [length]: of the runs of SAMPLE_RUN tokens, every SAMPLE_EVERY-th from the
    first on, which holds the sinks, and the last two, of which the very last may be shorter."""
    run = np.arange(length) // SAMPLE_RUN
    return (run % SAMPLE_EVERY == 0) | (run >= (length - 1) // SAMPLE_RUN - 1)


def importance(q: Array, k: Array, dims: Array, scale: float, reduction: str) -> Array:
    """TIP: scores [1, L] ([G, L] for `per_head`) of L cached tokens from the dominant `dims` alone."""
    s = scale * q[:, dims] @ k[:, dims].T
    match reduction:
        case "sum":
            return s.sum(axis=0, keepdims=True)
        case "mean_softmax":
            return softmax(s).mean(axis=0, keepdims=True)
        case "max_softmax":
            return softmax(s).max(axis=0, keepdims=True)
        case "sampled_softmax":  # in logs: a token outside the sample may exceed it by far
            counted = sampled(s.shape[1]) & np.isfinite(s)
            normaliser = np.logaddexp.reduce(s, axis=1, keepdims=True, where=counted, initial=-np.inf)
            with np.errstate(invalid="ignore"):  # NaN keys have NaN scores
                return np.logaddexp.reduce(s - normaliser, axis=0, keepdims=True) - math.log(len(s))
        case "per_head":
            return s
    raise ValueError(reduction)


def select(scores: Array, budget: int, sink: int, recent: int) -> Array:
    """The `budget` tokens to attend, int64 [rows, budget] ascending: sinks and recent ones, then the highest scores.

    Ties go to the lower position; NaN ranks below every number.
    """
    length = scores.shape[-1]
    s = np.where(np.isnan(scores), -np.inf, scores)
    forced = (np.arange(length) < sink) | (np.arange(length) >= length - recent)
    order = np.lexsort((np.broadcast_to(np.arange(length), s.shape), -s, np.broadcast_to(~forced, s.shape)))
    return np.sort(order[:, :budget], axis=-1)


def attend(q: Array, k: Array, v: Array, scale: float, softcap: float | None = None) -> Array:
    """Exact attention of q [G, d] over k, v [L, d]; returns [G, d]."""
    s = scale * q @ k.T
    if softcap:
        s = softcap * np.tanh(s / softcap)
    return softmax(s) @ v


def decode(
    q: Array, k: Array, v: Array, dims: Array, spec: SparseSpec, scale: float, softcap: float | None = None
) -> Array:
    """One FASA decode step of one KV head.

    q: [G, d], the group's queries after RoPE. k, v: [L, d], the cache after RoPE, current token last.
    dims: [2 * n_tip], the head dims of the KV head's dominant frequency chunks.
    scale: factor on the logits, usually 1/sqrt(d). softcap: logit soft-cap (Gemma 2), FAC only.
    Returns [G, d]; dense attention when L <= budget.
    """
    if len(k) <= spec.budget:
        return attend(q, k, v, scale, softcap)
    chosen = select(importance(q, k, dims, scale, spec.reduction), spec.budget, spec.sink, spec.recent)
    if spec.reduction != "per_head":
        return attend(q, k[chosen[0]], v[chosen[0]], scale, softcap)
    rows = [attend(q[h : h + 1], k[c], v[c], scale, softcap) for h, c in enumerate(chosen)]
    return np.concatenate(rows)
