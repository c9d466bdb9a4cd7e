"""The corpus: Python source files, their docstrings as prose, a byte-level BPE tokenizer, and all as token ids."""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import os
import random
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from examples.train_tiny.settings import Settings
from fasa_trt.calibrate.corpus import bundled_files
from fasa_trt.core.atomic import write_bytes
from fasa_trt.core.errors import FasaError

BOS, EOS = 0, 1
HELD_OUT_EVERY = 50  # one file in so many is kept for evaluation
TOKENIZER_SAMPLE_CHARS = 20e6
MAX_WORDS = 6000

T = TypeVar("T")

Tokens = npt.NDArray[np.uint16]


def prepare(settings: Settings) -> dict[str, Any]:
    """Make what the data processes read, in settings.work, and describe it; what is there already is kept.

    tok.json is the tokenizer; train.npy and val.npy are code, prose-train.npy and prose-val.npy the docstrings in it
    (uint16 [tokens]); words.json holds words of that prose. The last two only for the mix `tasks`.

    Raises FasaError for a folder made with other settings.
    """
    work, made = settings.work, settings.work / "corpus.json"
    wanted = {"mix": settings.mix, "vocab": settings.shape.vocab, "max_corpus_mb": settings.max_corpus_mb}
    if made.exists():
        found: dict[str, Any] = json.loads(made.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in wanted} != wanted:
            raise FasaError(f"{work} holds a corpus for other settings", hint="another --work, or delete it")
        return found
    work.mkdir(parents=True, exist_ok=True)
    texts = read_sources(settings.source, settings.max_corpus_mb)
    bundled = len(texts) < 2
    if bundled:
        print("no Python source found: training on the text that calibration bundles; do not test on it", flush=True)
        texts = {hashlib.sha256(text.encode()).hexdigest(): text for text in _bundled_pieces("*")}
    train, held_out = split(texts)
    shuffler = random.Random(0)
    shuffler.shuffle(train)
    tokenizer = _tokenizer(settings, train)
    tokenizer.save(str(work / "tok.json"))
    shuffler.shuffle(train)
    sets = {"train": train, "val": held_out}
    if settings.mix == "tasks":
        prose, held_out_prose = prose_of(train), prose_of(held_out)
        if len(prose) + len(held_out_prose) < 2:
            print("no docstrings found: training on the prose that calibration bundles; do not test on it", flush=True)
            bundled, prose = True, _bundled_pieces("prose")
        sets |= {"prose-train": prose, "prose-val": held_out_prose or [prose.pop()]}
        write_bytes(work / "words.json", json.dumps(common_words(prose)).encode())
    sizes = {}
    for name, documents in sets.items():
        tokens = encode_all(documents, work / "tok.json", least=2 * settings.stages[-1].length)
        np.save(work / f"{name}.npy", tokens)
        sizes[name] = {"documents": len(documents), "tokens": len(tokens)}
        print(f"{name}: {len(documents)} documents, {len(tokens)} tokens", flush=True)
    facts = {**wanted, "bundled_text": bundled, "sets": sizes}
    write_bytes(made, (json.dumps(facts, indent=1) + "\n").encode())  # last: it says that the rest is complete
    return facts


def _tokenizer(settings: Settings, texts: list[str]) -> Tokenizer:
    """Raises FasaError for one that does not fit the model."""
    if settings.tokenizer is None:
        return train_tokenizer(sample(texts), settings.shape.vocab)
    if not settings.tokenizer.is_file():
        raise FasaError(f"no tokenizer at {settings.tokenizer}", hint="run from a full checkout of the repository")
    tokenizer = Tokenizer.from_file(str(settings.tokenizer))
    if tokenizer.get_vocab_size() > settings.shape.vocab:
        raise FasaError(f"{settings.tokenizer} has {tokenizer.get_vocab_size()} tokens, not {settings.shape.vocab}")
    return tokenizer


def _bundled_pieces(kind: str) -> list[str]:
    """The bundled text in pieces, so that some can be held out."""
    texts = [file.read_text(encoding="utf-8") for file in bundled_files(kind)]
    return [text[start : start + 8000] for text in texts for start in range(0, len(text), 8000)]


