"""Scores of an answer against references, from 0 to 1, as LongBench (arXiv 2308.14508), its v2 (arXiv 2412.15204), its
Pro version (arXiv 2601.02872) and RULER (arXiv 2404.06654) define them. They were written for this project.

Chinese text is compared character by character, while LongBench compares the words of a segmenter. These scores can be
compared only with others of this package.
"""

from __future__ import annotations

import itertools
import math
import re
import string
from collections import Counter
from collections.abc import Sequence

__all__ = [
    "accuracy",
    "answer_lines",
    "any_found",
    "choice",
    "chosen",
    "code_line",
    "edit_similarity",
    "f1",
    "first_line",
    "first_line_equal",
    "lines_f1",
    "lines_found",
    "ndcg",
    "normalized",
    "normalized_lines",
    "number_share",
    "pairs_in_order",
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


def chosen(answer: str) -> str:
    """Return the first of the letters A to D that stands by itself in the answer, or ""."""
    found = re.search(r"\b[ABCD]\b", answer)
    return found.group() if found else ""


def choice(answer: str, reference: str, classes: Sequence[str] = ()) -> float:
    """LongBench v2's score: return 1 where the chosen letter is the reference, else 0."""
    return float(chosen(answer) == reference)


def normalized_lines(lines: Sequence[str]) -> list[str]:
    """Return each line in lower case, with single blanks."""
    return [" ".join(line.lower().split()) for line in lines]


def answer_lines(answer: str) -> list[str]:
    """Return the lines of an answer as LongBench Pro compares them: of what follows the last "[Answer]" or "[答案]"."""
    mark = "[Answer]" if "[Answer]" in answer else "[答案]"
    return normalized_lines(answer.rpartition(mark)[2].strip().split("\n"))


def first_line_equal(lines: Sequence[str], references: Sequence[str]) -> float:
    """LongBench Pro's accuracy: return 1 where the first line is the first reference, else 0."""
    return float(lines[0] == references[0])


def lines_f1(lines: Sequence[str], references: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall over different lines."""
    common = len(set(lines) & set(references))
    return 2 * common / (len(set(lines)) + len(set(references)))


def lines_found(lines: Sequence[str], references: Sequence[str]) -> float:
    """LongBench Pro's SubEM: return the share of the references that are lines of the answer."""
    return sum(reference in lines for reference in references) / len(references)


def _last_places(lines: Sequence[str]) -> dict[str, int]:
    return {line: place for place, line in enumerate(lines)}


def ndcg(lines: Sequence[str], references: Sequence[str]) -> float:
    """Return the normalized discounted cumulative gain of the answer's lines at as many ranks as there are references,
    of which the first is worth most. Of equal lines the last one counts.
    """
    worth = {reference: len(references) - place for place, reference in enumerate(references)}
    ranked = sorted(_last_places(lines).items(), key=lambda entry: entry[1])

    def gain(values: Sequence[int]) -> float:
        return sum(value / math.log2(rank + 2) for rank, value in enumerate(values))

    gained = [worth.get(line, 0) for line, _ in ranked[: len(references)]]
    return gain(gained) / gain(sorted(worth.values(), reverse=True))


def pairs_in_order(lines: Sequence[str], references: Sequence[str]) -> float:
    """LongBench Pro's pairwise accuracy: return the pairs of references that the answer has in their order, over the
    pairs of the answer's lines; 0 where either has fewer than two.
    """
    if min(len(lines), len(references)) < 2:
        return 0.0
    places = _last_places(lines)
    known = [places[reference] for reference in references if reference in places]
    right = sum(a < b for a, b in itertools.combinations(known, 2))
    return right / math.comb(len(lines), 2)


def share_found(answer: str, references: Sequence[str]) -> float:
    """RULER's score of its synthetic tasks ("string match all"): return the share of the references that occur in the
    answer, regardless of case.
    """
    return sum(r.lower() in answer.lower() for r in references) / len(references)


def any_found(answer: str, references: Sequence[str]) -> float:
    """RULER's score of questions ("string match part"): return 1 where one of the references occurs in the answer,
    regardless of case, else 0.
    """
    return float(any(r.lower() in answer.lower() for r in references))
