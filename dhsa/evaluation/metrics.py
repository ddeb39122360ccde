"""Scores of an answer against references, from 0 to 1, as LongBench (arXiv 2308.14508) and RULER (arXiv 2404.06654)
define them; written for this project, plainly.

Text in Chinese is compared character by character, where LongBench cuts it into a segmenter's words: those scores
stand beside each other within this package only.
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
    """Lower case, without punctuation, without the articles a, an and the, single blanks."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def words(text: str, chinese: bool = False) -> list[str]:
    """The tokens that F1 counts: normalized words, or for Chinese the characters but marks and blanks."""
    if chinese:
        return [c for c in text.lower() if not c.isspace() and c not in string.punctuation + _CHINESE_MARKS]
    return normalized(text).split()


def f1(answer: str, reference: str, *, chinese: bool = False) -> float:
    """The harmonic mean of precision and recall over words, counted with multiplicity."""
    said, wanted = words(answer, chinese), words(reference, chinese)
    same = sum((Counter(said) & Counter(wanted)).values())
    if not same:
        return 0.0
    precision, recall = same / len(said), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def rouge_l(answer: str, reference: str, *, chinese: bool = False) -> float:
    """ROUGE-L of a summary, F-measure: the words of longest common subsequences between each sentence of the reference
    and all of the answer's, against the words of either.

    As in the package `rouge`, which LongBench calls: sentences end at full stops, words stand as written (case and all)
    and count once, however often they occur.
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
    """A longest common subsequence; of several, the one met first going back from the end."""
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
    """Classification: 1 where the answer names the right class and no other, 1 / n where it names n classes with the
    right one among them. A class whose name is part of the right one's does not count as named."""
    named = [c for c in classes if c in answer and (c == reference or c not in reference)]
    return 1 / len(named) if reference in named else 0.0


def number_share(answer: str, reference: str) -> float:
    """Share of the numbers in the answer that are the reference's (its first one), for counts and paragraph numbers."""
    wanted = re.search(r"\d+", reference)
    numbers = re.findall(r"\d+", answer)
    return sum(n == wanted.group() for n in numbers) / len(numbers) if wanted and numbers else 0.0


def edit_similarity(answer: str, reference: str) -> float:
    """1 minus the insertions and deletions that make one of the other, over both lengths; 1 for two empty ones."""
    total = len(answer) + len(reference)
    return 2 * len(_common(answer, reference)) / total if total else 1.0


def first_line(text: str) -> str:
    """What is left of a continuation that goes on with another example: its first line."""
    return text.lstrip("\n").split("\n")[0]


def code_line(text: str) -> str:
    """The first line of code in a continuation: the first without a comment or a fence."""
    lines = text.lstrip("\n").split("\n")
    return next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")


def share_found(answer: str, references: Sequence[str]) -> float:
    """RULER's score: the share of the references that occur in the answer, upper and lower case alike."""
    return sum(r.lower() in answer.lower() for r in references) / len(references)
