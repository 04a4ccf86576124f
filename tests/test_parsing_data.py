"""Treebanks as datasets, words as subwords, scores as trees: against plain loops, files and the tokenizer itself."""

import itertools
import json
import logging
import random

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from transformers import (
    AutoModel,
    AutoTokenizer,
    CamembertConfig,
    DistilBertConfig,
    EvalPrediction,
    RobertaConfig,
    TrainingArguments,
)

from hf_robustq import RobustTrainer
from hf_robustq.metrics import dependency_scores
from hf_robustq.parsing import (
    ANNOTATIONS,
    DependencyParser,
    DependencyParserConfig,
    Labels,
    ParserCollator,
    check_tokenizer,
    decode,
    decoded,
    encode,
    load_treebank,
    longest,
    parse,
    read_conllu,
    rows_of,
    scorer,
    train_tokenizer,
    write_conllu,
)
from hf_robustq.parsing import datasets as parsing_datasets
from hf_robustq.parsing.grammar import generated_treebank, sentence
from hf_robustq.parsing.treebanks import check_tree

pytest.importorskip("conllu", reason="needs hf_robustq[nlp]")

LINE = "{}\t{}\t_\t{}\t_\t_\t{}\t{}\t_\t_"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def conllu(rows):
    sentences = []
    for row in rows:
        columns = zip(row["words"], row["upos"], row["heads"], row["deprels"], strict=True)
        lines = [LINE.format(i, *one) for i, one in enumerate(columns, 1)]
        sentences.append("\n".join(lines) + "\n\n")
    return "".join(sentences)


def folder(tmp_path, **counts):
    """A treebank on disk, and its rows."""
    made = generated_treebank(**counts)
    path = tmp_path / "bank"
    path.mkdir(exist_ok=True)
    for split, rows in made.items():
        (path / f"en_made-ud-{split}.conllu").write_text(conllu(rows))
    return path, {split: list(rows) for split, rows in made.items()}


def test_the_grammar_makes_trees():
    drawn = random.Random(3)
    for i in range(300):
        row = sentence(drawn)
        assert len({len(column) for column in row.values()}) == 1 and row["words"][-1] == "."
        check_tree("grammar", i, row["heads"], [i] * len(row["heads"]))
        for head, label, tag in zip(row["heads"], row["deprels"], row["upos"], strict=True):
            governor = row["upos"][head - 1] if head else None
            assert (label == "root") == (head == 0) and (label != "amod" or (tag, governor) == ("ADJ", "NOUN"))


def test_a_folder_is_read_once_and_a_changed_file_anew(tmp_path, monkeypatch):
    path, rows = folder(tmp_path, train=20, dev=5, test=5)
    read = load_treebank(str(path))
    assert {split: list(bank) for split, bank in read.items()} == rows
    monkeypatch.setattr(parsing_datasets, "read_conllu", lambda file: pytest.fail(f"{file} read again"))
    assert list(load_treebank(str(path))["train"]) == rows["train"]
    monkeypatch.undo()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    text = (path / "en_made-ud-train.conllu").read_text()
    (path / "en_made-ud-train.conllu").write_text(text[: text.index("\n\n") + 2])
    assert list(load_treebank(str(path))["train"]) == rows["train"][:1]


def test_one_file_keeps_every_tenth_sentence_back(tmp_path):
    path, rows = folder(tmp_path, train=25, dev=1, test=1)
    read = load_treebank(str(path / "en_made-ud-train.conllu"))
    assert list(read["dev"]) == [rows["train"][9], rows["train"][19]] and len(read["train"]) == 23
    assert not set(read) - {"train", "dev"}


def test_what_is_wrong_in_a_file_is_said_with_its_line(tmp_path):
    path, _ = folder(tmp_path, train=2, dev=1, test=1)
    file = path / "en_made-ud-train.conllu"
    file.write_text(file.read_text().replace("\tDET\t", "\tDET\t_\t", 1))
    with pytest.raises(ValueError, match=r"en_made-ud-train.conllu:1: 11 columns separated by tabs"):
        load_treebank(str(path))
    file.write_bytes(b"# sent_id = 1\n# text = \xe9t\xe9\n")
    with pytest.raises(ValueError, match="en_made-ud-train.conllu:2: not UTF-8"):
        load_treebank(str(path))
    with pytest.raises(ValueError, match=f"holds treebanks in its folders: name them, such as {path}"):
        load_treebank(str(tmp_path))
    file.unlink()
    with pytest.raises(ValueError, match="has no training sentences: a folder needs a file named like"):
        load_treebank(str(path))


