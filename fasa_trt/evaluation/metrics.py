"""How answers are scored: the metrics of LongBench, after THUDM/LongBench's metrics.py, and of AIME.

Two libraries of the original are replaced by the standard library: ROUGE-L is the F1 of the longest common subsequence
of words, and code similarity is difflib's ratio, which is what fuzzywuzzy computes without its C extension.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Sequence


def normalized(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(common: int, predicted: int, wanted: int) -> float:
    return 2 * common / (predicted + wanted) if common else 0.0


def qa_f1(prediction: str, answer: str) -> float:
    """F1 of the words that both have."""
    predicted, wanted = normalized(prediction), normalized(answer)
    return _f1(sum((Counter(predicted) & Counter(wanted)).values()), len(predicted), len(wanted))


def rouge_l(prediction: str, answer: str) -> float:
    """F1 of the longest common subsequence of words."""
    predicted, wanted = prediction.split(), answer.split()
    lengths = [0] * (len(wanted) + 1)
    for word in predicted:
        diagonal = 0
        for i, other in enumerate(wanted, start=1):
            above = lengths[i]
            lengths[i] = diagonal + 1 if word == other else max(above, lengths[i - 1])
            diagonal = above
    return _f1(lengths[-1], len(predicted), len(wanted))


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """One over the number of class names in the prediction, where the right one is among them."""
    named = [name for name in classes if name in prediction]
    named = [name for name in named if not (name in answer and name != answer)]
    return 1 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """Share of the prediction's numbers that are the paragraph's: "Paragraph 3"."""
    wanted = re.findall(r"Paragraph (\d+)", answer)
    numbers = re.findall(r"\d+", prediction)
    return sum(number == wanted[0] for number in numbers) / len(numbers) if numbers and wanted else 0.0


def count(prediction: str, answer: str) -> float:
    """Share of the prediction's numbers that are the answer."""
    numbers = re.findall(r"\d+", prediction)
    return sum(number == answer for number in numbers) / len(numbers) if numbers else 0.0


def code_similarity(prediction: str, answer: str) -> float:
    """Of the first line of code in the prediction."""
    lines = (line for line in prediction.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//")))
    return round(100 * difflib.SequenceMatcher(None, next(lines, ""), answer).ratio()) / 100


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} of a solution, else its last whole number."""
    found = re.findall(r"\\boxed\{([^{}]*)\}", text) or re.findall(r"\d+", text)
    return found[-1].strip() if found else None


def same_number(prediction: str, answer: str) -> float:
    """1 where the final answer is the whole number `answer`, leading zeros aside."""
    given = boxed(prediction)
    digits = re.sub(r"[^\d]", "", given or "")
    return float(bool(digits) and int(digits) == int(answer))
