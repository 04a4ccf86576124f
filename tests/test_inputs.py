"""Texts, tokenizers and streams that are not as usual: measured all the same, or refused in one line."""

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset

from hf_robustq import RobustTrainer
from hf_robustq.cli import main
from hf_robustq.parsing import longest
from tests.test_cli_tasks import SIZES, SMALL, bert, drawn, saved, swept, tokenizer

__all__ = ["tokenizer"]  # a fixture


def fails(folder, why, command, *flags):
    with pytest.raises(SystemExit, match=why) as info:
        main(["sweep", *command, "--out", str(folder / "out"), *SMALL, *flags])
    assert "\n" not in str(info.value)


def without_padding(end="<end>"):
    """As GPT-2's: one special token, which no row has; no maximum length."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<end>", *(f"w{i}" for i in range(30))])}))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, padding_side="left")


def gpt2():
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2ForSequenceClassification(config).eval()


@torch.no_grad()
def test_a_decoder_without_a_padding_token(tmp_path, caplog):
    """Rows of several lengths, some of which are cut at the model's positions, against each by itself."""
    model, tokenizer = gpt2(), without_padding()
    assert tokenizer.model_max_length > 10**9 and tokenizer.pad_token is None
    texts = [" ".join(text) for text in drawn(20, 3, 16)]
    found = [model(torch.tensor([tokenizer(text)["input_ids"][:12]])).logits[0] for text in texts]
    labels = [int(logits.argmax()) for logits in found]
    labels[:5] = [1 - label for label in labels[:5]]
    both = {"text": texts, "label": labels}
    row = swept(tmp_path, saved(tmp_path, model, tokenizer, train=both, validation=both))["fp"]
    loss = torch.nn.functional.cross_entropy(torch.stack(found), torch.tensor(labels))
    assert row["accuracy"] == 15 / 20 and row["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert "has no padding token: rows are padded with <end>" in caplog.text
    assert "rows are longer than 12 tokens" in caplog.text


def test_no_token_to_pad_with_is_one_line(tmp_path):
    both = {"text": ["w1 w2"] * 8, "label": [0, 1] * 4}
    command = saved(tmp_path, gpt2(), without_padding(end=None), train=both, validation=both)
    fails(tmp_path, "the tokenizer of .* has no padding token: set its pad_token, and save it again", command)


def encoders():
    import transformers

    sizes = {"max_position_embeddings": 12, "vocab_size": 36, "pad_token_id": 1, **SIZES}
    for name in ("Bert", "Roberta", "MPNet", "Electra", "Longformer", "Luke"):
        own = {"attention_window": 4} if name == "Longformer" else {}
        own |= {"entity_vocab_size": 4, "entity_emb_size": 16} if name == "Luke" else {}
        yield name, getattr(transformers, f"{name}Config")(**sizes, **own)
    yield "GPT2", transformers.GPT2Config(vocab_size=36, n_positions=12, n_embd=16, n_layer=1, n_head=2)
    opt = {"word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt |= {"vocab_size": 36, "hidden_size": 16, "max_position_embeddings": 12, "pad_token_id": 1}
    yield "OPT", transformers.OPTConfig(**opt)
    yield "Mpt", transformers.MptConfig(vocab_size=36, d_model=16, n_heads=2, n_layers=1, max_seq_len=12)


ENCODERS = list(encoders())


@pytest.mark.parametrize(("name", "config"), ENCODERS, ids=[name for name, _ in ENCODERS])
@torch.no_grad()
def test_a_model_says_how_much_it_reads(name, config):
    """A row of so many tokens goes through; one more does not."""
    import transformers

    model = getattr(transformers, f"{name}Model")(config).eval()
    most = longest(model, without_padding())
    assert most in (10, 12)
    model(input_ids=torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        model(input_ids=torch.full((1, most + 1), 5))


def test_rows_without_a_text_are_named(tokenizer, tmp_path):
    texts = [" ".join(text) for text in drawn(8, 5, 9)]
    some = [*texts[:3], None, *texts[4:]]
    train = {"text": texts, "label": [0, 1] * 4}
    command = saved(
        tmp_path, bert("SequenceClassification"), tokenizer, train=train, validation={**train, "text": some}
    )
    why = (
        "row 3 of the validation split has no text .1 such rows.: leave them out, or name another .*--text_column_name"
    )
    fails(tmp_path, why, command)
    bert("MaskedLM").save_pretrained(tmp_path / "model")
    fails(tmp_path, why, command)
    fails(
        tmp_path, "--text_column_name title is not a column .* choose from text", command, "--text_column_name", "title"
    )
    gone = {"text": texts}
    for part in (gone, train):
        bert("SequenceClassification").save_pretrained(tmp_path / "model")
        command = saved(tmp_path, bert("SequenceClassification"), tokenizer, train=part, validation=gone)
        fails(tmp_path, "label", command)


@pytest.mark.parametrize("empty", ["train", "validation"])
def test_an_empty_split_is_named(empty, tokenizer, tmp_path):
    kind = datasets.Features({"text": datasets.Value("string"), "label": datasets.Value("int64")})
    full = datasets.Dataset.from_dict({"text": ["w1"] * 8, "label": [0, 1] * 4}, features=kind)
    splits = {"train": full, "validation": full, empty: full.select([])}
    command = saved(tmp_path, bert("SequenceClassification"), tokenizer, **splits)
    fails(tmp_path, f"data has an empty split, .*{empty}.*: leave its file out, or fill it", command)


def test_a_broken_file_is_one_line(tokenizer, tmp_path):
    both = {"text": ["w1 w2"] * 8, "label": [0, 1] * 4}
    command = saved(tmp_path, bert("SequenceClassification"), tokenizer, train=both, validation=both)
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "w1", "label": 0}\n{"text": ')
    fails(tmp_path, "data cannot be read: ", command)


class Once(IterableDataset):
    def __init__(self):
        self.rows = ({"input_ids": [5, 6, 7], "labels": i % 2} for i in range(8))

    def __iter__(self):
        yield from self.rows


class Iterator(Once):
    def __iter__(self):
        return self

    def __next__(self):
        return next(self.rows)


class Anew(IterableDataset):
    def __iter__(self):
        return iter([{"input_ids": [5, 6, 7], "labels": i % 2} for i in range(8)])


@pytest.mark.parametrize("stream", [Once, Iterator, Anew])
def test_calibration_does_not_eat_the_stream_that_training_needs(stream, tmp_path):
    from transformers import TrainingArguments, default_data_collator

    given = {"max_steps": 4, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "report_to": []}
    args = TrainingArguments(str(tmp_path), **given, use_cpu=True, disable_tqdm=True, save_strategy="no")

    def trained(**options):
        options |= {"args": args, "data_collator": default_data_collator, "sweep": ()}
        config = {"weights": {"bits": 8}, "activations": {"bits": 8}}
        trainer = RobustTrainer(bert("SequenceClassification"), robustq=config, train_dataset=stream(), **options)
        return trainer.train().global_step

    if stream is Anew:
        assert trained() == 4
        return
    with pytest.raises(ValueError, match="which can be read only once: pass a calibration_dataset"):
        trained()
    rows = datasets.Dataset.from_list([{"input_ids": [5, 6, 7], "labels": 0}] * 4)
    assert trained(calibration_dataset=rows) == 4
