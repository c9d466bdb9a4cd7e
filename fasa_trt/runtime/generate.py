"""Text in, text out, over any backend: prefill in chunks, decode step by step, a ragged batch at a time.

from fasa_trt import load

engine = load("engine-dir")
for piece in engine.stream("def fibonacci(n):", max_new_tokens=64):
    print(piece.text, end="")
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fasa_trt.core.engine_dir import EngineDirectory, open_engine
from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.backend import Backend, Tokens
from fasa_trt.runtime.sampling import Sampling, sample
from fasa_trt.runtime.text import TextStream
from fasa_trt.runtime.traffic import kv_elements_read

PREFILL_CHUNK = 512  # tokens a row and step: large enough for the matrix products, small enough for the scores


@dataclass(frozen=True)
class Piece:
    """Some newly certain text of one row of the batch; may be empty when the row finishes."""

    row: int
    text: str


@dataclass
class Completion:
    """One finished row. finish_reason: "eos", "stop" (a stop string) or "length"."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    finish_reason: Literal["eos", "stop", "length"] = "length"


@dataclass
class Statistics:
    """Of one batch. kv_read, kv_dense: cache elements that decode steps read, and would have read densely."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoded_tokens: int = 0  # new tokens but the first of each row, which prefill yields
    kv_read: int = 0
    kv_dense: int = 0

    @property
    def prefill_rate(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def kv_share(self) -> float:
        return self.kv_read / self.kv_dense if self.kv_dense else 1.0


class Engine:
    """A loaded engine: generates for one batch at a time; afterwards `completions` and `statistics` tell of it."""

    def __init__(self, directory: EngineDirectory, backend: Backend, tokenizer: Any) -> None:
        self.directory, self.backend, self.tokenizer = directory, backend, tokenizer
        self.eos = frozenset(int(token) for token in directory.fasa.get("eos_token_ids", ()))
        self.completions: list[Completion] = []
        self.statistics = Statistics()

    def encode(self, prompt: str, *, chat: bool = False) -> list[int]:
        """Token ids of a prompt. chat: as a user's message in the model's chat template."""
        if chat:
            if not getattr(self.tokenizer, "chat_template", None):
                raise FasaError("this model has no chat template", hint="leave --chat out")
            message = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        return list(self.tokenizer(prompt).input_ids)

    def generate(self, prompts: str | Sequence[str], **options: Any) -> list[Completion]:
        """Everything at once; options as for `stream`."""
        for _ in self.stream(prompts, **options):
            pass
        return self.completions

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        chat: bool = False,
        dense: bool = False,
    ) -> Iterator[Piece]:
        """Yields text as soon as it is certain. Several prompts run as one ragged batch.

        stop: strings that end a row and are not part of its text. dense: attend to everything, for comparison.
        Raises FasaError when a prompt is empty or does not fit the engine.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = [self.encode(text, chat=chat) if text else [] for text in texts]  # some tokenizers add a BOS to nothing
        self._check(rows, max_new_tokens)
        return self._run(rows, max_new_tokens, sampling or Sampling(), stop, not dense)

    def _check(self, rows: list[list[int]], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise FasaError(f"max-new-tokens must be at least 1, not {max_new_tokens}")
        if not rows or any(not row for row in rows):
            raise FasaError("the prompt is empty", hint="pass some text")
        longest, limit = max(map(len, rows)), self.backend.max_seq_len
        if longest >= limit:
            raise FasaError(
                f"the prompt has {longest} tokens, this engine holds {limit} with the answer",
                hint="shorten it, or build with a larger --max-seq-len",
            )

    def _run(
        self, rows: list[list[int]], max_new_tokens: int, sampling: Sampling, stop: Sequence[str], sparse: bool
    ) -> Iterator[Piece]:
        self.completions = [Completion(prompt_tokens=len(row)) for row in rows]
        self.statistics = stats = Statistics(prompt_tokens=sum(map(len, rows)))
        streams = [TextStream(self.tokenizer, stop) for _ in rows]
        generators = sampling.generators(len(rows))
        lengths = np.array([len(row) for row in rows])
        started = time.perf_counter()
        logits = self._prefill(rows, lengths)
        stats.prefill_seconds = time.perf_counter() - started
        active = set(range(len(rows)))
        current = np.zeros((len(rows), 1), np.int64)
        while True:
            for row in sorted(active):
                completion, text = self.completions[row], streams[row]
                token = sample(logits[row], sampling, generators[row])
                completion.tokens.append(token)
                current[row] = token
                stats.new_tokens += 1
                if token in self.eos:
                    completion.finish_reason = "eos"
                elif piece := text.push(token):
                    yield Piece(row, piece)
                full = len(completion.tokens) >= max_new_tokens or lengths[row] + 1 >= self.backend.max_seq_len
                if full or text.stopped or completion.finish_reason == "eos":
                    active.discard(row)
                    if piece := text.finish():
                        yield Piece(row, piece)
                    completion.text = text.text
                    if text.stopped:
                        completion.finish_reason = "stop"
            if not active:
                return
            started = time.perf_counter()
            logits = self._decode(current, lengths, active, sparse)
            stats.decode_seconds += time.perf_counter() - started
            stats.decoded_tokens += len(active)

    def _prefill(self, rows: list[list[int]], lengths: Tokens) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Fills the cache with right-padded chunks; logits [B, vocab] of each row's last token."""
        batch = len(rows)
        self.backend.allocate(batch)
        unpadded = np.zeros(batch, np.int64)
        result: np.ndarray[Any, np.dtype[np.float32]] | None = None
        for start in range(0, int(lengths.max()), PREFILL_CHUNK):
            width = min(PREFILL_CHUNK, int(lengths.max()) - start)
            tokens = np.zeros((batch, width), np.int64)
            for b, row in enumerate(rows):
                piece = row[start : start + width]
                tokens[b, : len(piece)] = piece
            last = lengths - 1 - start
            logits = self.backend.step(
                tokens, np.minimum(start, lengths), unpadded, np.clip(last, 0, width - 1)[:, None], sparse=False
            )[:, 0]
            result = np.zeros_like(logits) if result is None else result
            ends_here = (last >= 0) & (last < width)
            result[ends_here] = logits[ends_here]
        assert result is not None
        return result

    def _decode(
        self, current: Tokens, lengths: Tokens, active: set[int], sparse: bool
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """One step of the active rows; logits [B, vocab]. Advances their lengths."""
        running = sorted(active)
        # Finished rows ride along at a running row's slot: were they left at a short length, all would attend densely.
        position = np.full(len(lengths), lengths[running].max())
        position[running] = lengths[running]
        batch = len(lengths)
        logits = self.backend.step(
            current, position, np.zeros(batch, np.int64), np.zeros((batch, 1), np.int64), sparse=sparse
        )[:, 0]
        lengths[running] += 1
        read, dense = kv_elements_read(self.directory, lengths[running], sparse=sparse)
        self.statistics.kv_read += read
        self.statistics.kv_dense += dense
        return logits


def load(path: str | Path, *, threads: int | None = None, provider: str | None = None, verify: bool = True) -> Engine:
    """Opens an engine directory for generation.

    threads, provider: for onnxruntime ("cpu" or "cuda"; None takes the best). verify: check every file against the
    manifest first. Raises FasaError when the directory is not a sound engine or its target cannot run here.
    """
    directory = open_engine(path, verify=verify)
    if directory.target != "onnxruntime":
        raise FasaError(
            f"{path} is a {directory.target} engine: this version builds those but runs onnxruntime ones only",
            hint="build with --target onnxruntime to generate here",
        )
    from transformers import AutoTokenizer

    from fasa_trt.runtime.onnxruntime import OnnxRuntimeBackend

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory.path, local_files_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FasaError(
            f"{path} has no usable tokenizer: {reason}", hint="build from a checkpoint that has one"
        ) from None
    return Engine(directory, OnnxRuntimeBackend(directory, threads=threads, provider=provider), tokenizer)