def test_a_dataset_of_the_hub_is_read_by_its_columns(tmp_path):
    """Multiword tokens and empty nodes are among its tokens, with no head."""
    row = {"tokens": ["du", "de", "le", "thé"], "upos": [2, 0, 1, 2], "head": ["None", "3", "3", "0"]}
    row["deprel"] = ["_", "case", "det", "root"]
    names = Sequence(ClassLabel(names=["ADP", "DET", "NOUN"]))
    text = Sequence(Value("string"))
    features = Features({"tokens": text, "upos": names, "head": text, "deprel": text})
    (tmp_path / "hub").mkdir()
    for split in ("train", "validation"):
        Dataset.from_list([row], features=features).to_parquet(tmp_path / "hub" / f"{split}.parquet")
    read = load_treebank(str(tmp_path / "hub"))
    expected = {"words": ["de", "le", "thé"], "upos": ["ADP", "DET", "NOUN"], "heads": [3, 3, 0]}
    assert read.keys() == {"train", "dev"} and list(read["dev"]) == [{**expected, "deprels": row["deprel"][1:]}]
    broken = {**row, "head": ["None", "3", "-1", "0"]}
    Dataset.from_list([row, broken], features=features).to_parquet(tmp_path / "hub" / "validation.parquet")
    with pytest.raises(ValueError, match="hub validation row:1: token 3 has the label 'det' and no head, but '-1'"):
        load_treebank(str(tmp_path / "hub"))
    broken = {**row, "head": ["None", "3", "0", "0"]}
    Dataset.from_list([row, broken], features=features).to_parquet(tmp_path / "hub" / "validation.parquet")
    with pytest.raises(ValueError, match="hub validation row:1: a tree has one root, and .* are 2, 3"):
        load_treebank(str(tmp_path / "hub"))
    (tmp_path / "hub" / "validation.parquet").unlink()
    Dataset.from_list([{"tokens": ["a"], "upos": ["X"], "head": ["0"]}]).to_parquet(tmp_path / "hub/train.parquet")
    with pytest.raises(ValueError, match="has no column 'deprel': found tokens, upos, head"):
        load_treebank(str(tmp_path / "hub"))


@pytest.fixture
def bank():
    return generated_treebank(40, 10, 10)


@pytest.fixture
def tokenizer(bank):
    return train_tokenizer(bank["train"]["words"], 120)


def test_subwords_are_the_tokenizers_word_by_word(bank, tokenizer):
    labels = Labels.of([bank["train"]])
    rows = list(encode(bank["train"], tokenizer, labels))
    for row, given in zip(rows, bank["train"], strict=True):
        alone = [tokenizer(" " + word, add_special_tokens=False)["input_ids"] for word in given["words"]]
        ids = [tokenizer.bos_token_id, *itertools.chain(*alone), tokenizer.eos_token_id]
        assert row["input_ids"] == ids and row["attention_mask"] == [1] * len(ids)
        assert row["word_ids"] == [-1, *(i for i, own in enumerate(alone) for _ in own), -1]
        assert [labels.upos[i] for i in row["upos"]] == given["upos"] and row["heads"] == given["heads"]
        assert [labels.deprels[i] for i in row["deprels"]] == given["deprels"]
    assert any(len(row["input_ids"]) > len(row["upos"]) + 2 for row in rows)  # some word has several


def test_no_word_is_lost(tokenizer):
    """A space alone has no subword, nor has an empty text: such words become unknown, and keep their place."""
    row = {"words": ["cat", " ", "the cat", "cat"], "upos": ["X"] * 4, "heads": [0, 1, 1, 1], "deprels": ["root"] * 4}
    rows = Dataset.from_list([row])
    (made,) = encode(rows, tokenizer, Labels.of([rows]))
    assert sorted({*made["word_ids"]}) == [-1, 0, 1, 2, 3] and made["word_ids"][:-1] == sorted(made["word_ids"])[1:]
    with pytest.raises(ValueError, match=r"of 4 words has \d+ subwords, and the encoder takes 5: choose an encoder"):
        encode(rows, tokenizer, Labels.of([rows]), limit=5)
    assert len(list(encode(rows, tokenizer, Labels.of([rows]), limit=len(made["input_ids"])))) == 1


