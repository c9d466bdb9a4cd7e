"""The corpus: Python source files, a byte-level BPE tokenizer trained on them, and their token ids."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = 0, 1
HELD_OUT_EVERY = 50  # one file in so many is kept for evaluation
TOKENIZER_SAMPLE_CHARS = 20e6

Tokens = npt.NDArray[np.uint16]


def prepare(work: Path, source: Sequence[Path], *, vocab_size: int, max_mb: float, max_length: int) -> None:
    """Write tok.json, train.npy and val.npy (uint16 [tokens]), and hf/ with the tokenizer, to `work`."""
    (work / "hf").mkdir(parents=True, exist_ok=True)
    train, held_out = split(read_sources(source, max_mb))
    shuffler = random.Random(0)
    shuffler.shuffle(train)
    tokenizer = train_tokenizer(sample(train), vocab_size)
    tokenizer.save(str(work / "tok.json"))
    shuffler.shuffle(train)
    for name, texts in (("train", train), ("val", held_out)):
        tokens = encode_all(texts, work / "tok.json")
        np.save(work / f"{name}.npy", tokens)
        print(f"{name}: {len(texts)} files, {len(tokens)} tokens", flush=True)
    save_hf_tokenizer(tokenizer, work / "hf", max_length)


def read_sources(folders: Iterable[Path], max_mb: float) -> dict[str, str]:
    """Distinct, well-formed Python files below the folders, by the hash of their content."""
    texts: dict[str, str] = {}
    total = 0
    for file in sorted({file.resolve() for folder in folders for file in folder.rglob("*.py")}):
        text = read_source(file)
        if text is None:
            continue
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in texts and total < max_mb * 1e6:
            texts[key] = text
            total += len(text)
    if len(texts) < 2:
        raise SystemExit("no Python source found: name folders with --source")
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


def encode_all(texts: Sequence[str], tokenizer: Path) -> Tokens:
    """All texts as token ids, each ended by <eos>; uint16 [tokens]."""
    batches = [texts[start : start + 32] for start in range(0, len(texts), 32)]
    with multiprocessing.get_context("spawn").Pool(min(len(batches), os.cpu_count() or 1)) as pool:
        return np.concatenate(pool.map(partial(_encode, tokenizer), batches, chunksize=8))


def _encode(tokenizer: Path, texts: Sequence[str]) -> Tokens:
    loaded = Tokenizer.from_file(str(tokenizer))
    ids = [token for text in texts for token in (*loaded.encode(text, add_special_tokens=False).ids, EOS)]
    return np.array(ids, np.uint16)


def save_hf_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    # Name the generic class: releases of transformers differ in the one they write.
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
