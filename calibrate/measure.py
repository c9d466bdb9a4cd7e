"""What single frequency chunks (FCs) of an attention layer tell about its attention.

With queries and keys after RoPE, FC i of a head gives key j the partial logit a_i[j], a dot product of two dims; the
logit itself is a[j] = sum_i a_i[j]. Measured over the keys that a query sees (arXiv 2602.03152, calibration):

    agreement  share of the top K keys by a that are also among the top K by a_i
    spread     standard deviation of a_i over the keys

Partial logits of a KV head's query heads and all FCs are computed in one piece if they fit into SCRATCH_BYTES, and FC
by FC where they do not. That, and one KV head's keys in float32, is all the memory that measuring takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from fasa_trt.calibrate.agreement import found_share

SCRATCH_BYTES = 256 << 20
_BYTES_PER_LOGIT = 32  # float32 values, their copies, and the int64 indices of a GPU's top-k
_MAX_THREADS = 16  # each with its part of SCRATCH_BYTES

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class DecodeSteps:
    """What one attention layer works on when some tokens of a text are decoded.

    q: [heads, steps, d], the tokens' queries after RoPE. k: [kv_heads, length, d], all keys after RoPE.
    pairs: int64 [F, 2], the head dims of each FC. positions: the tokens' places in the text.
    scale: factor on the logits. window: keys that a token sees, itself included; None for all before it.
    """

    q: Tensor
    k: Tensor
    pairs: Tensor
    positions: Sequence[int]
    scale: float = 1.0
    window: int | None = None

    def every(self, stride: int) -> DecodeSteps:
        """Every stride-th step."""
        return replace(self, q=self.q[:, ::stride], positions=self.positions[::stride])

    def heads(self, kv_head: int) -> slice:
        """The query heads that share a KV head."""
        group = len(self.q) // len(self.k)
        return slice(kv_head * group, (kv_head + 1) * group)

    def of_kv_head(self, kv_head: int) -> list[tuple[Tensor, Tensor]]:
        """For each step the scaled queries [G, 2, F] and the keys [2, F, n] that they see, float32."""
        queries = (self.q[self.heads(kv_head)].float() * self.scale)[..., self.pairs.T]
        keys = self.k[kv_head].float().T[self.pairs.T]
        starts = [0 if self.window is None else max(0, p + 1 - self.window) for p in self.positions]
        seen = zip(starts, self.positions, strict=True)
        return [(queries[:, step], keys[..., first : last + 1]) for step, (first, last) in enumerate(seen)]


def measure(steps: DecodeSteps, ks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Agreement [len(ks), heads, F] and spread [heads, F] (in logits) of every FC, means over the steps; float32."""
    agreement = steps.q.new_zeros(len(ks), len(steps.q), len(steps.pairs), dtype=torch.float32)
    spread = torch.zeros_like(agreement[0])

    def one(step: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        queries, keys = step
        top = true_top(queries, keys, max(ks))
        found, deviation = [], []
        for part in chunk_slices(len(steps.pairs), queries, keys):
            logits = partial_logits(queries[..., part], keys[:, part])
            deviation.append(_deviation(logits))
            found.append(found_share(logits, top, ks))
        return torch.cat(found, dim=-1), torch.cat(deviation, dim=-1)

    for kv_head in range(len(steps.k)):
        heads = steps.heads(kv_head)
        for found, deviation in each(one, steps.of_kv_head(kv_head), on=steps.k.device):
            agreement[:, heads] += found
            spread[heads] += deviation
    return agreement / len(steps.positions), spread / len(steps.positions)


def measure_sets(steps: DecodeSteps, sets: Tensor, ks: Sequence[int]) -> Tensor:
    """Agreement [len(ks), heads] of whole sets of FCs, by the sum of their partial logits; means over the steps.

    sets: int64 [kv_heads, size], the FCs that serve all query heads of each KV head.
    """
    agreement = steps.q.new_zeros(len(ks), len(steps.q), dtype=torch.float32)
    for kv_head, chosen in enumerate(sets):
        for queries, keys in steps.of_kv_head(kv_head):
            logits = summed_logits(queries[..., chosen], keys[:, chosen])
            found = found_share(logits[:, None], true_top(queries, keys, max(ks)), ks)
            agreement[:, steps.heads(kv_head)] += found[..., 0]
    return agreement / len(steps.positions)


def partial_logits(queries: Tensor, keys: Tensor) -> Tensor:
    """a_i for every FC i: [G, F, n] from queries [G, 2, F] and keys [2, F, n]."""
    logits = queries[:, 0, :, None] * keys[0]
    return logits.addcmul_(queries[:, 1, :, None], keys[1])


def summed_logits(queries: Tensor, keys: Tensor) -> Tensor:
    """sum_i a_i: [G, n] from queries [G, 2, F] and keys [2, F, n]."""
    return queries[:, 0] @ keys[0] + queries[:, 1] @ keys[1]


def true_top(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """The k keys of highest logit, best first: int64 [G, min(k, n)]."""
    return summed_logits(queries, keys).topk(min(k, keys.shape[-1])).indices


def chunk_slices(chunks: int, queries: Tensor, keys: Tensor) -> Iterator[slice]:
    """Parts of `chunks` FCs whose partial logits, [G, part, n], fit into one worker's scratch memory."""
    scratch = SCRATCH_BYTES // (_MAX_THREADS if keys.device.type == "cpu" else 1)
    size = max(1, scratch // (_BYTES_PER_LOGIT * len(queries) * keys.shape[-1]))
    for start in range(0, chunks, size):
        yield slice(start, min(start + size, chunks))


def each(function: Callable[[Item], Result], items: Iterable[Item], *, on: torch.device) -> list[Result]:
    """[function(item) for item in items], on a CPU with one item per thread.

    A GPU is kept busy by one thread. On a CPU, torch's own threads inside of each operation would gain less, and
    their idle spinning would take the cores away from NumPy's sorting.
    """
    if on.type != "cpu":
        return [function(item) for item in items]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, _MAX_THREADS)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)


def _deviation(logits: Tensor) -> Tensor:
    """Standard deviation along the last dim; torch.std is several times slower on a CPU."""
    centred = logits - logits.mean(-1, keepdim=True)
    return torch.linalg.vector_norm(centred, dim=-1) / logits.shape[-1] ** 0.5
