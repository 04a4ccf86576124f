"""The best dependency tree of a sentence, by the scores of its arcs."""

from __future__ import annotations

import numpy as np


def decode(scores: np.ndarray) -> np.ndarray:
    """[n] heads of n words, 0 the root, from [n, n + 1] scores of each word's possible heads, column 0 the root.

    The maximum spanning tree (Chu-Liu, Edmonds) in which one word hangs from the root. A word is not its own head,
    whatever the score. Raises `ValueError` for scores of another shape or that are not finite.
    """
    from ufal.chu_liu_edmonds import chu_liu_edmonds  # type: ignore[attr-defined]

    scores = np.array(scores, dtype=np.float64)
    n = len(scores)
    if scores.shape != (n, n + 1) or not n:
        raise ValueError(f"scores are [words, words + 1], for at least one word, got {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("scores of arcs that are not finite: the network has diverged")
    own = np.arange(n)
    scores[own, own + 1] = scores[:, 0]  # of a word as its own head: is never taken, and may be the lowest float
    scores = scores - scores.max(1, keepdims=True)  # every word has one head: the same trees are best
    scores[:, 0] -= 1.0 - n * scores.min()  # more than any tree loses: a second arc from the root never pays
    matrix = np.full((n + 1, n + 1), np.nan)
    matrix[1:] = scores
    np.fill_diagonal(matrix, np.nan)
    heads, _ = chu_liu_edmonds(matrix)
    return np.asarray(heads[1:])
