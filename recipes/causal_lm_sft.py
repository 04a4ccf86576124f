"""Supervised fine-tuning with TRL as anyone would write it; the lines that end in `# robustq` are all that is added.

    pip install trl
    accelerate launch recipes/causal_lm_sft.py --model_name_or_path <hub id or folder> \
        --dataset_name <hub id or folder> --output_dir outputs/sft --num_train_epochs 1 --eval_strategy epoch

A dataset as TRL takes it: a column of texts, prompts and completions, or messages.
"""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from hf_robustq import RobustQMixin  # robustq

ROBUSTQ = {"regularizers": {"kure": {"strength": 0.1}}}  # robustq


class SFTTrainer(RobustQMixin, SFTTrainer):  # robustq
    """TRL's trainer with bit-width sweeps, here of the loss."""  # robustq


@dataclass
class ScriptArguments:
    model_name_or_path: str
    dataset_name: str
    eval_split: str = "test"


def main() -> None:
    script, args = HfArgumentParser([ScriptArguments, SFTConfig]).parse_args_into_dataclasses()
    splits = load_dataset(script.dataset_name)
    args.prediction_loss_only = True
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(script.model_name_or_path),
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits[script.eval_split],
        processing_class=AutoTokenizer.from_pretrained(script.model_name_or_path),
        robustq=ROBUSTQ,  # robustq
        sweep=["fp", "w8", "w4", "w3"],  # robustq
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()  # robustq


if __name__ == "__main__":
    main()
