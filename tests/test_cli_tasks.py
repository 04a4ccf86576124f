"""Every task of the command line on a tiny model, its figures against a forward of the float model row by row."""

import json
import math
import re

import datasets
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_robustq.cli import main
from tests.test_cli import rows

WORDS = [f"w{i}" for i in range(30)]
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<cls>", "sep_token": "<sep>", "mask_token": "<m>"}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SMALL = ["--calibration_samples", "8", "--batch_size", "4", "--settings", "w4"]


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word, and one each side of a hyphen; <cls> and <sep> around it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), "-", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    frame = [("<cls>", vocabulary["<cls>"]), ("<sep>", vocabulary["<sep>"])]
    both = "<cls> $A <sep> $B:1 <sep>:1"
    made.post_processor = processors.TemplateProcessing(single="<cls> $A <sep>", pair=both, special_tokens=frame)
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)


def bert(head, **options):
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=36, max_position_embeddings=16, **SIZES, **options)
    return getattr(transformers, f"BertFor{head}")(config).eval()


def drawn(count, low, high, seed=0):
    rng = np.random.default_rng(seed)
    return [[str(word) for word in rng.choice(WORDS, rng.integers(low, high))] for _ in range(count)]


def saved(folder, model, *parts, train, validation):
    """The model with its tokenizer or processor, and the dataset beside it: the words of a command before its flags."""
    for part in (model, *parts):
        part.save_pretrained(folder / "model")
    for split, columns in (("train", train), ("validation", validation)):
        (folder / "data").mkdir(exist_ok=True)
        if isinstance(columns, datasets.Dataset):
            columns.to_parquet(str(folder / "data" / f"{split}.parquet"))
        else:
            keys = list(columns)
            lines = [dict(zip(keys, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            (folder / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [str(folder / "model"), "--data", str(folder / "data")]


def swept(folder, command, *flags):
    """{setting: row} of a sweep."""
    main(["sweep", *command, "--out", str(folder / "out"), *SMALL, *flags])
    found = {setting: row for (_, setting), row in rows(folder / "out").items()}
    assert found["fp"]["loss"] != found["w4"]["loss"]
    return found


def chunks(tags):
    """conlleval's: where a chunk starts, and where the next one or an O ends it."""
    tags = ["O", *tags, "O"]
    starts = [
        i
        for i in range(1, len(tags))
        if tags[i] != "O" and (tags[i][0] == "B" or tags[i - 1] == "O" or tags[i - 1][2:] != tags[i][2:])
    ]
    ends = [i for i in range(1, len(tags)) if tags[i - 1] != "O" and (tags[i] == "O" or i in starts)]
    return {(tags[start][2:], start, end) for start, end in zip(starts, ends, strict=True)}


TAGS = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]


@pytest.mark.parametrize("named", [True, False], ids=["tags of the model", "tags of the dataset"])
def test_token_classification(tokenizer, tmp_path, caplog, named):
    """Words of several tokens; a row that is cut; tags by the names of the model, or of the dataset."""
    names = dict(enumerate(TAGS))
    model = bert("TokenClassification", **({"id2label": names} if named else {"num_labels": 5}))
    texts = [[f"{word}-{word}" if i % 3 else word for i, word in enumerate(text)] for text in drawn(12, 2, 8)]
    rng = np.random.default_rng(1)
    tags = [rng.choice(TAGS if named else 5, len(text)).tolist() for text in texts]
    both = {"tokens": texts, "tags": tags}
    if not named:
        kind = datasets.Features(
            {"tokens": datasets.List(datasets.Value("string")), "tags": datasets.List(datasets.ClassLabel(names=TAGS))}
        )
        both = datasets.Dataset.from_dict(both, features=kind)
    command = saved(tmp_path, model, tokenizer, train=both, validation=both)
    flags = ["--text_column_name", "tokens", "--label_column_name", "tags"] if named else []
    found = swept(tmp_path, command, *flags)
    right = words = lost = cut = 0
    ours, gold = set(), set()
    for number, (text, own) in enumerate(zip(texts, tags, strict=True)):
        own = own if named else [TAGS[tag] for tag in own]
        ids = tokenizer(" ".join(text))["input_ids"]
        ids = ids if len(ids) <= 16 else [*ids[:15], ids[-1]]
        first = 1 + np.cumsum([0, *(1 + 2 * ("-" in word) for word in text)])[:-1]
        kept = int((first < len(ids) - 1).sum())
        lost, cut = lost + len(text) - kept, cut + (kept < len(text))
        with torch.no_grad():
            said = model(torch.tensor([ids])).logits[0, first[:kept]].argmax(-1)
        said = [TAGS[tag] for tag in said]
        right, words = right + sum(a == b for a, b in zip(said, own, strict=False)), words + kept
        ours |= {(number, *chunk) for chunk in chunks(said)}
        gold |= {(number, *chunk) for chunk in chunks(own[:kept])}
    same = len(ours & gold)
    assert lost and same and f"{cut} of 12 rows are longer than 16 tokens: their last {lost} words" in caplog.text
    assert found["fp"]["accuracy"] == pytest.approx(right / words)
    expected = {"f1": 2 * same / (len(ours) + len(gold)), "precision": same / len(ours), "recall": same / len(gold)}
    assert {key: found["fp"][key] for key in expected} == pytest.approx(expected)
    assert (tmp_path / "out" / "table.md").read_text().endswith(f"| {100 * found['w4']['f1']:.2f} |\n")
    if named:
        analysis = ["analyze", *command, "--out", str(tmp_path / "a.json"), *SMALL, "--parts", "sensitivity", *flags]
        main(analysis)
        whole = json.loads((tmp_path / "a.json").read_text())["settings"]["w4"]["sensitivity"][""]
        for key, setting in (("only", "fp"), ("without", "w4")):
            assert whole[key] == pytest.approx({name: found[setting][name] for name in whole[key]}, rel=1e-5)


def test_tags_that_are_no_entities_have_an_accuracy_only(tokenizer, tmp_path):
    model = bert("TokenClassification", id2label={0: "NOUN", 1: "VERB"})
    both = {"tokens": drawn(8, 4, 8), "tags": []}
    both["tags"] = [[len(word) % 2 for word in text] for text in both["tokens"]]
    found = swept(tmp_path, saved(tmp_path, model, tokenizer, train=both, validation=both))
    assert "accuracy" in found["fp"] and "f1" not in found["fp"]


def test_masked_language_models(tokenizer, tmp_path, caplog):
    from hf_robustq.data.texts import masked_text

    model = bert("MaskedLM")
    train, validation = ({"text": [" ".join(text) for text in drawn(40, 4, 9, seed)]} for seed in (0, 1))
    command = saved(tmp_path, model, tokenizer, train=train, validation=validation)
    found = swept(tmp_path, command, "--seed", "3", "--bits", "16", "--methods", "absmax", "percentile")
    assert re.search(r"the last \d+ tokens fill no block of 16 and are not measured", caplog.text)
    split = masked_text(str(tmp_path / "data"), tokenizer, length=16, seed=3)[1].with_format("torch")
    ids, labels = split["input_ids"][:], split["labels"][:]
    with torch.no_grad():
        logits = model(ids).logits[labels != -100]
    loss = float(F.cross_entropy(logits, labels[labels != -100]))
    assert found["fp"]["loss"] == pytest.approx(loss, rel=1e-5)
    for setting in ("w16@absmax", "w16@percentile"):  # the data is read again for each method, with the same masks
        assert found[setting]["loss"] == pytest.approx(loss, rel=1e-3)
    assert found["fp"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["fp"]["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels[labels != -100]).float().mean()))
    joined = [token for text in validation["text"] for token in tokenizer(text)["input_ids"]]
    whole = torch.tensor(joined[: len(joined) // 16 * 16]).view(-1, 16)
    assert torch.equal(torch.where(labels == -100, ids, labels), whole)  # all else is the text


def test_masks_are_berts_and_depend_on_the_seed_alone(tokenizer, tmp_path):
    from hf_robustq.data.texts import masked_text

    both = {"text": [" ".join(text) for text in drawn(400, 14, 15)]}
    saved(tmp_path, bert("MaskedLM"), train=both, validation=both)
    found = [masked_text(str(tmp_path / "data"), tokenizer, length=16, seed=seed)[1] for seed in (0, 0, 1)]
    ids, labels = (np.array(found[0][key][:]) for key in ("input_ids", "labels"))
    assert found[0]["input_ids"][:] == found[1]["input_ids"][:] != found[2]["input_ids"][:]
    chosen = labels != -100
    assert abs(chosen.sum() / (labels.size - 2 * 400) - 0.15) < 0.02  # never <cls> and <sep>
    masked, kept = (ids == tokenizer.mask_token_id)[chosen].mean(), (ids == labels)[chosen].mean()
    assert abs(masked - 0.8) < 0.04 and abs(kept - 0.1) < 0.04


def test_sequence_to_sequence(tokenizer, tmp_path, caplog):
    """BART, which is a masked language model in transformers' tables too."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32)
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    config = BartConfig(vocab_size=36, d_model=16, max_position_embeddings=12, **sizes, **special)
    model = BartForConditionalGeneration(config).eval()
    sources, targets = ([" ".join(text) for text in drawn(10, 3, 13, seed)] for seed in (0, 1))
    both = {"translation": [{"en": a, "fr": b} for a, b in zip(sources, targets, strict=True)]}
    command = saved(tmp_path, model, tokenizer, train=both, validation=both)
    with pytest.raises(SystemExit, match="name source and target with --text_column_name, of translation.en, transl"):
        swept(tmp_path, command)
    found = swept(tmp_path, command, "--text_column_name", "translation.en", "translation.fr")
    loss = right = tokens = lost = 0
    for source, target in zip(sources, targets, strict=True):
        ids, labels = (tokenizer(text, truncation=True, max_length=12, return_tensors="pt").input_ids
                       for text in (source, target))  # fmt: skip
        lost += sum(max(len(text.split()) - 10, 0) for text in (source, target))
        with torch.no_grad():
            logits = model(input_ids=ids, labels=labels).logits[0]
        loss += float(F.cross_entropy(logits, labels[0], reduction="sum"))
        right, tokens = right + int((logits.argmax(-1) == labels[0]).sum()), tokens + labels.numel()
    assert lost and f"longer than 12 tokens: their last {lost} tokens are not measured" in caplog.text
    assert found["fp"]["loss"] == pytest.approx(loss / tokens, rel=1e-4)
    assert found["fp"]["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert found["fp"]["accuracy"] == pytest.approx(right / tokens)


def answered(model, tokenizer, question, context, null=False):
    """The best span of at most 30 words over all windows of 16 tokens that overlap by 4, by trying all; or ""."""
    size = 16 - len(question) - 3
    best, nothing = (-math.inf, ""), math.inf
    for start in range(0, len(context), size - 4):
        part = context[start : start + size]
        encoded = tokenizer(" ".join(question), " ".join(part), return_tensors="pt")
        with torch.no_grad():
            output = model(**encoded)
        begins, ends = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        nothing = min(nothing, begins[0] + ends[0])
        shift = len(question) + 2
        for i in range(len(part)):
            for j in range(i, len(part)):
                best = max(best, (begins[shift + i] + ends[shift + j], " ".join(part[i : j + 1])))
        if start + size >= len(context):
            break
    return "" if null and nothing > best[0] else best[1]


def test_question_answering(tokenizer, tmp_path, capsys):
    """Contexts of several windows; some questions that have no answer."""
    model = bert("QuestionAnswering")
    with torch.no_grad():  # so that the first position wins over some spans
        first = model.bert(**tokenizer("w1 w2", "w3 w4", return_tensors="pt")).last_hidden_state[0, 0]
        model.qa_outputs.weight.add_(0.007 * first)
    asked, contexts = drawn(9, 2, 4, 0), drawn(9, 6, 30, 1)
    plain = [answered(model, tokenizer, *pair) for pair in zip(asked, contexts, strict=True)]
    null = [answered(model, tokenizer, *pair, null=True) for pair in zip(asked, contexts, strict=True)]
    assert "" in null and any(null)
    golds = [
        [text] if i % 3 == 0 else [context[0], f"the {' '.join(context[:3])}!"]
        for i, (text, context) in enumerate(zip(plain, contexts, strict=True))
    ]

    def columns(answers):
        questions, texts = ([" ".join(words) for words in all_] for all_ in (asked, contexts))
        begins = [[max(text.find(gold), 0) for gold in own] for text, own in zip(texts, answers, strict=True)]
        both = [{"text": own, "answer_start": begin} for own, begin in zip(answers, begins, strict=True)]
        return {"question": questions, "context": texts, "answers": both}

    def scored(ours, answers):
        ours, answers = ours.split(), [re.sub("the |!", "", gold).split() for gold in answers] or [[]]
        common = [sum(min(ours.count(word), gold.count(word)) for word in {*ours}) for gold in answers]
        f1 = [2 * n / (len(ours) + len(gold)) if ours or gold else 1.0 for n, gold in zip(common, answers, strict=True)]
        return max(f1), float(ours in answers)

    command = saved(tmp_path, model, tokenizer, train=columns(golds), validation=columns(golds))
    found = swept(tmp_path, command)["fp"]
    f1, exact = np.mean([scored(*pair) for pair in zip(plain, golds, strict=True)], axis=0)
    assert 0 < exact < f1 < 1 and found["f1"] == pytest.approx(f1) and found["exact_match"] == pytest.approx(exact)
    counts = re.search(r"9 questions in (\d+) windows of at most 16 tokens", capsys.readouterr().out)
    assert found["samples"] == 9 and int(counts[1]) > 9 and found["subset"] == "all"

    golds = [[] if i in (0, 4) or (not null[i] and i % 2) else own for i, own in enumerate(golds)]
    (tmp_path / "2").mkdir()
    command = saved(tmp_path / "2", model, tokenizer, train=columns(golds), validation=columns(golds))
    found = swept(tmp_path / "2", command)["fp"]
    f1, exact = np.mean([scored(*pair) for pair in zip(null, golds, strict=True)], axis=0)
    assert found["f1"] == pytest.approx(f1) and found["exact_match"] == pytest.approx(exact)

    main(["sweep", *command, "--out", str(tmp_path / "few"), *SMALL, "--max_samples", "5"])
    few = rows(tmp_path / "few")[command[0], "fp"]
    chosen = torch.randperm(9, generator=torch.Generator().manual_seed(0))[:5].tolist()
    unanswerable = any(not golds[i] for i in chosen)
    f1 = np.mean([scored((null if unanswerable else plain)[i], golds[i])[0] for i in chosen])
    assert few["f1"] == pytest.approx(f1) and few["samples"] == 5 and few["subset"] == "5 of 9, seed 0"
    with pytest.raises(SystemExit, match="a question has 3 tokens, and 0 go into a window of 5 with a context"):
        swept(tmp_path, [*command, "--block_size", "5"], "--out", str(tmp_path / "short"))


METRICS = """
import numpy as np


def preprocess_logits_for_metrics(logits, labels):
    return logits[0] if isinstance(logits, tuple) and not isinstance(logits[0], dict) else logits


def mean(predicted):
    kept = predicted.predictions[predicted.predictions != -100]
    labels = predicted.label_ids[predicted.label_ids != -100]
    return {"wer": kept.mean(), "labels": np.array(labels.sum()), "names": ["a"]}


def boxes(batches):
    logits = np.concatenate([batch[1] for batch in batches.predictions])
    objects = [labels["class_labels"] for batch in batches.label_ids for labels in batch]
    return {"mean": float(logits.mean()), "objects": sum(map(len, objects)), "images": len(objects)}


def broken(predicted):
    return predicted.missing


def empty(predicted):
    return {}


def clash(predicted):
    return {"weights": 1.0}
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(METRICS)
    return lambda name: ["--metric", f"{tmp_path / 'mine.py'}:{name}"]


def speech_model(kind, folder):
    """(model, its processor) of 16,000 samples a second."""
    import transformers

    torch.manual_seed(0)
    if kind == "Whisper":
        sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
        sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
        sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32)
        sizes |= {"vocab_size": 20, "num_mel_bins": 16, "d_model": 16, "max_source_positions": 50}
        special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 9)
        config = transformers.WhisperConfig(max_target_positions=32, decoder_start_token_id=10, **sizes, **special)
        more = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
        vocabulary = {token: i for i, token in enumerate([*"abcdefgh", "\u0120", *more])}
        tokenizer = transformers.WhisperTokenizer(vocab=vocabulary, merges=[], pad_token=more[0])
        extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
        model = transformers.WhisperForConditionalGeneration(config).eval()
        return model, transformers.WhisperProcessor(extractor, tokenizer)
    sizes = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, **SIZES}
    config = transformers.Wav2Vec2Config(vocab_size=8, pad_token_id=0, num_labels=3, ctc_zero_infinity=True, **sizes)
    model = getattr(transformers, f"Wav2Vec2For{kind}")(config).eval()
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    if kind != "CTC":
        return model, extractor
    (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(["<pad>", "<unk>", "|", *"abcde"])}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), bos_token=None, eos_token=None, **SPEECH)
    return model, transformers.Wav2Vec2Processor(extractor, tokenizer)


SPEECH = {"pad_token": "<pad>", "unk_token": "<unk>", "word_delimiter_token": "|"}


@pytest.mark.parametrize("kind", ["CTC", "SequenceClassification", "Whisper"])
def test_speech_with_a_metric_of_ones_own(kind, tmp_path, mine, caplog, capsys):
    """Sounds of several lengths, with a class, or with a text."""
    model, processor = speech_model(kind, tmp_path)
    rng = np.random.default_rng(0)
    most = 20_000 if kind == "Whisper" else 1_200
    sounds = [rng.normal(size=length).astype(np.float32).tolist() for length in rng.integers(600, most, 8)]
    texts = ["".join(rng.choice([*"abcde"], count)) for count in rng.integers(1, 5, 8)]
    classes = rng.integers(0, 3, 8).tolist()
    classes[0] = 2
    both = {"sound": sounds, **({"label": classes} if kind == "SequenceClassification" else {"text": texts})}
    command = saved(tmp_path, model, processor, train=both, validation=both)
    with pytest.raises(SystemExit, match="which has no metric here: give yours with --metric module:function"):
        swept(tmp_path, command)
    found = swept(tmp_path, command, *mine("mean"))
    assert "sound is taken to have 16000 samples a second" in caplog.text
    assert ("sounds are cut at 1 seconds" in caplog.text) == (kind == "Whisper")
    printed = capsys.readouterr().out
    assert "left out, as they are no numbers: names" in printed and re.search(r"fp +wer -?\d", printed)
    extractor, logits, labels = getattr(processor, "feature_extractor", processor), [], 0
    for i in (0, 4):
        padding = {} if kind == "Whisper" else {"padding": True}
        inputs = extractor(sounds[i : i + 4], sampling_rate=16_000, return_tensors="pt", **padding)
        if kind == "SequenceClassification":
            own = [[number] for number in classes[i : i + 4]]
        else:  # Whisper's decoder puts the first token itself
            own = [processor.tokenizer(text).input_ids[kind == "Whisper" :] for text in texts[i : i + 4]]
        labels += sum(map(sum, own))
        if kind == "Whisper":
            inputs["labels"] = torch.tensor([ids + [-100] * (max(map(len, own)) - len(ids)) for ids in own])
        with torch.no_grad():
            logits.append(model(**inputs).logits.flatten())
    assert found["fp"]["labels"] == labels
    assert found["fp"]["wer"] == pytest.approx(float(torch.cat(logits).mean()), rel=1e-3)


def test_object_detection_with_a_metric_of_ones_own(tmp_path, mine):
    """Images of several sizes; more objects in a batch than images."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    sizes = {"image_size": [32, 32], "patch_size": 16, "num_detection_tokens": 5, "num_labels": 3}
    model = YolosForObjectDetection(YolosConfig(**{**SIZES, **sizes})).eval()
    processor = YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 48})
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (int(high), 40, 3)).astype(np.uint8) for high in rng.integers(30, 50, 8)]
    counts = rng.integers(0, 4, 8)
    counts[0] = 5
    objects = [{"bbox": [[1.0, 2.0, 10.0, 8.0]] * n, "category": [1] * n} for n in counts]
    kind = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(INTEGER)}
    features = datasets.Features({"picture": datasets.Image(), "objects": kind})
    both = datasets.Dataset.from_dict({"picture": images, "objects": objects}, features=features)
    command = saved(tmp_path, model, processor, train=both, validation=both)
    found = swept(tmp_path, command, *mine("boxes"))["fp"]
    assert found["objects"] == counts.sum() and found["images"] == found["samples"] == 8
    with torch.no_grad():
        batches = [processor(images=images[i : i + 4], return_tensors="pt")["pixel_values"] for i in (0, 4)]
        logits = torch.cat([model(pixel_values=batch).logits for batch in batches])
    assert found["mean"] == pytest.approx(float(logits.mean()), rel=1e-4)


INTEGER = datasets.Value("int64")


def test_what_is_wrong_is_one_line(tokenizer, tmp_path, mine, monkeypatch):
    import transformers

    model = bert("TokenClassification", num_labels=2)
    both = {"tokens": drawn(8, 4, 8), "tags": []}
    both["tags"] = [[len(word) % 2 for word in text] for text in both["tokens"]]
    command = saved(tmp_path, model, tokenizer, train=both, validation=both)

    def fails(why, *flags, words=command):
        with pytest.raises(SystemExit, match=why) as info:
            main(["sweep", *words, "--out", str(tmp_path / "out"), *SMALL, *flags])
        assert "\n" not in str(info.value)

    fails("--metric takes module:function or path/to/file.py:function, got 'mean'", "--metric", "mean")
    fails("no_such cannot be imported: ModuleNotFoundError", "--metric", "no_such:mean")
    fails("nothing.py cannot be imported: FileNotFoundError: there is no such file", "--metric", "nothing.py:mean")
    fails("unknown function of .*mine.py 'meen': did you mean 'mean'", *mine("meen"))
    fails("mine.py:broken failed: AttributeError: .*missing", *mine("broken"))
    fails("mine.py:empty returned no number", *mine("empty"))
    fails("mine.py:clash names what rows have already: rename weights", *mine("clash"))
    fails("tags is not a column of type list of string: choose from tokens", "--text_column_name", "tags")
    fails("--text_column_name words is not a column of type list of string", "--text_column_name", "words")
    fails("is for token classification: name a dataset with --data", words=command[:1])
    monkeypatch.chdir(tmp_path)
    main(["sweep", *command, "--out", str(tmp_path / "module"), *SMALL, "--metric", "mine:mean"])
    assert "wer" in rows(tmp_path / "module")[command[0], "fp"]

    config = transformers.BertConfig(vocab_size=36, **SIZES)
    transformers.BertForPreTraining(config).save_pretrained(tmp_path / "pretraining")
    fails("is a BertForPreTraining: this command knows image", words=[str(tmp_path / "pretraining"), *command[1:]])
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bare")
    fails("bare has no tokenizer: save it beside the model", words=[str(tmp_path / "bare"), *command[1:]])
    both["tags"][3] = [0, 5]
    saved(tmp_path, model, tokenizer, train=both, validation=both)
    fails("a row has . tokens but 2 tags: w")
    both["tags"][3] = [5] * len(both["tokens"][3])
    saved(tmp_path, model, tokenizer, train=both, validation=both)
    fails("tags has 5, and the tags of the model are LABEL_0, LABEL_1: choose another --label_column_name")
    answers = ["--text_column_name", "a", "b"]
    saved(tmp_path, bert("QuestionAnswering"), tokenizer, train=both, validation=both)
    fails("has no column question: name question and context with --text_column_name")
    fails("has no column a: name question and context with --text_column_name", *answers)
