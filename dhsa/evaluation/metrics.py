"""Scores of an answer against references, from 0 to 1, as LongBench (arXiv 2308.14508) and RULER (arXiv 2404.06654)
define them. They were written for this project.

Chinese text is compared character by character, while LongBench compares the words of a segmenter. These scores can be
compared only with others of this package.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

__all__ = [
    "accuracy",
    "code_line",
    "edit_similarity",
    "f1",
    "first_line",
    "normalized",
    "number_share",
    "rouge_l",
    "share_found",
    "words",
]

_CHINESE_MARKS = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～、〃》「」『』【】〔〕〖〗〜〝〞〟–—‘’“”„…‧﹏."
)


def normalized(text: str) -> str:
    """Return the text in lower case, without punctuation, without the articles a, an and the, with single blanks."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def words(text: str, chinese: bool = False) -> list[str]:
    """Return the tokens that F1 counts: normalized words, or for Chinese the characters except marks and blanks."""
    if chinese:
        return [c for c in text.lower() if not c.isspace() and c not in string.punctuation + _CHINESE_MARKS]
    return normalized(text).split()


def f1(answer: str, reference: str, *, chinese: bool = False) -> float:
    """Return the harmonic mean of precision and recall over words, counted with multiplicity."""
    said, wanted = words(answer, chinese), words(reference, chinese)
    same = sum((Counter(said) & Counter(wanted)).values())
    if not same:
        return 0.0
    precision, recall = same / len(said), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def rouge_l(answer: str, reference: str, *, chinese: bool = False) -> float:
    """Return ROUGE-L of a summary, as F-measure.

    The words of longest common subsequences between each sentence of the reference and the whole answer are counted
    against the words of either. As in the package `rouge`, which LongBench uses, sentences end at full stops, words are
    compared with case and punctuation, and a word counts once, however often it occurs.
    """
    said, wanted = _sentences(answer, chinese), _sentences(reference, chinese)
    matched = {word for sentence in wanted for other in said for word in _common(sentence, other)}
    if not matched:
        return 0.0
    precision = len(matched) / len({word for sentence in said for word in sentence})
    recall = len(matched) / len({word for sentence in wanted for word in sentence})
    return 2 * precision * recall / (precision + recall)


def _sentences(text: str, chinese: bool) -> list[list[str]]:
    parts = ([c for c in part if not c.isspace()] if chinese else part.split() for part in text.split("."))
    return [part for part in parts if part]


def _common(left: Sequence[str], right: Sequence[str]) -> list[str]:
    """Return a longest common subsequence; of several, the first one found from the end."""
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left, 1):
        for j, b in enumerate(right, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    found, i, j = [], len(left), len(right)
    while i and j:
        if left[i - 1] == right[j - 1]:
            found.append(left[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def accuracy(answer: str, reference: str, classes: Sequence[str]) -> float:
    """Return the score of a classification: 1 where the answer names the right class and no other, 1 / n where it names
    n classes with the right one among them. A class whose name is part of the right one's does not count as named.
    """
    named = [c for c in classes if c in answer and (c == reference or c not in reference)]
    return 1 / len(named) if reference in named else 0.0


def number_share(answer: str, reference: str) -> float:
    """Return the share of the numbers in the answer that equal the reference's first number, for counts and paragraph
    numbers.
    """
    wanted = re.search(r"\d+", reference)
    numbers = re.findall(r"\d+", answer)
    return sum(n == wanted.group() for n in numbers) / len(numbers) if wanted and numbers else 0.0


def edit_similarity(answer: str, reference: str) -> float:
    """Return 1 minus the insertions and deletions that turn one text into the other, divided by the sum of both
    lengths; 1 for two empty texts.
    """
    total = len(answer) + len(reference)
    return 2 * len(_common(answer, reference)) / total if total else 1.0


def first_line(text: str) -> str:
    """Return the first line of a continuation, which may go on with another example."""
    return text.lstrip("\n").split("\n")[0]


def code_line(text: str) -> str:
    """Return the first line of code in a continuation: the first without a comment or a fence."""
    lines = text.lstrip("\n").split("\n")
    return next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")


def share_found(answer: str, references: Sequence[str]) -> float:
    """RULER's score: return the share of the references that occur in the answer, regardless of case."""
    return sum(r.lower() in answer.lower() for r in references) / len(references)
