"""Calibration text: documents from files, folders or JSON lines, and token windows packed from them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fasa_trt.core.errors import FasaError

Encode: TypeAlias = Callable[[str], Sequence[int]]
"""Text to token ids, without special tokens."""

Window: TypeAlias = npt.NDArray[np.int64]
"""Token ids, int64 [length]."""

BUNDLED = Path(__file__).parent / "text"
_PROSE = (".txt", ".md", ".rst", ".tex", ".jsonl")
_CODE = (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cu", ".cuh", ".js", ".ts", ".java", ".go", ".rs", ".sh")
TEXT_SUFFIXES = frozenset(_PROSE + _CODE)

# Characters held for shuffling: every corpus up to this size is shuffled as a whole, a larger one locally.
_SHUFFLE_CHARS = 16 << 20


def bundled_files(kind: str = "*") -> list[Path]:
    """The bundled text files, in a fixed order; kind is `source`, `prose` or `*` for both."""
    return sorted(BUNDLED.glob(f"{kind}-*.txt"))


def iter_documents(path: Path | None = None) -> Iterator[str]:
    """Yield documents one at a time.

    path: a text file (one document), a `.jsonl` file (the "text" field of every line), a folder (all text
        files below it, sorted by path, without hidden ones), or None for the bundled source code and prose.

    Raises FasaError for a missing path, on calling; for text that is not UTF-8, a bad JSON line, or a corpus
    without any text, on iterating.
    """
    if path is None:
        files: Iterable[Path] = bundled_files()
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if _is_visible_text(file, path))
    elif path.exists():
        files = [path]
    else:
        raise FasaError(f"no calibration text at {path}", hint="give a text file, a .jsonl file or a folder")
    return _read_all(files, BUNDLED if path is None else path)


def token_windows(encode: Encode, documents: Iterable[str], length: int, samples: int, seed: int = 0) -> list[Window]:
    """Pack documents, in an order that the seed decides, into windows of exactly `length` tokens.

    Windows do not overlap. Long documents are cut into pieces of a few windows first, so that the windows of
    one large file come from all over it too. Only as much text is encoded as the windows need.

    Returns up to `samples` int64 [length] arrays: fewer where the text runs out, which callers should report.
    Raises FasaError when the text does not fill one window, ValueError when length or samples is below 1.
    """
    if length < 1 or samples < 1:
        raise ValueError(f"length and samples must be at least 1, not {length} and {samples}")
    windows: list[Window] = []
    pending: list[int] = []
    # 8 characters a token are more than any tokenizer averages, so a piece holds at least one window's text.
    pieces = (piece for document in documents for piece in _pieces(document, limit=8 * length))
    for piece in _shuffled(pieces, seed):
        pending.extend(encode(piece if piece.endswith("\n") else piece + "\n"))
        while len(pending) >= length:
            windows.append(np.array(pending[:length], dtype=np.int64))
            if len(windows) == samples:
                return windows
            del pending[:length]
    if not windows:
        raise FasaError(
            f"the calibration text has {len(pending)} tokens, one window needs {length}",
            hint="give more text or a shorter length",
        )
    return windows


def corpus_hash(windows: Iterable[Window]) -> str:
    """SHA-256 (hex) of token windows in their order: names what a profile was calibrated on."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(len(window).to_bytes(8, "little"))
        digest.update(window.astype("<i8").tobytes())
    return digest.hexdigest()


def _is_visible_text(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.suffix.lower() in TEXT_SUFFIXES and not hidden and file.is_file()


def _read_all(files: Iterable[Path], origin: Path) -> Iterator[str]:
    found = False
    for file in files:
        for text in _read_json_lines(file) if file.suffix.lower() == ".jsonl" else [_read_text(file)]:
            if text.strip():
                found = True
                yield text
    if not found:
        raise FasaError(f"no text in {origin}", hint=f"text files end in {' '.join(sorted(TEXT_SUFFIXES))}")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error) from None


def _read_json_lines(file: Path) -> Iterator[str]:
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _text_field(line, f"{file}, line {number}")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error) from None


def _text_field(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise FasaError(f"{place}: not JSON: {error.msg}", hint="one JSON object a line") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise FasaError(f"{place}: no text", hint='each line needs the form {"text": "..."}')
    return text


def _not_utf8(file: Path, error: UnicodeDecodeError) -> FasaError:
    byte = error.object[error.start]
    return FasaError(f"{file} is not UTF-8 text (byte 0x{byte:02x})", hint="convert it, or leave it out")


def _pieces(document: str, limit: int) -> Iterator[str]:
    """Cut a document into pieces of at most `limit` characters, at line ends where there are any."""
    start = 0
    while len(document) - start > limit:
        newline = document.rfind("\n", start, start + limit)
        end = start + limit if newline < 0 else newline + 1
        yield document[start:end]
        start = end
    if start < len(document):
        yield document[start:]


def _shuffled(pieces: Iterable[str], seed: int) -> Iterator[str]:
    """Yield pieces in random order, holding at most about _SHUFFLE_CHARS characters of them."""
    rng = random.Random(seed)
    held: list[str] = []
    size = 0

    def take() -> str:
        chosen = rng.randrange(len(held))
        held[chosen], held[-1] = held[-1], held[chosen]
        return held.pop()

    for piece in pieces:
        held.append(piece)
        size += len(piece)
        while size > _SHUFFLE_CHARS:
            out = take()
            size -= len(out)
            yield out
    while held:
        yield take()
