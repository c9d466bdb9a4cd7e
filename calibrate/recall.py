"""Long-range recall: numbers noted somewhere in a text and asked for at its end.

A note is a line `# note <key> = <value>` among lines of source code; the question `# recall <key> = ` comes
after the text and is answered by the value. A key has 4 to 6 lower-case letters, a value 5 digits. The answer
stands in one place, thousands of tokens back: a sparse decode step that misses it answers wrong.
"""

from __future__ import annotations

import io
import itertools
import random
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from fasa_trt.calibrate.corpus import Encode, bundled_files
from fasa_trt.core.errors import FasaError

VALUE_DIGITS = 5


@dataclass(frozen=True)
class Question:
    """Append `prompt` to the document's text; a right continuation starts with `answer`."""

    key: str
    answer: str
    prompt: str


@dataclass(frozen=True)
class RecallDocument:
    """A text with notes in it, ending with a newline; token_count does not include special tokens."""

    text: str
    token_count: int
    questions: tuple[Question, ...]


def note_line(key: str, value: str) -> str:
    return f"# note {key} = {value}\n"


def recall_prompt(key: str) -> str:
    return f"# recall {key} = "


def answer_of(text: str) -> str:
    """The value in a generated continuation: its first line, cut to a value's length."""
    return text.lstrip(" ").split("\n", 1)[0].rstrip()[:VALUE_DIGITS]


def recall_document(
    encode: Encode, filler: Iterable[str] | None = None, *, length: int, notes: int = 33, seed: int = 0
) -> RecallDocument:
    """A document of at most `length` tokens, as near to it as its text can be cut, with `notes` notes in it.

    encode: text to token ids, without special tokens.
    filler: text to hide the notes in, in pieces of any size, read only as far as needed. None takes the
        bundled source code, from a line that the seed picks, over again where it ends.
    Notes stand at line starts, one in each of `notes` equal stretches of the text. Each has one question; the
    questions are shuffled. Leave room in `length` for a question and its answer.

    Raises FasaError when the notes alone are too long, or the filler too short.
    """
    rng = random.Random(seed)
    keys = _distinct_keys(rng, notes)
    values = [f"{rng.randrange(10**VALUE_DIGITS):0{VALUE_DIGITS}}" for _ in keys]
    lines = [note_line(key, value) for key, value in zip(keys, values, strict=True)]
    places = [(stretch + rng.random()) / notes for stretch in range(notes)]
    questions = [Question(k, v, recall_prompt(k)) for k, v in zip(keys, values, strict=True)]
    rng.shuffle(questions)

    if len(encode("".join(lines))) > length:
        raise FasaError(f"{notes} notes alone are longer than {length} tokens", hint="fewer notes or more tokens")
    body = _enough_filler(encode, _endless_source(rng) if filler is None else filler, length)
    text, count = _longest_that_fits(encode, lambda end: _insert(body[:end], lines, places), len(body), length)
    return RecallDocument(text, count, tuple(questions))


def _distinct_keys(rng: random.Random, count: int) -> list[str]:
    keys: dict[str, None] = {}  # a set that keeps its order
    while len(keys) < count:
        keys["".join(rng.choices(string.ascii_lowercase, k=rng.randint(4, 6)))] = None
    return list(keys)


@cache
def _source_lines() -> tuple[str, ...]:
    text = "".join(file.read_text(encoding="utf-8") for file in bundled_files("source"))
    return tuple(_lines(text))


def _lines(text: str) -> Iterator[str]:
    """Lines with their newlines; unlike str.splitlines, form feeds and the like do not end one."""
    return io.StringIO(text)


def _endless_source(rng: random.Random) -> Iterator[str]:
    lines = _source_lines()
    start = rng.randrange(len(lines))
    return itertools.chain(lines[start:], itertools.cycle(lines))


def _enough_filler(encode: Encode, filler: Iterable[str], length: int) -> str:
    """Filler text of at least `length` tokens, whole lines; encodes each part of it once."""
    lines = (line for piece in filler for line in _lines(piece))
    parts: list[str] = []
    tokens = 0
    while tokens < length:
        part: list[str] = []
        wanted = 4 * (length - tokens)  # characters; most tokenizers need one or two rounds
        for line in lines:
            part.append(line)
            wanted -= len(line)
            if wanted <= 0:
                break
        if not part:
            raise FasaError(f"the filler has {tokens} tokens, {length} are needed", hint="give more filler text")
        parts.append("".join(part))
        tokens += len(encode(parts[-1]))
    return "".join(parts)


def _insert(body: str, notes: list[str], places: list[float]) -> str:
    """The body, ended by a newline, with each note at the line start at its place (0 = top, 1 = bottom)."""
    lines = list(_lines(body if body.endswith("\n") or not body else body + "\n"))
    out: list[str] = []
    done = 0
    for note, place in zip(notes, places, strict=True):
        upto = int(place * (len(lines) + 1))
        out += [*lines[done:upto], note]
        done = upto
    return "".join([*out, *lines[done:]])


def _longest_that_fits(encode: Encode, build: Callable[[int], str], size: int, length: int) -> tuple[str, int]:
    """The text build(n), 0 <= n < size, with the token count nearest to `length` from below, and that count.

    Interpolates between an n that fits and one that does not, bisecting every other time; stops within half a
    percent of the length.
    """
    low, text = 0, build(0)
    count = len(encode(text))
    high, above = size, length + count
    for attempt in itertools.count():
        if high - low <= 1 or length - count <= length // 200:
            return text, count
        share = 0.5 if attempt % 2 else (length - count) / (above - count)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        candidate = build(middle)
        tokens = len(encode(candidate))
        if tokens <= length:
            low, text, count = middle, candidate, tokens
        else:
            high, above = middle, tokens
    raise AssertionError("unreachable")
