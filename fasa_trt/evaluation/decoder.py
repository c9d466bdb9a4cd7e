"""Reads documents once, densely, and decodes after them as a method says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation.attention import Pass, Traffic
from fasa_trt.evaluation.cache import EvalCache, empty_cache
from fasa_trt.evaluation.methods.base import Method, Selector
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.steps import Prompt

Rows = Sequence[Sequence[int]]
"""Token ids of each row of a batch."""

LOGITS = {"cpu": 1 << 25, "cuda": 1 << 28}  # attention logits that a pass may hold


@contextlib.contextmanager
def memory_for(rows: int, capacity: int, device: torch.device) -> Iterator[None]:
    """Raises FasaError where the device has not enough."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise FasaError(
            f"{device} ran out of memory with {rows} rows of {capacity} tokens",
            hint="eval: lower --batch-tokens or --contexts; tune: lower --windows or --length",
        ) from None


class Decoder:
    """Runs a model over an `EvalCache`: `prefill`, then any number of branches of `start` and `feed`."""

    def __init__(self, model: EvalModel) -> None:
        self.model = model
        self.dense: list[Selector | None] = [None] * model.num_layers

    def prefill(self, rows: Rows, capacity: int) -> EvalCache:
        """Dense attention over whole documents. capacity: columns, for all that will follow as well."""
        model = self.model
        with memory_for(len(rows), capacity, model.device):
            cache = empty_cache(
                len(rows),
                capacity,
                layers=model.num_layers,
                heads=model.num_heads,
                kv_heads=model.num_kv_heads,
                head_dim=model.head_dim,
                like=torch.empty(0, dtype=model.model.dtype, device=model.device),
            )
        self._run(cache, rows, self.dense, prompt=True, observe=True)
        return cache

    @torch.inference_mode()
    def start(self, cache: EvalCache, method: Method) -> list[Selector | None]:
        """A method's selectors, which have seen the prompt in `cache`."""
        model, selectors = self.model, list(self.dense)
        lengths = torch.tensor(cache.lengths, device=model.device)
        for layer in range(method.dense_layers, model.num_layers):
            selector = method.selector(model, layer) if model.sparse[layer] else None
            if selector is not None:
                q = cache.tails[layer]
                batch, heads, tail, head_dim = q.shape
                grouped = q.view(batch, model.num_kv_heads, heads // model.num_kv_heads, tail, head_dim)
                prompt = Prompt(cache.keys[layer], lengths, grouped, cache.tail_positions(), cache.scales[layer])
                selector.start(prompt)
            selectors[layer] = selector
        return selectors

    def feed(
        self,
        cache: EvalCache,
        rows: Rows,
        selectors: Sequence[Selector | None],
        traffic: Traffic,
        *,
        every: bool = False,
    ) -> Tensor:
        """Decode steps for all tokens of each row, in one pass or a few. Returns float32 logits: [B, V] after each
        row's last token, or [B, T, V] after `every` one (of no meaning beyond a row's own tokens)."""
        if every:
            parts = self._parts(cache, rows)
            return torch.cat([self._run(cache, part, selectors, traffic=traffic) for part in parts], dim=1)
        return self._last(cache, rows, selectors, traffic, observe=False)

    def read_on(self, cache: EvalCache, rows: Rows) -> Tensor:
        """More of the prompt: attended densely, and seen by methods as its end. Returns float32 logits [B, V] after
        each row's last token."""
        return self._last(cache, rows, self.dense, Traffic(), observe=True)

    def _last(
        self, cache: EvalCache, rows: Rows, selectors: Sequence[Selector | None], traffic: Traffic, *, observe: bool
    ) -> Tensor:
        """Logits after each row's last token, wherever the pieces cut the row."""
        logits: Tensor | None = None
        for part in self._parts(cache, rows):
            found = self._run(cache, part, selectors, traffic=traffic, observe=observe, last=True)[:, 0]
            here = torch.tensor([[bool(row)] for row in part], device=found.device)
            logits = found if logits is None else torch.where(here, found, logits)
        assert logits is not None  # there are tokens
        return logits

    def _parts(self, cache: EvalCache, rows: Rows) -> list[Rows]:
        """The rows cut into pieces that a pass can take."""
        room = LOGITS.get(self.model.device.type, LOGITS["cpu"])
        size = max(1, room // (len(rows) * self.model.num_heads * cache.capacity))
        longest = max(len(row) for row in rows)
        return [[row[start : start + size] for row in rows] for start in range(0, longest, size)]

    @torch.inference_mode()
    def _run(
        self,
        cache: EvalCache,
        rows: Rows,
        selectors: Sequence[Selector | None],
        *,
        prompt: bool = False,
        observe: bool = False,
        traffic: Traffic | None = None,
        last: bool = False,
    ) -> Tensor:
        """One forward pass; logits [B, T, V], [B, 1, V] for `last`, nothing of meaning for prompts."""
        device, counts = self.model.device, [len(row) for row in rows]
        steps = max(counts)
        if max(cache.lengths) + steps > cache.capacity:
            raise ValueError(f"{max(cache.lengths)} + {steps} tokens do not fit into {cache.capacity} columns")
        tokens = torch.tensor([[*row, *[0] * (steps - len(row))] for row in rows], device=device)
        positions = torch.tensor(cache.lengths, device=device)[:, None] + torch.arange(steps, device=device)
        step = Pass(
            cache=cache,
            positions=positions,
            counts=torch.tensor(counts, device=device),
            first=min(cache.lengths),
            windows=self.model.windows,
            selectors=selectors,
            prompt=prompt,
            observe=observe,
            traffic=Traffic() if traffic is None else traffic,
        )
        arguments = {"input_ids": tokens, "position_ids": positions, "use_cache": False, "evaluation": step}
        with memory_for(len(rows), cache.capacity, device):
            if prompt:
                self.model.model.base_model(**arguments)
                logits = torch.empty(0)
            elif last:
                wanted = sorted({count - 1 for count in counts if count})
                keep = torch.tensor(wanted, device=device)
                logits = self.model.model(**arguments, logits_to_keep=keep).logits.float()
                index = torch.tensor([wanted.index(max(count - 1, wanted[0])) for count in counts], device=device)
                logits = logits[torch.arange(len(rows), device=device), index][:, None]
            else:
                logits = self.model.model(**arguments).logits.float()
        cache.lengths = [length + count for length, count in zip(cache.lengths, counts, strict=True)]
        return logits


def answer(
    decoder: Decoder,
    cache: EvalCache,
    method: Method,
    prompts: Rows,
    max_new_tokens: Sequence[int],
    *,
    first: Tensor | None = None,
    stop: str | None = None,
) -> tuple[list[list[int]], Traffic]:
    """Greedy answers to `prompts`, whose tokens are decode steps too, in a branch of `cache`.

    first: logits [B, V] after prompts that were read already; `prompts` are then not looked at. stop: text after which
    an answer is over, such as a newline. Returns tokens, without an end token.
    """
    branch, traffic = cache.branch(), Traffic()
    selectors = decoder.start(branch, method)
    logits = decoder.feed(branch, prompts, selectors, traffic) if first is None else first
    answers: list[list[int]] = [[] for _ in max_new_tokens]
    running = set(range(len(answers)))
    while True:
        likeliest = logits.argmax(-1).tolist()
        for row in list(running):
            token = likeliest[row]
            if token in decoder.model.eos:
                running.discard(row)
                continue
            answers[row].append(token)
            if len(answers[row]) >= max_new_tokens[row] or (stop and stop in decoder.model.decode([token])):
                running.discard(row)
        if not running:
            return answers, traffic
        next_tokens = [[token] if row in running else [] for row, token in enumerate(likeliest)]
        logits = decoder.feed(branch, next_tokens, selectors, traffic)
