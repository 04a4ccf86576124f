"""Treebanks: what is read, what is refused, what is written; scores against the official evaluator."""

import itertools
import os
import random
from pathlib import Path

import pytest

from hf_robustq.metrics import DependencyScore, dependency_scores
from hf_robustq.parsing.treebanks import find_cycle, read_conllu, rows_of, write_conllu

pytest.importorskip("conllu", reason="needs hf_robustq[nlp]")

GOOD = """\
# sent_id = 1
# text = Du thé
1-2	Du	_	_	_	_	_	_	_	_
1	De	de	ADP	_	_	3	case	_	_
2	le	le	DET	_	_	3	det	_	_
3	thé	thé	NOUN	_	_	0	root	_	SpaceAfter=No
3.1	bu	boire	VERB	_	_	_	_	_	_
4	.	.	PUNCT	_	_	3	punct	_	_

# sent_id = 2
1	Oui	oui	INTJ	_	_	0	root	_	_

"""


def treebanks():
    folder = Path(os.environ.get("HF_ROBUSTQ_DATA", "")) / "ud_french"
    return sorted(folder.glob("*/*.conllu")) if "HF_ROBUSTQ_DATA" in os.environ else []


def written(tmp_path, text):
    path = tmp_path / "some.conllu"
    path.write_text(text, encoding="utf-8")
    return path


def test_words_are_those_of_the_tree(tmp_path):
    first, second = read_conllu(written(tmp_path, GOOD))
    assert rows_of(first) == {
        "words": ["De", "le", "thé", "."],
        "upos": ["ADP", "DET", "NOUN", "PUNCT"],
        "heads": [3, 3, 0, 3],
        "deprels": ["case", "det", "root", "punct"],
    }
    assert rows_of(second)["words"] == ["Oui"]
    assert len(read_conllu(written(tmp_path, GOOD.rstrip("\n")))) == 2  # no empty line at the end
    assert rows_of(read_conllu(written(tmp_path, GOOD.replace("\n", "\r\n")))[0]) == rows_of(first)


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("\tINTJ\t_\t_\t0", "\tINTJ\t_\t0", 11, "9 columns separated by tabs"),
        ("2	le", "3	le", 5, "word number '3', where 2 comes next"),
        ("2	le", "x	le", 5, "word number 'x', where 2 comes next"),
        ("1-2	Du", "2-3	Du", 3, "multiword token 2-3 after word 0"),
        ("1-2	Du", "1-9	Du", 1, "a multiword token goes to word 9 of 4"),
        ("3.1	bu", "2.1	bu", 7, "empty node 2.1 after word 3"),
        ("ADP	_	_	3", "ADP	_	_	9", 4, "head 9 of word 1, in a sentence of 4"),
        ("ADP	_	_	3", "ADP	_	_	1", 4, "head 1 of word 1, in a sentence of 4"),
        ("ADP	_	_	3", "ADP	_	_	_", 4, "head '_' is no number"),
        ("ADP	_	_	3", "ADP	_	_	-1", 4, "head '-1' is no number"),
        ("	INTJ	", "	_	", 11, "'Oui' has no tag"),
        ("0	root	_	_", "0	_	_	_", 11, "'Oui' has no dependency label"),
        ("ADP	_	_	3", "ADP	_	_	0", 1, "the words with head 0 are 1, 3"),
        ("NOUN	_	_	0", "NOUN	_	_	4", 1, "the words with head 0 are none"),
        ("1	Oui	oui", "1		oui", 11, "a word without a form"),
    ],
)
def test_what_is_malformed_is_named_with_file_and_line(tmp_path, old, new, line, message):
    assert GOOD.count(old) == 1
    path = written(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ValueError) as error:
        read_conllu(path)
    assert str(error.value).startswith(f"{path}:{line}: ") and message in str(error.value)


def test_a_cycle_beside_the_root_is_named(tmp_path):
    text = GOOD.replace("ADP	_	_	3", "ADP	_	_	2").replace("DET	_	_	3", "DET	_	_	1")
    with pytest.raises(ValueError, match=r"some.conllu:4: a cycle, from word to head: 1 -> 2 -> 1"):
        read_conllu(written(tmp_path, text))
    with pytest.raises(ValueError, match="no sentence in it"):
        read_conllu(written(tmp_path, "\n\n"))
    with pytest.raises(ValueError, match="some.conllu:1: a sentence without words"):
        read_conllu(written(tmp_path, "# text = Oui\n\n"))


