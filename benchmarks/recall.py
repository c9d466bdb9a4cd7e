"""Recall of notes thousands of tokens back, by dense and by FASA decode over the same cache.

python -m benchmarks.recall --engine engine
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from benchmarks.asking import MAX_ANSWER, Answer, Reader, answers
from benchmarks.common import ROOT, SAMPLE_MODEL, main, run_facts, write_result
from fasa_trt.calibrate.corpus import iter_documents
from fasa_trt.calibrate.recall import RecallDocument, recall_document, recall_prompt
from fasa_trt.cli.console import out, progress, say
from fasa_trt.core.engine_dir import PROFILE
from fasa_trt.core.errors import FasaError
from fasa_trt.core.profile import Profile
from fasa_trt.runtime.generate import Engine, load
from fasa_trt.runtime.traffic import kv_elements_read

DEFAULT_OUTPUT = "benchmarks/results/cpu/recall.json"
FIRST_SEED = 1_000_000  # calibration makes its documents from small seeds: seed * samples and the next few
LONGEST_PROMPT = len(recall_prompt("x" * 6))  # in bytes; no tokenizer makes more tokens than that


def recall(
    engine: Annotated[
        Path | None, typer.Option(help="Engine directory to ask.", show_default="one made of --model")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint to calibrate and build with default settings.", show_default="fasa-tiny"),
    ] = None,
    budget: Annotated[int | None, typer.Option(help="Of the engine made of --model.", show_default="256")] = None,
    context: Annotated[int, typer.Option(help="Tokens in all: document, question, answer.")] = 8192,
    questions: Annotated[int, typer.Option(min=1, help="Questions in all.")] = 100,
    per_document: Annotated[int, typer.Option(min=1, help="Questions about each document.")] = 10,
    notes: Annotated[int, typer.Option(min=1, help="Notes in each document.")] = 33,
    filler: Annotated[
        Path | None,
        typer.Option(help="Text to hide the notes in: a file, folder or .jsonl.", show_default="the bundled source"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first document; each next one adds 1.")] = FIRST_SEED,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")] = None,
    output: Annotated[Path, typer.Option(help="Result file.", show_default=DEFAULT_OUTPUT)] = ROOT / DEFAULT_OUTPUT,
) -> None:
    """Ask an engine for numbers that a long document notes somewhere, densely and with FASA.

    A document is source code with lines like [italic]# note qzxvb = 90210[/] in it. It is read once, densely; then
    every question ([italic]# recall qzxvb = [/]) goes back to its end and is fed token by token, by decode steps: FASA
    gets no dense look at the document on the way to its answer. Both modes answer greedily over the same cache.

    Example: python -m benchmarks.recall --model examples/models/fasa-tiny --budget 64 --output recall-64.json
    """
    if engine is not None and (model is not None or budget is not None):
        raise FasaError("--engine is built already, --model and --budget are for making one", hint="leave one out")
    if per_document > notes:
        raise FasaError(f"{per_document} questions a document need as many notes, not {notes}", hint="raise --notes")
    facts = run_facts()
    with tempfile.TemporaryDirectory(prefix="fasa-recall-") as directory:
        path = engine or build(model or str(SAMPLE_MODEL), budget, Path(directory) / "engine")
        reader = Reader(load(path, threads=threads))
        count = -(-questions // per_document)
        documents = make_documents(reader, count, context, notes, seed, filler)
        with progress() as report:
            asked = 0

            def tick() -> None:
                nonlocal asked
                asked += 1
                report("questions", asked, count * per_document)

            given = answers(reader, documents, per_document, tick)
        described = describe(reader, documents)
    result = {
        "benchmark": "recall",
        **facts,
        **described,
        "context": context,
        "notes": notes,
        "filler": "bundled source" if filler is None else filler.name,
        "first_seed": seed,
        **conclude(given),
    }
    show(result)
    write_result(output, result)


def build(model: str, budget: int | None, path: Path) -> Path:
    """Calibrates and builds an onnxruntime engine, with defaults but for the budget."""
    from fasa_trt.calibrate.calibrate import calibrate
    from fasa_trt.core.checkpoint import open_checkpoint
    from fasa_trt.export.config import BuildConfig
    from fasa_trt.export.engine import build_engine

    checkpoint = open_checkpoint(model)
    config = BuildConfig.resolve(checkpoint, flags={"budget": budget})
    with progress() as report:
        measured = calibrate(checkpoint, progress=lambda done, total: report("calibrate", done, total))
        build_engine(checkpoint, measured.profile, config, path, report=report)
    say(f"built {checkpoint.path.name} with budget {config.budget}, n_tip {config.n_tip}")
    return path


def make_documents(
    reader: Reader, count: int, context: int, notes: int, seed: int, filler: Path | None
) -> list[RecallDocument]:
    """Documents that leave room for a question and its answer. Raises FasaError when the context does not fit."""
    limit = reader.backend.max_seq_len
    if context > limit:
        raise FasaError(f"this engine holds {limit} tokens, not {context}", hint="lower --context")
    special = len(reader.engine.encode("#")) - len(reader.encode("#"))
    length = context - special - LONGEST_PROMPT - MAX_ANSWER
    return [
        recall_document(
            reader.encode,
            None if filler is None else iter_documents(filler),
            length=length,
            notes=notes,
            seed=seed + number,
        )
        for number in range(count)
    ]


def describe(reader: Reader, documents: list[RecallDocument]) -> dict[str, Any]:
    """The engine, and what it had to read."""
    engine: Engine = reader.engine
    lengths = np.array([document.token_count for document in documents])
    read, dense = kv_elements_read(engine.directory, lengths, sparse=True)
    spec = engine.directory.spec
    return {
        "model": engine.directory.fasa["model"],
        "fingerprint": engine.directory.fasa["fingerprint"],
        "calibration": Profile.load(engine.directory.path / PROFILE).info,
        "dtype": engine.directory.config["pretrained_config"]["dtype"],
        "budget": spec.budget,
        "n_tip": spec.n_tip,
        "sparse": spec.to_json(),
        "backend": engine.backend.describe(),
        "document_tokens": lengths.tolist(),
        "kv_share_read": read / dense,
        "seconds": reader.seconds,
        "steps": reader.steps,
    }


def conclude(given: list[Answer]) -> dict[str, Any]:
    return {
        "questions": len(given),
        "dense_correct": sum(answer.dense == answer.expected for answer in given),
        "fasa_correct": sum(answer.fasa == answer.expected for answer in given),
        "same_answer": sum(answer.dense == answer.fasa for answer in given),
        "answers": [asdict(answer) for answer in given],
    }


def show(result: dict[str, Any]) -> None:
    title = f"{result['model']}, {result['context']} tokens, {result['notes']} notes"
    table = Table("decode", "tokens attended", "KV read", "right answers", "share", title=title)
    total = result["questions"]
    for mode, attended, share in (("dense", "all", 1.0), ("fasa", str(result["budget"]), result["kv_share_read"])):
        right = result[f"{mode}_correct"]
        table.add_row(mode, attended, f"{share:.0%}", f"{right} of {total}", f"{right / total:.3f}")
    out.print(table)


if __name__ == "__main__":
    main(recall)
