"""Sentences of a small grammar of English with their trees: something to run on where no treebank is."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

WORDS = {
    "DET": ("the", "a", "every", "this", "no"),
    "ADJ": ("small", "red", "quiet", "heavy", "clever", "empty", "young", "broken"),
    "NOUN": ("cat", "engineer", "river", "kernel", "teacher", "garden", "letter", "machine", "child", "bridge"),
    "VERB": ("sees", "builds", "repairs", "paints", "finds", "carries", "measures", "forgets"),
    "ADV": ("slowly", "often", "carefully", "never", "today"),
    "ADP": ("with", "near", "behind", "under"),
    "AUX": ("is",),
    "CCONJ": ("and", "or"),
    "PUNCT": (".",),
}

Node = tuple[str, str, list["Node"], list["Node"]]
"""Tag, label, dependents before it and after it."""


def generated_treebank(train: int = 400, dev: int = 100, test: int = 100, seed: int = 0) -> dict[str, Dataset]:
    """{"train", "dev", "test"} with the columns of `load_treebank`: short sentences made by a grammar, no real text."""
    from datasets import Dataset

    drawn = random.Random(seed)
    sizes = {"train": train, "dev": dev, "test": test}
    return {split: Dataset.from_list([sentence(drawn) for _ in range(size)]) for split, size in sizes.items()}


def sentence(drawn: random.Random) -> dict[str, Any]:
    """{"words", "upos", "heads", "deprels"} of one sentence."""
    words: dict[str, list[Any]] = {"words": [], "upos": [], "heads": [], "deprels": []}
    _write(_clause(drawn), 0, words, drawn)
    return words


def _clause(drawn: random.Random) -> Node:
    subject = _noun(drawn, "nsubj", 2)
    if drawn.random() < 0.2:  # "the small cat is red ."
        return "ADJ", "root", [subject, ("AUX", "cop", [], [])], [("PUNCT", "punct", [], [])]
    before, after = [subject], [_noun(drawn, "obj", 2)]
    if drawn.random() < 0.4:
        (before if drawn.random() < 0.5 else after).append(("ADV", "advmod", [], []))
    if drawn.random() < 0.3:
        after.append(_with_adposition(drawn, "obl", 1))
    return "VERB", "root", before, [*after, ("PUNCT", "punct", [], [])]


def _noun(drawn: random.Random, label: str, depth: int) -> Node:
    before: list[Node] = [("DET", "det", [], [])]
    before += [("ADJ", "amod", [], []) for _ in range(drawn.choice((0, 0, 1, 1, 2)))]
    after: list[Node] = []
    if depth and drawn.random() < 0.25:
        after.append(_with_adposition(drawn, "nmod", depth - 1))
    if depth and drawn.random() < 0.15:
        tag, _, inner, rest = _noun(drawn, "conj", 0)
        after.append((tag, "conj", [("CCONJ", "cc", [], []), *inner], rest))
    return "NOUN", label, before, after


def _with_adposition(drawn: random.Random, label: str, depth: int) -> Node:
    tag, _, before, after = _noun(drawn, label, depth)
    return tag, label, [("ADP", "case", [], []), *before], after


def _write(node: Node, head: int, words: dict[str, list[Any]], drawn: random.Random) -> int:
    """Append the words of a subtree and return the number of its head, which is written after what stands before it."""
    tag, label, before, after = node
    early = [_write(one, -1, words, drawn) for one in before]
    words["words"].append(drawn.choice(WORDS[tag]))
    words["upos"].append(tag)
    words["heads"].append(head)
    words["deprels"].append(label)
    number = len(words["words"])
    for dependent in early:
        words["heads"][dependent - 1] = number
    for one in after:
        _write(one, number, words, drawn)
    return number
