"""A parser of random weights swept; run by `serve.py`: writes what it logs to OUT/metrics.json."""

import json
from pathlib import Path

import torch
from transformers import CamembertConfig, TrainingArguments

from hf_robustq import RobustTrainer
from hf_robustq.parsing import (
    ANNOTATIONS,
    DependencyParser,
    DependencyParserConfig,
    Labels,
    ParserCollator,
    decoded,
    encode,
    scorer,
    train_tokenizer,
)
from hf_robustq.parsing.grammar import generated_treebank


def main(arguments):
    out = Path(arguments[0])
    bank = generated_treebank(8, 21, 1)  # of sentences, the last batch is uneven
    labels = Labels.of([bank["train"]], [bank["dev"]])
    tokenizer = train_tokenizer(bank["train"]["words"], 100)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoder = CamembertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes, **off)
    config = DependencyParserConfig(encoder, labels.upos, labels.deprels, arc_size=16, label_size=8, dropout=0.0)
    args = TrainingArguments(
        output_dir=str(out / "run"),
        per_device_eval_batch_size=4,
        report_to="none",
        use_cpu=True,
        label_names=list(ANNOTATIONS),
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = RobustTrainer(
        model=DependencyParser(config),
        args=args,
        train_dataset=encode(bank["train"], tokenizer, labels),
        eval_dataset=encode(bank["dev"], tokenizer, labels),
        data_collator=ParserCollator(tokenizer.pad_token_id),
        preprocess_logits_for_metrics=decoded,
        compute_metrics=scorer(labels),
        robustq={"weights": {"bits": 8}, "calibration_samples": 8},
        sweep=["fp", "w4", "w3a4"],
        sweep_options={"metric": "las"},
    )
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        kept = {key: value for key, value in metrics.items() if key.endswith(("upos", "uas", "las"))}
        samples = [row.samples for row in trainer.sweep_callback.sweeps[-1].rows]
        (out / "metrics.json").write_text(json.dumps({**kept, "samples": samples}))
