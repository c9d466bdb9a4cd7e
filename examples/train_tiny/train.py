"""The training loop: a fixed time, sequence lengths that grow, a log."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.train_tiny.batches import Batch, BatchSource
from examples.train_tiny.corpus import prepare, save_hf_tokenizer
from examples.train_tiny.evaluate import Evaluation, evaluate_checkpoint
from examples.train_tiny.mix import KINDS
from examples.train_tiny.model import Losses, save_checkpoint
from examples.train_tiny.settings import SHORTEST_TASK, Settings
from examples.train_tiny.state import Progress, load_state, save_state
from examples.train_tiny.trainer import Trainer
from fasa_trt.core.atomic import write_bytes

LOG_EVERY, EVALUATE_EVERY, SAVE_EVERY = 15.0, 75.0, 120.0  # seconds
LOG_FILE, STATE_FILE = "train_log.json", "state.safetensors"

Record = dict[str, Any]


def train(settings: Settings) -> Record:
    """Prepare the data where needed, train, save checkpoint and log to settings.output; returns the log.

    Raises FasaError for what Trainer, prepare and load_state refuse.
    """
    begun = time.monotonic()
    trainer = Trainer(settings)
    state = settings.work / STATE_FILE
    progress = Progress()
    if settings.resume:
        progress = load_state(state, settings.size, trainer.model, trainer.optimizer)
        print(f"resuming after {progress.step} steps, {progress.seconds:.0f} s", flush=True)
    corpus = prepare(settings)
    save_hf_tokenizer(settings.work / "tok.json", settings.output, settings.shape.max_positions)
    prepared = time.monotonic()
    log: Record = {**_facts(settings, trainer), "corpus": corpus, "prepare_seconds": round(prepared - begun, 1)}
    first = settings.length_at(progress.seconds / (60 * settings.minutes))
    # A resumed run draws other sequences than the ones it has seen.
    with BatchSource(settings, length=first, seed=settings.seed + 17 * progress.step) as source:
        trainer.warm_up()
        log["compile_seconds"] = round(time.monotonic() - prepared, 1)
        print(f"{log['parameters']} parameters; compiled in {log['compile_seconds']} s", flush=True)
        evaluation = Evaluation(settings, trainer.device)
        log["training"] = _run(settings, trainer, source, evaluation, progress, state)
    log |= asdict(progress)
    _write(settings.output / LOG_FILE, log)
    evaluated = time.monotonic()
    log["evaluation"] = evaluate_checkpoint(evaluation)
    log["evaluation_seconds"] = round(time.monotonic() - evaluated, 1)
    _write(settings.output / LOG_FILE, log)
    return log


def _run(
    settings: Settings, trainer: Trainer, source: BatchSource, evaluation: Evaluation, progress: Progress, state: Path
) -> list[Record]:
    records: list[Record] = []
    recent: list[tuple[Batch, Losses]] = []
    start = time.monotonic() - progress.seconds
    logged = evaluated = saved = time.monotonic()
    tokens_logged = progress.tokens
    limit = 60 * settings.minutes
    while progress.seconds < limit:
        batch = source.next(settings.length_at(progress.seconds / limit))
        recent.append((batch, trainer.step(batch, progress.step, progress.seconds / limit)))
        progress.step += 1
        progress.tokens += batch.weights[:, 1:].size
        if len(recent) % 8 == 0 and not settings.cpu:
            torch.cuda.synchronize()  # steps are queued faster than they run: keep the clock honest
        now = time.monotonic()
        progress.seconds = now - start
        over = progress.seconds >= limit
        if now - logged > LOG_EVERY or over:
            speed = (progress.tokens - tokens_logged) / (now - logged)
            records.append({**asdict(progress), "length": batch.length, "tokens_per_second": round(speed)})
            records[-1] |= _summary(recent)
            print(" ".join(f"{name} {_short(value)}" for name, value in records[-1].items()), flush=True)
            recent.clear()
            logged, tokens_logged = now, progress.tokens
        paused = time.monotonic()
        if now - evaluated > EVALUATE_EVERY and batch.length >= SHORTEST_TASK and not over:
            shares = {kind: evaluation.recall(trainer.logits, kind, 16, batch.length) for kind in ("single", "multi")}
            print(f"    recall at {batch.length}: {shares}", flush=True)
            evaluated = time.monotonic()
        if now - saved > SAVE_EVERY or over:
            save_checkpoint(trainer.model, settings.output)
            save_state(state, settings.size, trainer.model, trainer.optimizer, progress)
            saved = time.monotonic()
        gap = time.monotonic() - paused  # looking and saving do not count
        start, logged = start + gap, logged + gap
    return records


def _summary(recent: list[tuple[Batch, Losses]]) -> Record:
    """Means over the steps: losses, and the share of right answer tokens of each kind of sequence."""
    loss, text, answer = (
        torch.stack([getattr(measured, name) for _, measured in recent]).mean().item()
        for name in ("loss", "text", "answer")
    )
    kinds = np.concatenate([batch.kinds for batch, _ in recent])
    right, asked = (
        torch.cat([getattr(measured, name) for _, measured in recent]).float().cpu().numpy()
        for name in ("right", "asked")
    )
    accuracy = {
        name: float(right[kinds == kind].sum() / asked[kinds == kind].sum())
        for kind, name in enumerate(KINDS)
        if asked[kinds == kind].any()
    }
    return {"loss": loss, "text": text, "answer": answer, "answer_tokens_right": accuracy}


def _short(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name} {_short(inner)}" for name, inner in value.items())
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _facts(settings: Settings, trainer: Trainer) -> Record:
    chosen = asdict(settings) | {"output": None, "work": None, "source": None, "tokenizer": None}
    return {
        "size": settings.size,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "device": "cpu" if settings.cpu else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "settings": {name: value for name, value in chosen.items() if value is not None},
    }


def _write(file: Path, log: Record) -> None:
    write_bytes(file, (json.dumps(log, indent=1) + "\n").encode())