def test_labels_that_training_never_had_are_named_and_count_as_errors(caplog):
    train = Dataset.from_list([{"words": ["a", "b"], "upos": ["X", "Y"], "heads": [0, 1], "deprels": ["root", "obj"]}])
    dev = Dataset.from_list([{"words": ["a", "b"], "upos": ["Z", "Y"], "heads": [0, 1], "deprels": ["root", "dep"]}])
    with caplog.at_level(logging.WARNING):
        labels = Labels.of([train], [dev])
    assert labels.upos == ("X", "Y") and labels.names("upos") == ("X", "Y", "Z")
    assert "gets wrong: Z" in caplog.text and "gets wrong: dep" in caplog.text
    (row,) = encode(dev, train_tokenizer([["a", "b"]], 50), labels)
    gold = tuple(np.array([row[name]]) for name in ANNOTATIONS)
    ours = tuple(np.where(one < known, one, 0) for one, known in zip(gold, (2, 9, 2), strict=True))
    assert scorer(labels)(EvalPrediction(ours, gold)) == {"upos": 0.5, "uas": 1.0, "las": 0.5}
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        assert Labels.of([train], [train]).new_upos == () and not caplog.text


def test_a_trained_tokenizer_is_saved_and_loaded(tmp_path, bank, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    words = bank["test"]["words"][0]
    assert again(words, is_split_into_words=True).word_ids() == tokenizer(words, is_split_into_words=True).word_ids()
    assert again.mask_token_id == tokenizer.mask_token_id is not None and again.is_fast
    assert tokenizer.decode(tokenizer(" ".join(words))["input_ids"], skip_special_tokens=True) == " ".join(words)
    check_tokenizer(again, "this")

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="some/encoder has no fast tokenizer, .* choose an encoder with"):
        check_tokenizer(Slow(), "some/encoder")


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def test_a_tokenizer_that_joins_words_is_refused(tokenizer):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = {}
    for space in (True, False):
        one = Tokenizer(models.BPE())
        one.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
        one.train_from_iterator(
            ["a cat a dog"] * 3,
            trainers.BpeTrainer(special_tokens=["<unk>", "<pad>"], vocab_size=60, show_progress=False),
        )
        made[space] = PreTrainedTokenizerFast(tokenizer_object=one, unk_token="<unk>", pad_token="<pad>")
    check_tokenizer(made[True], "roberta")
    with pytest.raises(ValueError, match="roberta joins words without a space: load it with add_prefix_space=True"):
        check_tokenizer(made[False], "roberta")


def test_parse_refuses_what_it_would_lose(bank, tokenizer):
    model = small(Labels.of([bank["train"]]), tokenizer)
    most = longest(model.encoder, tokenizer)
    with pytest.raises(ValueError, match=rf"of {most} words has \d+ subwords, and the encoder takes {most}"):
        parse(model, tokenizer, [["cat"] * most])
    with pytest.raises(ValueError, match="sentence 2 has no words"):
        parse(model, tokenizer, [["a"], []])


def test_how_many_subwords_an_encoder_takes(tokenizer):
    """As many as run: one more fails in the encoder itself."""
    for config in (
        RobertaConfig(vocab_size=120, max_position_embeddings=20, pad_token_id=1, **SIZES),
        CamembertConfig(vocab_size=120, max_position_embeddings=20, pad_token_id=3, **SIZES),
        DistilBertConfig(vocab_size=120, max_position_embeddings=20, dim=32, n_layers=1, n_heads=2, hidden_dim=32),
    ):
        encoder = AutoModel.from_config(config).eval()
        most = longest(encoder, tokenizer)
        encoder(torch.full((1, most), 7))
        with pytest.raises((IndexError, RuntimeError)):
            encoder(torch.full((1, most + 1), 7))
    tokenizer.model_max_length = 11
    assert longest(encoder, tokenizer) == 11


def small(labels, tokenizer, **options):
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "mask_token_id": tokenizer.mask_token_id}
    encoder = CamembertConfig(vocab_size=len(tokenizer), pad_token_id=special["pad_token_id"], **SIZES)
    given = {"arc_size": 32, "label_size": 16, "mask_token_id": special["mask_token_id"], **options}
    return DependencyParser(DependencyParserConfig(encoder, labels.upos, labels.deprels, **given))


def test_scores_become_the_trees_of_plain_loops(bank, tokenizer):
    labels = Labels.of([bank["train"]])
    model, rows = small(labels, tokenizer).eval(), list(encode(bank["dev"], tokenizer, labels))
    batch = ParserCollator(tokenizer.pad_token_id)(rows)
    with torch.no_grad():
        out = model(**batch)
    made = decoded((out.upos, out.arcs, out.labels), [batch[name] for name in ANNOTATIONS])
    found = []
    for i, row in enumerate(rows):
        n = len(row["heads"])
        heads = decode(out.arcs[i, :n, : n + 1].numpy())
        found.append(
            {
                "upos": [labels.upos[int(out.upos[i, w].argmax())] for w in range(n)],
                "heads": list(heads),
                "deprels": [labels.deprels[int(out.labels[i, w, heads[w]].argmax())] for w in range(n)],
            }
        )
        assert made[1][i, :n].tolist() == list(heads)
        assert all(bool((one[i, n:] == -100).all()) for one in made)
    scores = scorer(labels)(EvalPrediction(tuple(map(np.asarray, made)), tuple(batch[n].numpy() for n in ANNOTATIONS)))
    assert scores == dependency_scores(found, list(bank["dev"]))
    assert parse(model, tokenizer, bank["dev"]["words"], batch_size=4) == found


