"""Sequence classification as anyone would write it; the lines that end in `# robustq` are all that is added.

    accelerate launch recipes/text_classification.py --model_name_or_path almanach/camembert-base \
        --dataset_name <hub id or folder> --output_dir outputs/classifier --num_train_epochs 3 --eval_strategy epoch
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from hf_robustq import RobustTrainer as Trainer  # robustq # noqa: F811

ROBUSTQ = {"regularizers": {"kure": {"strength": 1.0}}, "weights": {"bits": 8}, "activations": {"bits": 8}}  # robustq


@dataclass
class ScriptArguments:
    model_name_or_path: str
    dataset_name: str
    text_column: str = "text"
    label_column: str = field(default="label", metadata={"help": "classes, as numbers from 0"})
    eval_split: str = "test"


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def main() -> None:
    script, args = HfArgumentParser([ScriptArguments, TrainingArguments]).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    splits = load_dataset(script.dataset_name)
    if script.label_column != "labels":
        splits = splits.rename_column(script.label_column, "labels")
    splits = splits.map(lambda rows: tokenizer(rows[script.text_column], truncation=True), batched=True)
    classes = 1 + max(max(split["labels"]) for split in splits.values())
    model = AutoModelForSequenceClassification.from_pretrained(script.model_name_or_path, num_labels=classes)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits[script.eval_split],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
        robustq=ROBUSTQ,  # robustq
        sweep=["fp", "trained", "w4a8", "w3a8"],  # robustq
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()  # robustq


if __name__ == "__main__":
    main()
