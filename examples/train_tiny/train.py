"""The training loop: a fixed time, three sequence lengths, AdamW with warm-up and cosine decay."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from examples.train_tiny.batches import Batch, BatchSource
from examples.train_tiny.corpus import prepare
from examples.train_tiny.evaluate import Evaluation, evaluate_checkpoint
from examples.train_tiny.model import Rope, Shape, TinyLlama, losses, run_block, save_checkpoint

STAGES = (0.2, 0.6)  # shares of the time after which the second and the third length begin
WARMUP_STEPS = 300
LOG_EVERY, EVALUATE_EVERY, SAVE_EVERY = 15.0, 75.0, 140.0  # seconds


@dataclass(frozen=True)
class Settings:
    """See the options in __main__.py."""

    work: Path
    source: Sequence[Path]
    seconds: float = 690.0
    lengths: tuple[int, int, int] = (1024, 4096, 8192)
    batch_tokens: int = 65536
    learning_rate: float = 2.5e-3
    max_corpus_mb: float = 1000.0
    workers: int = 13
    eval_documents: int = 256
    cpu: bool = False
    seed: int = 0
    shape: Shape = field(default_factory=Shape)


class Trainer:
    """The model, its optimizer, and one step."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        torch.set_float32_matmul_precision("high")
        self.settings = settings
        self.device = torch.device("cpu" if settings.cpu else "cuda")
        self.model = TinyLlama(settings.shape).to(self.device)
        self.losses: Callable[..., tuple[Tensor, Tensor, Tensor]] = losses
        if not settings.cpu:
            self.model.run_block = torch.compile(run_block, dynamic=False)
            self.losses = torch.compile(losses, dynamic=False)
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            eps=1e-8,
            fused=not settings.cpu,
        )
        self._ropes: dict[int, Rope] = {}

    def rope(self, length: int) -> Rope:
        if length not in self._ropes:
            self._ropes[length] = self.model.rope(length)
        return self._ropes[length]

    def warm_up(self) -> None:
        """Compile for every length, before the clock starts."""
        for length in self.settings.lengths:
            tokens = torch.randint(2, 100, (self.settings.batch_tokens // length, length), device=self.device)
            ones = torch.ones(tokens.shape, device=self.device)
            self._loss(tokens, tokens, ones, ones.to(torch.int8))[0].backward()
            self.optimizer.zero_grad(set_to_none=True)

    def step(self, batch: Batch, step: int, progress: float) -> Tensor:
        """One update; returns float32 [3]: the loss, plain code's and answers' cross-entropy."""
        decay = 0.04 + 0.96 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * min(1, (step + 1) / WARMUP_STEPS) * decay
        tokens = self._to_device(torch.from_numpy(batch.tokens.astype("int32"))).long()
        weights = self._to_device(torch.from_numpy(batch.weights))[:, 1:].float().contiguous()
        answers = self._to_device(torch.from_numpy(batch.answers))[:, 1:].contiguous()
        loss, code, answer = self._loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights, answers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.detach(), code, answer])

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Without compilation: evaluation sees other shapes than training does."""
        compiled, self.model.run_block = self.model.run_block, run_block
        try:
            return self.model.logits(self.model(tokens, self.rope(tokens.shape[1])))
        finally:
            self.model.run_block = compiled

    def _loss(self, tokens: Tensor, targets: Tensor, weights: Tensor, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.model(tokens, self.rope(tokens.shape[1]))
        model = self.model
        return self.losses(hidden, model.norm.weight, model.embed_tokens.weight, targets, weights, answers)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor if self.settings.cpu else tensor.pin_memory().to(self.device, non_blocking=True)


def length_at(progress: float, lengths: Sequence[int]) -> int:
    """The sequence length for a share of the training time, from 0 to 1."""
    return lengths[sum(progress >= stage for stage in STAGES)]


def train(settings: Settings) -> dict[str, float]:
    """Prepare the data where needed, train, save the checkpoint to work/hf, return its final evaluation."""
    if not (settings.work / "hf" / "tokenizer.json").exists():
        prepare(
            settings.work,
            settings.source,
            vocab_size=settings.shape.vocab,
            max_mb=settings.max_corpus_mb,
            max_length=settings.shape.max_positions,
        )
    source = BatchSource(
        settings.work,
        length=settings.lengths[0],
        batch_tokens=settings.batch_tokens,
        workers=settings.workers,
        seed=settings.seed,
    )
    with source:
        trainer = Trainer(settings)
        if not settings.cpu:
            trainer.warm_up()
        evaluation = Evaluation(settings.work, trainer.device, settings.batch_tokens)
        _run(settings, trainer, source, evaluation)
    results = evaluate_checkpoint(
        evaluation,
        settings.work / "hf",
        [2 * settings.lengths[0], *settings.lengths[1:]],
        settings.eval_documents,
    )
    print(json.dumps(results, indent=1), flush=True)
    (settings.work / "final.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _run(settings: Settings, trainer: Trainer, source: BatchSource, evaluation: Evaluation) -> None:
    start = logged = evaluated = saved = time.monotonic()
    step = tokens = 0
    recent: list[Tensor] = []
    while (progress := (time.monotonic() - start) / settings.seconds) < 1:
        length = length_at(progress, settings.lengths)
        batch = source.next(length)
        recent.append(trainer.step(batch, step, progress))
        step += 1
        tokens += batch.weights[:, 1:].size
        now = time.monotonic()
        if now - logged > LOG_EVERY:
            loss, code, answer = torch.stack(recent).mean(0).tolist()
            print(f"step {step} length {length} loss {loss:.3f} code {code:.3f} answer {answer:.4f}", flush=True)
            recent.clear()
            logged = now
        if now - evaluated > EVALUATE_EVERY:
            shares = {kind: evaluation.recall(trainer.logits, kind, 16, length) for kind in ("single", "multi")}
            print(f"    recall at {length}: {shares}", flush=True)
            start += time.monotonic() - now  # evaluation does not count
            logged = evaluated = time.monotonic()
        if now - saved > SAVE_EVERY:
            save_checkpoint(trainer.model, settings.work / "hf")
            saved = time.monotonic()
    save_checkpoint(trainer.model, settings.work / "hf")
    print(f"{step} steps, {tokens} tokens", flush=True)
