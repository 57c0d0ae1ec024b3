"""CIDEr-D: how much a caption agrees with those that people gave a photograph (no torch)."""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

LONGEST = 4
"""Words of the longest n-grams."""
SIGMA = 6.0
"""Standard deviation in words of the penalty of unequal lengths."""
SCALE = 10.0
"""Score of a caption that every reference repeats word by word, where its n-grams say anything."""
WORD = re.compile(r"\d+(?:[.,]\d+)+|\w+(?:-\w+)*|['’]\w+")

Grams = Counter[tuple[str, ...]]


def words_of(text: str) -> list[str]:
    """Return the words of a caption, lower-case and without punctuation.

    As COCO's evaluation does after the tokenizer of the Penn Treebank (``black-and-white`` is one
    word, ``man's`` is two), but for its rarer rules: ``don't`` becomes ``don`` and ``'t``.
    """
    return WORD.findall(text.lower())


def cider_d(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> npt.NDArray[np.float64]:
    """Return the CIDEr-D of each photograph's caption, 0 to 10; shape (photographs,).

    R. Vedantam, C. L. Zitnick, D. Parikh, *CIDEr: Consensus-based Image Description Evaluation*,
    CVPR 2015: CIDEr-D of its section 8, which is what COCO's server reports as CIDEr. With the
    n-grams of a text weighted by how often they stand in it (tf) and how rare they are (idf), a
    caption c and a reference s give, for each n of 1 to 4,

        10 · exp(−(l(c) − l(s))² / 2σ²) · Σ min(g(c), g(s)) · g(s) / (‖g(c)‖ · ‖g(s)‖)

    averaged over the references and over n; l is the length in words, σ = 6. The idf of an n-gram
    is log(photographs) − log(photographs with a reference that holds it), over **all** photographs
    given here: what all of them share says nothing, and a single photograph always has 0. Values
    of few photographs do not compare with those of COCO's test set.

    Args:
        captions: one of each photograph.
        references: texts of people, for each photograph; a photograph without any has 0.
    """
    written = [_grams(caption) for caption in captions]
    wanted = [[_grams(text) for text in texts] for texts in references]
    seen = Counter(gram for texts in wanted for gram in set().union(*texts))
    photographs = math.log(max(1, len(captions)))

    def weigh(grams: Grams) -> list[dict[tuple[str, ...], float]]:
        """Return the weights by length of the n-gram."""
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for gram, count in grams.items():
            weights[len(gram) - 1][gram] = count * (photographs - math.log(max(1, seen[gram])))
        return weights

    scores = np.zeros(len(captions))
    for index, (caption, texts) in enumerate(zip(written, wanted, strict=True)):
        ours = weigh(caption)
        for text in texts:
            alike = sum(
                _clipped(mine, theirs) for mine, theirs in zip(ours, weigh(text), strict=True)
            )
            apart = _length(caption) - _length(text)
            scores[index] += alike * math.exp(-(apart**2) / (2 * SIGMA**2)) / len(texts)
    return scores * SCALE / LONGEST


def _grams(text: str) -> Grams:
    words = words_of(text)
    return Counter(
        tuple(words[start : start + n])
        for n in range(1, LONGEST + 1)
        for start in range(len(words) - n + 1)
    )


def _length(grams: Grams) -> int:
    """Return how many words there were."""
    return sum(count for gram, count in grams.items() if len(gram) == 1)


def _clipped(ours: dict[tuple[str, ...], float], theirs: dict[tuple[str, ...], float]) -> float:
    """Return the cosine of two weightings, where more of an n-gram than theirs does not count."""
    product = math.sqrt(sum(v * v for v in ours.values()) * sum(v * v for v in theirs.values()))
    if not product:
        return 0.0
    both = ours.keys() & theirs.keys()
    return math.fsum(min(ours[gram], theirs[gram]) * theirs[gram] for gram in both) / product
