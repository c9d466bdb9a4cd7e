"""Greedy choice of frequency chunks (FCs): each next one is the one that most helps those already taken.

Ranking FCs by themselves takes several that know the same keys. Forward selection measures sets instead: it takes the
FC whose partial logits, added to those of the set so far, find most of the true top K keys. It costs a pass over the
partial logits for every FC that it takes, against one pass in all for the other rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fasa_trt.calibrate.agreement import found_share
from fasa_trt.calibrate.measure import DecodeSteps, chunk_slices, each, partial_logits, true_top


@dataclass
class _Step:
    """One step of one text: queries [G, 2, F], keys [2, F, n], true top [G, k], the set's logits so far [G, n]."""

    queries: Tensor
    keys: Tensor
    top: Tensor
    logits: Tensor


def forward_selection(texts: Sequence[DecodeSteps], *, k: int, rounds: int) -> Tensor:
    """FCs of each KV head in the order in which they are taken, best first: int64 [kv_heads, F].

    texts: the same layer on several texts; agreement at `k` is averaged over their steps and the KV head's query heads.
    rounds: FCs taken one by one; the rest follows by the agreement that it had in the last round.
    Ties go to the lower FC. Keeps one KV head's keys of all texts in float32.
    """
    return torch.stack([_of_kv_head(texts, kv_head, k, rounds) for kv_head in range(len(texts[0].k))])


def _of_kv_head(texts: Sequence[DecodeSteps], kv_head: int, k: int, rounds: int) -> Tensor:
    steps = [
        _Step(queries, keys, true_top(queries, keys, k), queries.new_zeros(len(queries), keys.shape[-1]))
        for text in texts
        for queries, keys in text.of_kv_head(kv_head)
    ]
    taken: list[int] = []
    rest = list(range(len(texts[0].pairs)))

    def gain(step: _Step) -> Tensor:
        """Agreement [len(rest)] of the set with each of the rest, mean over query heads."""
        found = []
        for part in chunk_slices(len(rest), step.queries, step.keys):
            logits = partial_logits(step.queries[..., rest[part]], step.keys[:, rest[part]])
            found.append(found_share(logits.add_(step.logits[:, None]), step.top, (k,))[0])
        return torch.cat(found, dim=-1).mean(0)

    for _ in range(min(rounds, len(rest))):
        agreement = torch.stack(each(gain, steps, on=texts[0].k.device)).mean(0)
        best = int(agreement.argmax())
        chosen = rest.pop(best)
        taken.append(chosen)
        for step in steps:
            step.logits += partial_logits(step.queries[..., [chosen]], step.keys[:, [chosen]])[:, 0]
        others = torch.cat([agreement[:best], agreement[best + 1 :]])
    order = others.argsort(descending=True, stable=True).tolist()
    return torch.tensor(taken + [rest[i] for i in order])
