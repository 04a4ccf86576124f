"""Tagging and parsing: flags, treebanks and parser, run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_robustq.config import check_known
from hf_robustq.recipe.run import Run, RunArguments
from hf_robustq.sweep import Sweep

CAMEMBERT = "almanach/camembert-base"


@dataclass
class ParserArguments(RunArguments):
    """Flags of every recipe that trains a parser."""

    preset: str = field(default="smoke", metadata={"help": "of recipes/configs: parser_<preset>.yaml"})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "encoder or parser, a folder or Hub id; default: an encoder from scratch"}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "default: the model's, or one trained here"})
    dataset_name: list[str] | None = field(
        default=None, metadata={"help": "treebanks, trained on jointly: folders or files of CoNLL-U, Hub ids"}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of a Hub dataset"})
    vocab_size: int = field(default=2000, metadata={"help": "of a tokenizer trained here"})
    encoder_type: str = field(default="camembert", metadata={"help": "model type of an encoder from scratch"})
    encoder: str = field(
        default="hidden_size=128 num_hidden_layers=3 num_attention_heads=4 intermediate_size=512",
        metadata={"help": "its config: name=number ..."},
    )
    pooling: str = field(default="first", metadata={"help": "of a word's subwords: first or mean"})
    arc_size: int = 400
    label_size: int = 100
    dropout: float = 0.33
    word_dropout: float = field(default=0.0, metadata={"help": "share of words masked in training"})


class ParserRun(Run):
    """Variants of a parser: measured on the development sets at every evaluation, on the test sets at the end."""

    metrics = ("las", "upos")
    float_sweep = ("fp",)

    def __init__(self, recipe: ParserArguments, args: Any) -> None:
        from hf_robustq.parsing import ANNOTATIONS

        args.label_names = list(ANNOTATIONS)
        super().__init__(recipe, args)

    def task(self) -> str:
        from datasets import concatenate_datasets

        from hf_robustq.parsing import Labels, encode, longest

        with self.args.main_process_first(local=False, desc="reading treebanks"):
            banks = treebanks(self.recipe)
            train = [bank["train"] for bank in banks.values()]
            others = [bank[split] for bank in banks.values() for split in ("dev", "test") if split in bank]
            labels = Labels.of(train)
            self.model, self.tokenizer, source = parser(self.recipe, labels, train)
            labels = Labels(tuple(self.model.config.upos), tuple(self.model.config.deprels)).and_of([*train, *others])
            limit = longest(self.model.encoder, self.tokenizer)
            encoded = {
                name: {split: encode(rows, self.tokenizer, labels, limit) for split, rows in bank.items()}
                for name, bank in banks.items()
            }
        self.labels, self.encoded = labels, encoded
        self.train = concatenate_datasets([bank["train"] for bank in encoded.values()])
        dev = {name: bank["dev"] for name, bank in encoded.items() if "dev" in bank}
        self.evaluation = (dev or None) if len(encoded) > 1 else next(iter(dev.values()), None)
        if self.evaluation is None and self.args.eval_strategy != "no":
            raise ValueError(
                f"no sentences to evaluate on in {', '.join(banks)}: add a file named like fr_partut-ud-dev.conllu, or "
                "say --eval_strategy no"
            )
        self.dataset = ", ".join(banks)
        self.dataset_tags = tuple(name for name in self.recipe.dataset_name or () if not Path(name).exists())
        return source

    def options(self) -> dict[str, Any]:
        from hf_robustq.parsing import ParserCollator, decoded, scorer

        return {
            "train_dataset": self.train,
            "eval_dataset": self.evaluation,
            "data_collator": ParserCollator(self.tokenizer.pad_token_id),
            "processing_class": self.tokenizer,
            "preprocess_logits_for_metrics": decoded,
            "compute_metrics": scorer(self.labels),
            "sweep_options": {"metric": "las"},
        }

    def finish(self, trainer: Any) -> None:
        """Sweep the test sets too."""
        if self.evaluation is not None:
            super().finish(trainer)
        for name, bank in self.encoded.items():
            if "test" in bank:
                trainer.evaluate(bank["test"], metric_key_prefix=self.prefix("test", name))

    def prefix(self, split: str, name: str) -> str:
        """Of a treebank's metrics: its name only where there are several."""
        return split if len(self.encoded) == 1 else f"{split}_{name}"

    def tested(self, trainer: Any) -> dict[str, Sweep]:
        """The last sweep of each treebank's test set, of its development set where there is none, by name."""
        found = {}
        for name, bank in self.encoded.items():
            prefix = self.prefix("test" if "test" in bank else "eval", name)
            sweeps = [one for one in trainer.sweep_callback.sweeps if one.rows[0].dataset == prefix]
            if sweeps:
                found[name] = sweeps[-1]
        return found


def treebanks(arguments: ParserArguments) -> dict[str, Mapping[str, Any]]:
    """Rows of words of each treebank, by name; without any, sentences of a grammar."""
    from hf_robustq.parsing import load_treebank
    from hf_robustq.parsing.grammar import generated_treebank

    if not arguments.dataset_name:
        return {"generated": generated_treebank()}
    names = [Path(name).name.removesuffix(".conllu") for name in arguments.dataset_name]
    if len({*names}) < len(names):
        raise ValueError(f"two treebanks are called {max(names, key=names.count)}: rename one")
    banks = [load_treebank(name, arguments.dataset_config_name) for name in arguments.dataset_name]
    return dict(zip(names, banks, strict=True))


def parser(arguments: ParserArguments, labels: Any, train: list[Any]) -> tuple[Any, Any, str]:
    """(parser, tokenizer, source of its weights): a parser or an encoder that is given, or new ones."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    from hf_robustq.parsing import DependencyParser, DependencyParserConfig, check_tokenizer, train_tokenizer

    name = arguments.model_name_or_path
    options: dict[str, Any] = {key: getattr(arguments, key) for key in ("pooling", "arc_size", "label_size", "dropout")}
    options |= {"upos": labels.upos, "deprels": labels.deprels, "word_dropout": arguments.word_dropout}
    if name or arguments.tokenizer_name:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer_name or name, add_prefix_space=True)
        check_tokenizer(tokenizer, str(arguments.tokenizer_name or name))
    else:
        tokenizer = train_tokenizer((words for rows in train for words in rows["words"]), arguments.vocab_size)
    options["mask_token_id"] = tokenizer.mask_token_id
    if name is None:
        sizes = encoder_options(arguments)
        special = {f"{one}_token_id": getattr(tokenizer, f"{one}_token_id") for one in ("pad", "bos", "eos", "unk")}
        special |= {"cls_token_id": tokenizer.bos_token_id, "sep_token_id": tokenizer.eos_token_id}
        config = AutoConfig.for_model(arguments.encoder_type, vocab_size=len(tokenizer), **special, **sizes)
        return DependencyParser(DependencyParserConfig(config, **options)), tokenizer, "none, an encoder from scratch"
    if AutoConfig.from_pretrained(name).model_type == DependencyParserConfig.model_type:
        return AutoModel.from_pretrained(name), tokenizer, name
    return DependencyParser.from_encoder(name, **options), tokenizer, name


def encoder_options(arguments: ParserArguments) -> dict[str, Any]:
    """`--encoder` as a mapping; a name that the config of this type does not have is a `ValueError`."""
    from transformers import AutoConfig

    found = {}
    for pair in arguments.encoder.split():
        name, _, value = pair.partition("=")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"--encoder takes name=number, separated by spaces, got {pair!r}") from None
    check_known(found, AutoConfig.for_model(arguments.encoder_type).to_dict(), f"option of {arguments.encoder_type}")
    return found