def test_words_left_out_are_whole_words(tokenizer, bank):
    labels = Labels.of([bank["train"]])
    model = small(labels, tokenizer, word_dropout=0.5).train()
    batch = ParserCollator(tokenizer.pad_token_id)(list(encode(bank["train"], tokenizer, labels)))
    ids, words = batch["input_ids"], batch["word_ids"]
    masked = model._without_some(ids, words) == tokenizer.mask_token_id
    assert not masked[words < 0].any() and 0.4 < float(masked[words >= 0].float().mean()) < 0.6
    for b, w in itertools.product(range(len(ids)), range(int(words.max()) + 1)):
        assert len({*masked[b][words[b] == w].tolist()}) <= 1
    with pytest.raises(ValueError, match="word_dropout needs mask_token_id"):
        DependencyParserConfig(word_dropout=0.1)


def trainer(tmp_path, bank, tokenizer, epochs, **options):
    labels = Labels.of([bank["train"]], [bank["dev"]])
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        num_train_epochs=epochs,
        learning_rate=5e-3,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        label_names=list(ANNOTATIONS),
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    return RobustTrainer(
        model=small(labels, tokenizer, pooling="mean", dropout=0.1),
        args=args,
        train_dataset=encode(bank["train"], tokenizer, labels),
        eval_dataset=encode(bank["dev"], tokenizer, labels),
        data_collator=ParserCollator(tokenizer.pad_token_id),
        preprocess_logits_for_metrics=decoded,
        compute_metrics=scorer(labels),
        sweep_options={"metric": "las"},
        **options,
    )


def test_epochs_and_runs_tokenize_a_sentence_once(tmp_path, monkeypatch):
    path, _ = folder(tmp_path, train=30, dev=10, test=1)
    banks = load_treebank(str(path))
    tokenizer = train_tokenizer(banks["train"]["words"], 120)
    calls = []
    kind = type(tokenizer)
    encoded = kind._encode_plus

    def counted(self, text, **options):
        if isinstance(text[0], list):  # sentences; a few words alone show what the tokenizer is like
            calls.append(len(text))
        return encoded(self, text, **options)

    monkeypatch.setattr(kind, "_encode_plus", counted)
    config = {"weights": {"bits": 8}, "activations": {"bits": 8}}
    run = trainer(tmp_path, banks, tokenizer, 3, robustq=config, sweep=["trained", "w4a8"])
    first = sum(calls)
    assert first == 30 + 10
    run.train()
    assert sum(calls) == first
    rows = run.sweep_callback.sweeps[-1].rows
    assert len(run.sweep_callback.sweeps) == 3 and {"upos", "uas", "las", "loss"} == rows[0].metrics.keys()
    assert run.state.log_history[-2]["eval_worst"] == min(row.metrics["las"] for row in rows)
    trainer(tmp_path, load_treebank(str(path)), tokenizer, 1, robustq=config, sweep=())
    assert sum(calls) == first


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # udtools leaves files open
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_parser_learns_the_grammar_and_writes_what_the_official_evaluator_reads(tmp_path):
    udeval = pytest.importorskip("udtools.udeval")
    path, rows = folder(tmp_path, train=300, dev=60, test=1)
    bank = load_treebank(str(path))
    tokenizer = train_tokenizer(bank["train"]["words"], 120)
    run = trainer(tmp_path, bank, tokenizer, 12, robustq={}, sweep=())
    run.train()
    metrics = run.evaluate()
    assert metrics["eval_upos"] > 0.97 and metrics["eval_las"] > 0.7
    file = path / "en_made-ud-dev.conllu"
    made = parse(run.model, tokenizer, [row["words"] for row in rows["dev"]])
    annotated = [[row[name] for row in made] for name in ANNOTATIONS]
    write_conllu(tmp_path / "ours.conllu", read_conllu(file), *annotated)
    assert [rows_of(one)["heads"] for one in read_conllu(tmp_path / "ours.conllu")] == annotated[1]
    official = udeval.evaluate(*(udeval.load_conllu_file(str(one)) for one in (file, tmp_path / "ours.conllu")))
    for ours, theirs in (("upos", "UPOS"), ("uas", "UAS"), ("las", "LAS")):
        assert metrics[f"eval_{ours}"] == pytest.approx(official[theirs].f1)
    json.dumps(made)
