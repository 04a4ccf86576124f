"""Token classification as anyone would write it; the lines that end in `# robustq` are all that is added.

    accelerate launch recipes/token_classification.py --model_name_or_path almanach/camembert-base \
        --dataset_name <hub id or folder> --output_dir outputs/tagger --num_train_epochs 3 --eval_strategy epoch

The dataset has a column of words and one of their tags, as text, or as classes (numbers).
Words beyond the model's positions are neither learned nor scored; how many there are is printed.
"""

from dataclasses import dataclass
from typing import Any

from datasets import load_dataset
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from hf_robustq import RobustTrainer as Trainer  # robustq # noqa: F811

ROBUSTQ = {"weights": {"method": "lsq", "bits": 4}, "activations": {"method": "lsq", "bits": 8}}  # robustq


@dataclass
class ScriptArguments:
    model_name_or_path: str
    dataset_name: str
    words_column: str = "tokens"
    tags_column: str = "tags"
    eval_split: str = "test"


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    scored = predicted.label_ids != -100
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids)[scored].mean())}


def main() -> None:
    script, args = HfArgumentParser([ScriptArguments, TrainingArguments]).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    splits = load_dataset(script.dataset_name)
    names = sorted({tag for split in splits.values() for tags in split[script.tags_column] for tag in tags})

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        """The tag of a word is that of its first subword; the others, and special ones, have none."""
        encoded = tokenizer(rows[script.words_column], is_split_into_words=True, truncation=True)
        encoded["labels"] = []
        for i, tags in enumerate(rows[script.tags_column]):
            words = encoded.word_ids(i)
            first = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
            encoded["labels"].append(
                [names.index(tags[word]) if begins else -100 for word, begins in zip(words, first, strict=True)]
            )
        return encoded

    words = sum(len(tags) for split in splits.values() for tags in split[script.tags_column])
    splits = splits.map(encode, batched=True, remove_columns=splits["train"].column_names)
    kept = sum(label != -100 for split in splits.values() for labels in split["labels"] for label in labels)
    print(f"{words - kept} of {words} words have no place in the model's input")
    model = AutoModelForTokenClassification.from_pretrained(script.model_name_or_path, num_labels=len(names))
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits[script.eval_split],
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
        robustq=ROBUSTQ,  # robustq
        scale_lr=1e-3,  # robustq
        sweep=["fp", "trained", "w8a8", "w4a8"],  # robustq
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()  # robustq


if __name__ == "__main__":
    main()