def read_sources(folders: Iterable[Path], max_mb: float) -> dict[str, str]:
    """Distinct, well-formed Python files below the folders, by the hash of their content.

    Without modules of the names that calibration bundles: evaluation measures perplexity on those.
    """
    kept_out = {file.stem.partition("-")[2] for file in bundled_files("source")}
    found = {file.resolve() for folder in folders for file in folder.rglob("*.py")}
    files = sorted(file for file in found if not kept_out & {file.stem, file.parent.name})
    random.Random(0).shuffle(files)  # so that a limit keeps some of everything
    texts: dict[str, str] = {}
    total = 0
    for file in files:
        if total >= max_mb * 1e6:
            break
        text = read_source(file)
        key = hashlib.sha256(text.encode()).hexdigest() if text is not None else ""
        if text is not None and key not in texts:
            texts[key] = text
            total += len(text)
    return texts


def read_source(file: Path) -> str | None:
    """The file's text; None if it is tiny, huge, not UTF-8, or has very long lines (data, not code)."""
    try:
        if not 200 <= file.stat().st_size <= 400_000:
            return None
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text if max(map(len, text.split("\n"))) <= 400 else None


def split(texts: dict[str, str]) -> tuple[list[str], list[str]]:
    """Training and held-out texts, told apart by their hash: the same everywhere. Neither is empty."""
    held_out = {key for key in texts if int(key, 16) % HELD_OUT_EVERY == 0} or {min(texts)}
    train = [text for key, text in texts.items() if key not in held_out]
    return train, [texts[key] for key in texts if key in held_out]


def sample(texts: Iterable[str]) -> list[str]:
    """The first texts, up to what the tokenizer is trained on."""
    chosen, size = [], 0
    for text in texts:
        if size > TOKENIZER_SAMPLE_CHARS:
            break
        chosen.append(text)
        size += len(text)
    return chosen


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE that keeps newlines and digits as single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def prose_of(sources: Sequence[str]) -> list[str]:
    """Docstrings of some length in source files, a text for each file, without empty lines."""
    return [text for text in _in_processes(_docstrings, sources) if text]


def _docstrings(sources: Sequence[str]) -> list[str]:
    warnings.simplefilter("ignore")  # of other people's escape sequences
    texts = []
    for source in sources:
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # not Python, or not of this release
        owners = (n for n in nodes if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)))
        found = [doc for doc in map(ast.get_docstring, owners) if doc and len(doc) >= 200]
        texts.append("".join(f"{line}\n" for doc in found for line in doc.split("\n") if line.strip()))
    return texts


def common_words(texts: Iterable[str]) -> list[str]:
    """The most frequent lower-case words of 5 to 9 letters, sorted."""
    counts = Counter(word for text in texts for word in re.findall(r"\b[a-z]{5,9}\b", text))
    return sorted(word for word, _ in counts.most_common(MAX_WORDS))


def encode_all(texts: Sequence[str], tokenizer: Path, *, least: int = 0) -> Tokens:
    """All texts as token ids, each ended by <eos>, over again until there are `least`; uint16 [tokens]."""
    tokens = np.concatenate(_in_processes(partial(_encode, tokenizer), texts))
    return np.tile(tokens, max(1, -(-least // len(tokens))))


def _in_processes(work: Callable[[Sequence[str]], list[T]], texts: Sequence[str]) -> list[T]:
    """`work` on batches of texts, in as many processes as pay."""
    batches = [texts[start : start + 32] for start in range(0, len(texts), 32)]
    if len(batches) < 2:
        return work(texts)
    with multiprocessing.get_context("spawn").Pool(min(len(batches), os.cpu_count() or 1, 16)) as pool:
        return [item for batch in pool.imap(work, batches, chunksize=4) for item in batch]


def _encode(tokenizer: Path, texts: Sequence[str]) -> list[Tokens]:
    loaded = Tokenizer.from_file(str(tokenizer))
    return [np.array([*loaded.encode(text, add_special_tokens=False).ids, EOS], np.uint16) for text in texts]


def save_hf_tokenizer(tokenizer: Path, folder: Path, max_length: int) -> None:
    """tokenizer.json and tokenizer_config.json, as transformers reads them. tokenizer: a file of `tokenizers`."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer),
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    with tempfile.TemporaryDirectory() as made:
        fast.save_pretrained(made)
        # Name the generic class: releases of transformers differ in the one they write.
        file = Path(made) / "tokenizer_config.json"
        config = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        write_bytes(folder / file.name, (json.dumps(config, indent=1) + "\n").encode())
        write_bytes(folder / "tokenizer.json", (Path(made) / "tokenizer.json").read_bytes())
