"""Five steps and a sweep on a tiny BERT without dropout; run by `accelerate launch` with any number of processes.

accelerate launch --config_file <config> tests/distributed/train.py OUT
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import TrainerCallback, TrainingArguments

from hf_robustq import RobustTrainer
from hf_robustq.metrics import compute_accuracy
from tests.test_trainer import Rows
from tests.zoo import bert, tokens

CONFIG = {
    "regularizers": {"kure": {"strength": 0.5}},
    "weights": {"bits": 8},
    "activations": {"bits": 8},
    "calibration_samples": 8,
}


class KeepGradients(TrainerCallback):
    """The gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.gradients = {n: p.grad.clone() for n, p in kwargs["model"].named_parameters() if p.grad is not None}


def main(out: Path) -> None:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(0)
    args = TrainingArguments(
        output_dir=str(out / "run"), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=5,
        per_device_train_batch_size=8 // processes, per_device_eval_batch_size=4, optim="sgd", learning_rate=0.05,
        max_grad_norm=0.0, logging_steps=1, eval_strategy="steps", eval_steps=5, dataloader_pin_memory=False,
        average_tokens_across_devices=False,  # BERT takes a mean over its own batch, which this would double
    )  # fmt: skip
    assert args.world_size == processes
    keep = KeepGradients()
    trainer = RobustTrainer(
        model=bert(), args=args, train_dataset=Rows(tokens(labels=3, batch=40)),
        eval_dataset=Rows(tokens(labels=3, batch=13)), robustq=CONFIG, sweep=["fp", "w4", "w3a4", "trained"],
        compute_metrics=compute_accuracy, callbacks=[keep],
    )  # fmt: skip
    trainer.train()
    if trainer.is_world_process_zero():
        state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        torch.save({"state": state, "gradients": keep.gradients}, out / "end.pt")
        rows = [row for sweep in trainer.sweep_callback.sweeps for row in sweep.to_dict()["rows"]]
        logs = {k: v for log in trainer.state.log_history for k, v in log.items() if k in ("kurtosis", "kure")}
        (out / "end.json").write_text(json.dumps({"rows": rows, "logs": logs}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
