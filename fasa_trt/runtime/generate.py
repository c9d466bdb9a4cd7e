"""Text in, text out, over any backend: a batch of prompts at a time, streamed as it comes.

from fasa_trt import load

engine = load("engine-dir")
for piece in engine.stream("def fibonacci(n):", max_new_tokens=64):
    print(piece.text, end="")

`service.py` serves requests that come at any time, from several threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fasa_trt.core.engine_dir import EngineDirectory, open_engine
from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.backend import Backend
from fasa_trt.runtime.batcher import Batcher, Failed, Request
from fasa_trt.runtime.completion import Answer, Completion, Piece, Statistics
from fasa_trt.runtime.sampling import Sampling
from fasa_trt.runtime.sequence import Preempted

__all__ = ["Completion", "Engine", "Piece", "Statistics", "load"]


class Engine:
    """A loaded engine: generates for one batch at a time; afterwards `completions` and `statistics` tell of it."""

    def __init__(self, directory: EngineDirectory, backend: Backend, tokenizer: Any) -> None:
        self.directory, self.backend, self.tokenizer = directory, backend, tokenizer
        self.eos = frozenset(int(token) for token in directory.fasa.get("eos_token_ids", ()))
        self.completions: list[Completion] = []
        self.statistics = Statistics()
        self._cancel: list[tuple[Batcher, int]] = []  # requests of the batch that runs

    def encode(self, prompt: str, *, chat: bool = False) -> list[int]:
        """Token ids of a prompt. chat: as a user's message in the model's chat template."""
        if not prompt:  # some tokenizers add a BOS to nothing
            return []
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
        """Yields text as soon as it is certain. Several prompts run as one ragged batch; those beyond the engine's
        max_batch_size join as others end.

        stop: strings that end a row and are not part of its text. dense: attend to everything, for comparison.
        A batch ends the one before it. Raises FasaError when a prompt is empty or does not fit the engine, and from
        the iterator when a step fails or a later batch was started.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = [self.encode(text, chat=chat) for text in texts]
        if not rows:
            raise FasaError("the prompt is empty", hint="pass some text")
        sampling = sampling or Sampling()
        requests = [
            Request(row, max_new_tokens, self.eos, sampling, dense, generator)
            for row, generator in zip(rows, sampling.generators(len(rows)), strict=True)
        ]
        batcher = self.backend.batcher(len(rows))
        for request in requests:
            batcher.check(request)
        return self._run(batcher, requests, stop)

    def _run(self, batcher: Batcher, requests: list[Request], stop: Sequence[str]) -> Iterator[Piece]:
        self._end()
        answers = [Answer(self.tokenizer, len(request.prompt), stop) for request in requests]
        completions = self.completions = [answer.completion for answer in answers]
        stats = self.statistics = Statistics(prompt_tokens=sum(len(request.prompt) for request in requests))
        rows = {batcher.submit(request): row for row, request in enumerate(requests)}
        self._cancel = [(batcher, number) for number in rows]
        try:
            while not all(answer.done for answer in answers):
                turn = batcher.step()
                assert turn is not None, "the batcher has lost a request"
                stats.count(turn, self.directory)
                for event in turn.events:
                    if isinstance(event, Failed):
                        raise event.error
                    if isinstance(event, Preempted):
                        continue
                    answer = answers[rows[event.request]]
                    piece = answer.push(event)
                    if answer.done and not event.finish:
                        batcher.cancel(event.request)
                    if piece:
                        yield Piece(rows[event.request], piece)
                        if self.completions is not completions:
                            raise FasaError("a later batch has ended this one", hint="run one batch after the other")
        finally:
            if self.completions is completions:
                self._end()

    def _end(self) -> None:
        """Drops what the batch before has left."""
        for batcher, number in self._cancel:
            batcher.cancel(number)
        self._cancel = []


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    provider: str | None = None,
    kv_fraction: float | None = None,
    verify: bool = True,
) -> Engine:
    """Opens an engine directory for generation.

    threads, provider: for onnxruntime ("cpu" or "cuda"; None takes the best). kv_fraction: for the others, the share
    of the GPU memory left beside the engine that the KV cache may take, 0.9 unless given. verify: check every file
    against the manifest first.
    Raises FasaError when the directory is not a sound engine, its target cannot run here, or an option is another's.
    """
    directory = open_engine(path, verify=verify)
    backend = _backend(directory, threads, provider, kv_fraction)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory.path, local_files_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FasaError(
            f"{path} has no usable tokenizer: {reason}", hint="build from a checkpoint that has one"
        ) from None
    return Engine(directory, backend, tokenizer)


def _backend(engine: EngineDirectory, threads: int | None, provider: str | None, kv_fraction: float | None) -> Backend:
    if engine.target == "onnxruntime":
        _refuse("onnxruntime", {"kv-fraction": kv_fraction})
        from fasa_trt.runtime.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(engine, threads=threads, provider=provider)
    plugin = engine.fasa.get("lowering") == "plugin"
    if not plugin or engine.target not in ("tensorrt", "tensorrt-rtx", "tensorrt-llm"):
        raise FasaError(
            f"{engine.path} is a {engine.target} engine"
            + ("" if plugin else " of the standard lowering")
            + ": this version does not run those",
            hint="build with --lowering plugin, or with --target onnxruntime to generate here",
        )
    _refuse(engine.target, {"threads": threads, "provider": provider})
    fraction = 0.9 if kv_fraction is None else kv_fraction
    if engine.target == "tensorrt-llm":
        from fasa_trt.runtime.tensorrt_llm import load_tensorrt_llm

        return load_tensorrt_llm(engine, kv_fraction=fraction)
    from fasa_trt.runtime.tensorrt import load_tensorrt

    return load_tensorrt(engine, kv_fraction=fraction)


def _refuse(target: str, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            raise FasaError(f"--{name} is not for {target} engines", hint="leave it out")
