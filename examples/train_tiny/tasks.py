"""Sequences in the formats of RULER's tasks, which `fasa_trt.evaluation` asks: needles, variables, common words, QA.

A problem is a text with lines hidden in it, and questions with answers after it. Answers say what they look up before
they say what was found: they quote the text, which small models learn soonest.

Source of the tasks: RULER, arXiv 2404.06654, section 3.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from examples.train_tiny.corpus import EOS
from examples.train_tiny.sequences import FIRST, INNER, LAST, Insertion, Line, Sample, weave
from fasa_trt.evaluation import wording

TASKS = ("multikey", "multivalue", "multiquery", "variables", "common_words", "qa")
ANSWER_WEIGHT, FORM_WEIGHT = 8.0, 0.05  # of an answer's tokens; of wording that is always the same
TEXT_WEIGHT = 0.25  # of code and prose around problems: an answer is a hundredth of a long text
COMMON = 10

Ids: TypeAlias = list[int]
T = TypeVar("T")


class Ask(NamedTuple):
    """A question, a right answer to it, and what an answer must contain to count as right, all as token ids."""

    question: Ids
    answer: Ids
    wanted: list[Ids]


class Problem(NamedTuple):
    """before: instructions. needles: lines to hide, in their order. body: a text instead of one to hide them in."""

    before: Ids
    asks: list[Ask]
    needles: list[Ids]
    body: Ids | None = None

    @property
    def size(self) -> int:
        """Tokens with <bos> and with an <eos> after each answer."""
        asks = sum(len(ask.question) + len(ask.answer) + 1 for ask in self.asks)
        return 1 + len(self.before) + sum(map(len, self.needles)) + len(self.body or []) + asks


class TaskGenerator:
    """Draws problems, woven into text, from prose and code (uint16 [tokens]). work: what `corpus.prepare` wrote."""

    def __init__(
        self, prose: npt.NDArray[np.uint16], code: npt.NDArray[np.uint16], seed: int, work: Path, *, names: int = 20_000
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.prose, self.code = prose, code
        self._tokenizer = Tokenizer.from_file(str(work / "tok.json"))
        (self.newline,) = self.encode("\n")
        single = [self.encode(digit)[0] for digit in string.digits]
        self.digits = [[single[int(digit)] for digit in str(number)] for number in range(10_000)]
        plain = json.loads((work / "words.json").read_text(encoding="utf-8"))
        made_up = ["".join(self._letters(string.ascii_lowercase, int(self.rng.integers(5, 10)))) for _ in plain[::3]]
        self.words = self._spaced([*plain, *made_up])
        letters = self.rng.integers(0, 26, (names, 5))
        self.variables = self._spaced(["".join(string.ascii_uppercase[i] for i in row) for row in letters])
        self.people = [
            (a + b + c).capitalize() for a in wording.SYLLABLES for b in wording.SYLLABLES for c in wording.SYLLABLES
        ]
        self._pieces: dict[str, Ids] = {}

    def training(self, task: str, length: int) -> Sample:
        """A problem of exactly `length` tokens with as many questions as fit, up to eight."""
        problem = self.problem(task, length, most_asks=int(self.rng.integers(1, 9)))
        answers = [line for ask in problem.asks for line in (_form(ask.question), _answer([*ask.answer, EOS]))]
        return self._woven(problem, length, answers)

    def prompt(self, task: str, length: int) -> tuple[npt.NDArray[np.int64], list[str]]:
        """A prompt of exactly `length` tokens, int64, and the strings that a right answer contains."""
        problem = self.problem(task, length, most_asks=1, exact=True)
        (ask,) = problem.asks
        wanted = [self.decode(ids).strip() for ids in ask.wanted]
        return self._woven(problem, length, [_form(ask.question)]).tokens, wanted

    def decode(self, ids: Ids) -> str:
        return str(self._tokenizer.decode(ids))

    def problem(self, task: str, length: int, *, most_asks: int, exact: bool = False) -> Problem:
        """exact: as many needles, values and so on as the evaluation hides; else any number.

        Raises ValueError where none fits into `length`.
        """
        for _ in range(100):  # names of many tokens fit less well
            drawn = self._draw(task, length, most_asks, exact)
            if drawn.size <= length:
                return drawn
        raise ValueError(f"no problem of the task {task} fits into {length} tokens")

    def _draw(self, task: str, length: int, most_asks: int, exact: bool) -> Problem:
        if task == "variables":
            return self._variables(length, most_asks, exact)
        if task == "common_words":
            return self._common_words(length, exact)
        if task == "qa":
            return self._qa(length, most_asks, exact)
        return self._needles(task, length, most_asks, exact)

    def _needles(self, task: str, length: int, most_asks: int, exact: bool) -> Problem:
        integer = self.rng.integers
        keys, values, asked = {
            "multikey": (4 if exact else int(integer(1, 9)), 1, 1),
            "multivalue": (1 if exact else int(integer(1, 4)), 4 if exact else int(integer(2, 5)), 1),
            "multiquery": (4 if exact else int(integer(2, 13)), 1, 4),
        }[task]
        keys = min(keys, max(1, length // (50 * values)))
        chosen = [self.words[i] for i in self.rng.choice(len(self.words), keys, replace=False)]
        pairs = self._shuffled([(key, self._digits(7)) for key in range(keys) for _ in range(values)])
        needles = [
            [*self._piece("One of the special magic numbers for"), *chosen[key], *self._piece(" is: "), *value,
             *self._piece(".\n")]
            for key, value in pairs
        ]  # fmt: skip
        asks = []
        first, middle, last = (self._piece(part) for part in wording.NEEDLES_AFTER.split(" {keys}"))
        shuffled = [int(key) for key in self.rng.permutation(keys)]
        for start in range(0, min(keys, most_asks * asked), asked):  # no key twice, or the first answer would be copied
            order = shuffled[start : start + asked]
            named = _joined(self._piece(","), [chosen[key] for key in order])
            found = [(key, value) for wanted in order for key, value in pairs if key == wanted]
            quoted = [[*chosen[key], *self._piece(" is: "), *value] for key, value in found]
            answer = [*_joined(self._piece(","), quoted), *self._piece(".")]
            asks.append(Ask([*first, *named, *middle, *named, *last], answer, [value for _, value in found]))
        return self._fitting(self._piece(wording.NEEDLES_BEFORE), asks, needles, length)

    def _variables(self, length: int, most_asks: int, exact: bool) -> Problem:
        """Chains of assignments; each name's line stands below that of the one before it."""
        chains = 1 if exact or length < 1024 or self.rng.random() < 0.6 else int(self.rng.integers(2, 5))
        hops = 5 if exact else int(self.rng.integers(2, 7))
        lines, asks = [], []
        for _ in range(chains):
            names = [self.variables[i] for i in self.rng.choice(len(self.variables), hops, replace=False)]
            value = self._digits(5)
            sources = [[*self._piece(" = "), *value], *([*self._piece(" = VAR"), *name] for name in names[:-1])]
            chain = [
                [*self._piece("VAR"), *name, *source, self.newline] for name, source in zip(names, sources, strict=True)
            ]
            first, middle, last = wording.VARIABLES_AFTER.split("{value}")
            hops_before, hops_after = middle.split("{hops}")
            question = [
                *self._piece(first), *value, *self._piece(hops_before), *self.digits[hops], *self._piece(hops_after),
                *value, *self._piece(last),
            ]  # fmt: skip
            lines.append(chain)
            asks.append(Ask(question, [token for name in names for token in name], names))
        return self._fitting(self._piece(wording.VARIABLES_BEFORE), asks[:most_asks], self._interleaved(lines), length)

    def _interleaved(self, chains: list[list[Ids]]) -> list[Ids]:
        """All lines, each chain's in its order."""
        owners = self.rng.permutation([i for i, chain in enumerate(chains) for _ in chain])
        rest = [iter(chain) for chain in chains]
        return [next(rest[owner]) for owner in owners]

    def _common_words(self, length: int, exact: bool) -> Problem:
        """Ten words that come `often` times in a list of others, which come `seldom` times."""
        before, after = self._piece(wording.WORDS_BEFORE), self._piece(wording.WORDS_AFTER)
        room = length - len(before) - len(after) - 75
        often = max(3, min(30, room // (COMMON * 12)))
        seldom = min(3, often - 2)
        if not exact:
            often = int(self.rng.integers(max(3, often // 2), often + 1))
            seldom = int(self.rng.integers(1, max(1, min(3, often - 2)) + 1))
        order = self.rng.permutation(len(self.words))
        common, others = order[:COMMON], order[COMMON:]
        listed = [*np.repeat(common, often)]
        size = sum(len(self.words[i]) + 6 for i in listed)
        for other in others:
            size += seldom * (len(self.words[other]) + 6)
            if size > room:
                break
            listed += [other] * seldom
        body: Ids = []
        for number, word in enumerate(self.rng.permutation(listed), start=1):
            body += [*self._piece(" ")] if number > 1 else []
            body += [*self.digits[number], *self._piece("."), *self.words[word]]
        words = [self.words[i] for i in self.rng.permutation(common)]
        answer = [*_joined(self._piece(","), words), *self._piece(".")]
        return Problem(before, [Ask(after, answer, words)], [], body)

    def _qa(self, length: int, most_asks: int, exact: bool) -> Problem:
        count = min(12 if exact else int(self.rng.integers(2, 13)), max(2, length // 120))
        chosen = self.rng.choice(len(self.people), 3 * count, replace=False)
        people, firms, cities = ([self.people[i] for i in chosen[part::3]] for part in range(3))
        facts = [
            [*self._piece(person), *self._piece(" is an engineer at"), *self._piece(" " + firm), *self._piece(".\n")]
            for person, firm in zip(people, firms, strict=True)
        ]
        facts += [
            [*self._piece("The company"), *self._piece(" " + firm), *self._piece(" has its office in"),
             *self._piece(" " + city), *self._piece(".\n")]
            for firm, city in zip(firms, cities, strict=True)
        ]  # fmt: skip
        facts = self._shuffled(facts)
        asks = []
        first, last = wording.QA_AFTER.split(" {person}")
        for i in self.rng.permutation(count)[:most_asks]:
            person, firm, city = (self._piece(" " + name) for name in (people[i], firms[i], cities[i]))
            answer = [*_joined(self._piece(","), [person, firm, city]), *self._piece(".")]
            asks.append(Ask([*self._piece(first), *person, *self._piece(last)], answer, [city]))
        return self._fitting(self._piece(wording.QA_BEFORE), asks, facts, length)

    def _fitting(self, before: Ids, asks: list[Ask], needles: list[Ids], length: int) -> Problem:
        """With as many of the questions as leave an eighth of the length to the text, but at least one."""
        room = length - length // 8 - len(before) - sum(map(len, needles))
        kept: list[Ask] = []
        for ask in asks:
            room -= len(ask.question) + len(ask.answer) + 1
            if kept and room < 0:
                break
            kept.append(ask)
        return Problem(before, kept, needles)

    def _woven(self, problem: Problem, length: int, end: list[Line]) -> Sample:
        """<bos>, text if there is a body already, the instructions, needles in text or the body, and the end."""
        tail = [_form(problem.before)] if problem.body is None else [_form(problem.before), _form(problem.body)]
        fixed = 1 + sum(len(line.tokens) for line in [*tail, *end]) + sum(map(len, problem.needles))
        text = self._text(length - fixed)
        if problem.body is not None:
            items = [Insertion(len(text), 0, line) for line in [*tail, *end]]
            return weave(text, items, TEXT_WEIGHT)
        starts = np.concatenate([[0], np.nonzero(text == self.newline)[0] + 1])
        places = np.sort(self.rng.integers(0, len(starts), len(problem.needles)))
        items = [Insertion(0, 0, tail[0])]
        items += [
            Insertion(int(starts[at]), 0, _hidden(needle)) for at, needle in zip(places, problem.needles, strict=True)
        ]
        return weave(text, [*items, *(Insertion(len(text), 0, line) for line in end)], TEXT_WEIGHT)

    def _text(self, length: int) -> npt.NDArray[np.int64]:
        """Prose, or in one of five problems code, that ends with a newline."""
        source = self.prose if self.rng.random() < 0.8 else self.code
        start = int(self.rng.integers(0, len(source) - length))
        text = source[start : start + length].astype(np.int64)
        text[-1:] = self.newline
        return text

    def _shuffled(self, items: list[T]) -> list[T]:
        return [items[i] for i in self.rng.permutation(len(items))]

    def _digits(self, count: int) -> Ids:
        first = int(self.rng.integers(1, 10))
        return [*self.digits[first], *(self.digits[i][0] for i in self.rng.integers(0, 10, count - 1))]

    def _letters(self, alphabet: str, count: int) -> list[str]:
        return [alphabet[i] for i in self.rng.integers(0, len(alphabet), count)]

    def encode(self, text: str) -> Ids:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _spaced(self, words: list[str]) -> list[Ids]:
        """Words as they are in running text, after a space."""
        encoded = self._tokenizer.encode_batch([f" {word}" for word in words], add_special_tokens=False)
        return [list(each.ids) for each in encoded]

    def _piece(self, text: str) -> Ids:
        """Encoded once; pieces meet where the tokenizer splits anyway: before a space, a digit, or a newline."""
        if text not in self._pieces:
            self._pieces[text] = self.encode(text)
        return self._pieces[text]


def _form(tokens: Ids) -> Line:
    return Line(tokens, [FORM_WEIGHT] * len(tokens), [0] * len(tokens))


def _hidden(tokens: Ids) -> Line:
    """A needle: nothing in it can be known before."""
    return Line(tokens, [0.0] * len(tokens), [0] * len(tokens))


def _answer(tokens: Ids) -> Line:
    marks = [FIRST, *[INNER] * (len(tokens) - 2), LAST]
    return Line(tokens, [ANSWER_WEIGHT] * len(tokens), marks)


def _joined(separator: Ids, parts: Sequence[Ids]) -> Ids:
    return [*parts[0], *(token for part in parts[1:] for token in (*separator, *part))]