def test_without_annotations_only_the_form_is_looked_at(tmp_path):
    blank = "1	Oui	_	_	_	_	_	_	_	_\n2	non	_	_	_	_	_	_	_	_\n\n"
    with pytest.raises(ValueError, match="'Oui' has no tag"):
        read_conllu(written(tmp_path, blank))
    (sentence,) = read_conllu(written(tmp_path, blank), annotated=False)
    write_conllu(tmp_path / "out.conllu", [sentence], [["INTJ", "ADV"]], [[0, 1]], [["root", "advmod"]])
    assert rows_of(read_conllu(tmp_path / "out.conllu")[0])["heads"] == [0, 1]


def test_cycles_against_a_walk_from_every_word():
    generator = random.Random(0)
    seen = set()
    for _ in range(500):
        n = generator.randint(1, 6)
        heads = [generator.randint(0, n) for _ in range(n)]

        def reaches(word, heads=heads):
            for _ in range(len(heads) + 1):
                word = heads[word - 1] if word else 0
            return word == 0

        cycle = find_cycle(heads)
        assert bool(cycle) != all(reaches(word) for word in range(1, n + 1))
        assert all(heads[a - 1] == b for a, b in itertools.pairwise(cycle))
        assert not cycle or cycle[0] == cycle[-1]
        seen.add(bool(cycle))
    assert seen == {True, False}


def test_real_treebanks_come_back_as_they_were(tmp_path):
    files = treebanks()
    if not files:
        pytest.skip("needs HF_ROBUSTQ_DATA")
    counts = {}
    for path in files:
        sentences = read_conllu(path)
        rows = [rows_of(sentence) for sentence in sentences]
        counts[path.name] = len(sentences), sum(len(row["words"]) for row in rows)
        out = tmp_path / path.name
        write_conllu(out, sentences, *([row[name] for row in rows] for name in ("upos", "heads", "deprels")))
        again = read_conllu(out)
        assert [rows_of(sentence) for sentence in again] == rows
        for one, other in zip(sentences, again, strict=True):  # multiword tokens too
            assert [(t["id"], t["form"], t["lemma"]) for t in one] == [(t["id"], t["form"], t["lemma"]) for t in other]
    assert counts["fr_partut-ud-train.conllu"] == (803, 24_107) and counts["fr_spoken-ud-dev.conllu"] == (909, 10_062)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # udtools leaves files open
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_scores_are_the_official_evaluators(tmp_path):
    """On real sentences with annotations of which a part was changed at random."""
    files = treebanks()
    if not files:
        pytest.skip("needs HF_ROBUSTQ_DATA")
    udeval = pytest.importorskip("udtools.udeval")
    generator = random.Random(0)
    for path in files:
        if "-dev" not in path.name:
            continue
        sentences = read_conllu(path)
        gold = [rows_of(sentence) for sentence in sentences]
        tags, labels = sorted({t for r in gold for t in r["upos"]}), sorted({t for r in gold for t in r["deprels"]})
        found = []
        for row in gold:
            n = len(row["words"])
            heads = [generator.randrange(n) if generator.random() < 0.2 else h for h in row["heads"]]
            heads = row["heads"] if find_cycle(heads) or heads.count(0) != 1 else heads
            one = {"heads": heads}
            one["upos"] = [generator.choice(tags) if generator.random() < 0.1 else t for t in row["upos"]]
            one["deprels"] = [
                "root" if h == 0 else generator.choice(labels) if generator.random() < 0.2 else t
                for h, t in zip(heads, row["deprels"], strict=True)
            ]
            found.append(one)
        out = tmp_path / "ours.conllu"
        write_conllu(out, sentences, *([row[name] for row in found] for name in ("upos", "heads", "deprels")))
        official = udeval.evaluate(*(udeval.load_conllu_file(str(one)) for one in (path, out)))
        ours = dependency_scores(found, gold)
        assert 0.5 < ours["las"] < ours["uas"] < 1 and ours["upos"] < 0.95
        for name, score in ours.items():
            assert score == pytest.approx(official[name.upper()].f1, abs=1e-12)
        annotations = [{name: row[name] for name in found[0]} for row in gold]
        assert DependencyScore().compute(predictions=found, references=annotations) == pytest.approx(ours)


def test_scores_of_nothing_and_of_other_words_are_refused():
    one = {"upos": ["X"], "heads": [0], "deprels": ["root"]}
    with pytest.raises(ValueError, match="no word to score"):
        dependency_scores([], [])
    with pytest.raises(ValueError, match="sentence 1 has 1 words"):
        dependency_scores([{**one, "heads": [0, 1]}], [one])
    with pytest.raises(ValueError):
        dependency_scores([one], [one, one])
    subtype = {**one, "deprels": ["root:x"]}
    assert dependency_scores([subtype], [one]) == {"upos": 1.0, "uas": 1.0, "las": 1.0}
