"""Universal Dependencies treebanks in CoNLL-U: read, checked, written with other annotations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_robustq.files import write_text

if TYPE_CHECKING:
    from conllu import TokenList

COLUMNS = 10
NUMBER = re.compile(r"[1-9][0-9]*$")
BESIDE = re.compile(r"([1-9][0-9]*)-([1-9][0-9]*)$|[0-9]+\.[1-9][0-9]*$")
"""Numbers of multiword tokens and of empty nodes, which are no words of the tree."""


def read_conllu(path: str | Path, annotated: bool = True) -> list[TokenList]:
    """The sentences of a CoNLL-U file, with everything that is in it.

    Raises `ValueError`, with file, line and what is wrong: columns that are not 10, words not numbered one by one, a
    multiword token or empty node out of place, and, unless it is not `annotated` (UPOS, HEAD and DEPREL are not looked
    at), a word without tag or label, a head outside the sentence, no root or several, a cycle.
    """
    import conllu
    from conllu.exceptions import ParseException

    sentences = []
    for begin, lines in _paragraphs(Path(path)):
        words = _check(path, begin, lines, annotated)
        if not words:
            raise ValueError(f"{path}:{begin}: a sentence without words")
        try:
            (sentence,) = conllu.parse("\n".join(lines) + "\n\n")
        except ParseException as error:
            raise ValueError(f"{path}:{begin}: {error}") from None
        sentences.append(sentence)
    if not sentences:
        raise ValueError(f"{path}: no sentence in it")
    return sentences


def words_of(sentence: TokenList) -> list[Any]:
    """The words of the tree: neither multiword tokens nor empty nodes."""
    return [token for token in sentence if isinstance(token["id"], int)]


def rows_of(sentence: TokenList) -> dict[str, list[Any]]:
    """{"words", "upos", "heads", "deprels"} of a sentence; a head is the number of a word, 0 the root."""
    names = {"words": "form", "upos": "upos", "heads": "head", "deprels": "deprel"}
    return {name: [word[column] for word in words_of(sentence)] for name, column in names.items()}


def write_conllu(
    path: str | Path,
    sentences: Sequence[TokenList],
    upos: Sequence[Sequence[str]],
    heads: Sequence[Sequence[int]],
    deprels: Sequence[Sequence[str]],
) -> None:
    """The same sentences with other tags, heads and labels for their words; enhanced dependencies are left out.

    Raises `ValueError` where a sentence and what is given for it differ in length.
    """
    parts = []
    for i, sentence in enumerate(sentences):
        copy = sentence.copy()
        words = words_of(copy)
        if not len(words) == len(upos[i]) == len(heads[i]) == len(deprels[i]):
            raise ValueError(f"sentence {i + 1} has {len(words)} words, and annotations are of {len(heads[i])}")
        for word, tag, head, label in zip(words, upos[i], heads[i], deprels[i], strict=True):
            word.update(upos=tag, head=int(head), deprel=label, deps=None)
        parts.append(copy.serialize())
    write_text("".join(parts), path)


def _paragraphs(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number of the first line, and the lines, of each sentence."""
    begin, lines = 1, []
    with path.open("rb") as file:
        for number, read in enumerate(file, 1):
            try:
                line = read.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise ValueError(f"{path}:{number}: not UTF-8, which CoNLL-U is in") from None
            if line.strip():
                begin = begin if lines else number
                lines.append(line)
            elif lines:
                yield begin, lines
                lines = []
    if lines:
        yield begin, lines


def _check(path: str | Path, begin: int, lines: Sequence[str], annotated: bool) -> int:
    """The number of words of a sentence that is well-formed; else a `ValueError`."""
    heads: list[int] = []
    at: list[int] = []
    until = 0
    for number, line in enumerate(lines, begin):
        if line.startswith("#"):
            continue

        def fail(what: str, number: int = number) -> ValueError:
            return ValueError(f"{path}:{number}: {what}")

        cells = line.split("\t")
        if len(cells) != COLUMNS:
            raise fail(f"{len(cells)} columns separated by tabs, where CoNLL-U has {COLUMNS}")
        own, _, _, tag, *_ = cells
        if not cells[1]:
            raise fail("a word without a form")
        if beside := BESIDE.match(own):
            first, last = (int(beside[1]), int(beside[2])) if beside[1] else (len(at) + 1, len(at) + 1)
            if beside[1] and not (first == len(at) + 1 and until < first < last):
                raise fail(f"multiword token {own} after word {len(at)}")
            if not beside[1] and int(own.split(".")[0]) != len(at):
                raise fail(f"empty node {own} after word {len(at)}")
            until = last if beside[1] else until
            continue
        if not NUMBER.match(own) or int(own) != len(at) + 1:
            raise fail(f"word number {own!r}, where {len(at) + 1} comes next")
        at.append(number)
        if annotated:
            if "_" in (tag, cells[7]) or not (tag and cells[7]):
                raise fail(f"{cells[1]!r} has no {'tag' if tag in ('', '_') else 'dependency label'}")
            if not cells[6].isdecimal():
                raise fail(f"head {cells[6]!r} is no number")
            heads.append(int(cells[6]))
    if until > len(at):
        raise ValueError(f"{path}:{begin}: a multiword token goes to word {until} of {len(at)}")
    if annotated:
        check_tree(path, begin, heads, at)
    return len(at)


def check_tree(path: str | Path, begin: int, heads: Sequence[int], at: Sequence[int]) -> None:
    """Raise `ValueError` for heads that are no tree with one root; `begin` and `at` say where the words are."""
    for word, head in enumerate(heads, 1):
        if head > len(heads) or head == word:
            raise ValueError(f"{path}:{at[word - 1]}: head {head} of word {word}, in a sentence of {len(heads)}")
    roots = [word for word, head in enumerate(heads, 1) if head == 0]
    if heads and len(roots) != 1:
        found = ", ".join(map(str, roots)) or "none"
        raise ValueError(f"{path}:{begin}: a tree has one root, and the words with head 0 are {found}")
    cycle = find_cycle(heads)
    if cycle:
        raise ValueError(f"{path}:{at[cycle[0] - 1]}: a cycle, from word to head: {' -> '.join(map(str, cycle))}")


def find_cycle(heads: Sequence[int]) -> list[int]:
    """The words of a cycle, the first again at its end; empty where every word comes to the root, which is 0."""
    done: set[int] = {0}
    for start in range(1, len(heads) + 1):
        path: dict[int, None] = {}
        word = start
        while word not in done and word not in path:
            path[word] = None
            word = heads[word - 1]
        if word in path:
            words = list(path)
            return [*words[words.index(word) :], word]
        done.update(path)
    return []
