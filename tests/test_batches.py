"""The batches that calibrate are the Trainer's own, whatever its subclass takes for columns."""

import copy

import pytest
import torch
from transformers import Trainer

from hf_robustq import RobustQ, RobustQMixin, RobustTrainer
from hf_robustq.calibrate import rows
from hf_robustq.parsing import train_tokenizer
from hf_robustq.trainer.batches import calibration_batches, counted_batches, with_real_samples
from tests.test_trainer import Rows, arguments, text
from tests.zoo import bert, llama, tokens

W4A8 = {"weights": {"bits": 4}, "activations": {"bits": 8}, "calibration_samples": 6}
WORDS = ["red", "blue", "cat", "dog", "runs", "sleeps"]


def preferences(count=12):
    from datasets import Dataset

    def words(i, step):
        return " ".join(WORDS[(i * step + j) % len(WORDS)] for j in range(3))

    lines = [{"prompt": words(i, 1), "chosen": " " + words(i, 5), "rejected": " " + words(i, 3)} for i in range(count)]
    return Dataset.from_list(lines)


def tokenizer():
    made = train_tokenizer([WORDS], 120)
    made.eos_token = made.eos_token or made.sep_token
    return made


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # TRL's own default
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")  # read by PEFT 0.21
def test_preference_optimization_of_trl(adapter, tmp_path):
    trl = pytest.importorskip("trl", reason="pip install trl")
    if adapter:
        peft = pytest.importorskip("peft", reason="pip install peft")

    class RobustDPOTrainer(RobustQMixin, trl.DPOTrainer):
        pass

    words = tokenizer()
    model = llama()
    model.resize_token_embeddings(len(words), mean_resizing=False)
    args = trl.DPOConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False, max_length=32, per_device_train_batch_size=4, max_steps=2, eval_strategy="epoch",
    )  # fmt: skip
    data = preferences()
    trainer = RobustDPOTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=words, robustq=W4A8,
        sweep=["trained", "w8"], **({"peft_config": peft.LoraConfig(r=2, task_type="CAUSAL_LM")} if adapter
        else {"ref_model": copy.deepcopy(model)}),
    )  # fmt: skip
    trainer.train()
    assert trainer.robustq.calibrated
    row = trainer.sweep_callback.sweeps[-1].rows[0]
    assert row.samples == 12 and row.metrics["loss"] > 0  # pairs, of which each is two rows of tensors


def test_columns_of_a_subclass(tmp_path):
    class Own(Trainer):
        """Its samples have columns that no model takes."""

        def _set_signature_columns_if_needed(self):
            self._signature_columns = ["words", "labels"]

        def compute_loss(self, model, inputs, *args, **kwargs):
            own = {"input_ids": inputs["words"], "labels": inputs["labels"]}
            return super().compute_loss(model, own, *args, **kwargs)

    class Robust(RobustQMixin, Own):
        pass

    batch = tokens(labels=3, batch=12)
    data = Rows({"words": batch["input_ids"], "labels": batch["labels"], "other": torch.zeros(12)})
    trainer = Robust(model=bert(), args=arguments(tmp_path, max_steps=1), train_dataset=data, robustq=W4A8, sweep=())
    trainer.train()
    (first,) = calibration_batches(trainer, data, 6, 0)
    assert first.keys() == {"words", "labels"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")  # read by PEFT 0.21
def test_an_adapter_without_a_task_type(tmp_path):
    """The wrapping takes any argument: the columns are those of the model inside."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    data = Rows({**tokens(batch=16), "other": torch.zeros(16)})
    trainer = RobustTrainer(
        model=wrapped, args=arguments(tmp_path, max_steps=1), train_dataset=data, robustq=W4A8, sweep=()
    )
    trainer.train()
    (first,) = calibration_batches(trainer, data, 6, 0)
    assert first.keys() == tokens().keys()


class OwnLoader(Trainer):
    """Its evaluation data are put together by a collator of their own."""

    def get_test_dataloader(self, test_dataset):
        loader = super().get_test_dataloader(test_dataset)
        return torch.utils.data.DataLoader(
            loader.dataset, 2, collate_fn=lambda items: [item["input_ids"] for item in items]
        )


def test_a_collator_of_a_subclass_whose_batches_are_lists(tmp_path):
    class Robust(RobustQMixin, OwnLoader):
        def prediction_step(self, model, inputs, *args, **kwargs):
            return model(torch.stack(inputs)).logits.mean().detach(), None, None

    trainer = Robust(model=bert(), args=arguments(tmp_path), train_dataset=text(), robustq=W4A8, sweep=())
    plugin = trainer.robustq
    trainer.create_optimizer()
    assert plugin.calibrated
    found = list(counted_batches(trainer, text(), 20, 0))
    assert [type(batch) for batch, _ in found] == [list] * 3 and [count for _, count in found] == [8, 8, 4]


class Images(torch.utils.data.Dataset):
    """A batch holds the patches of all its images one below the other, as some vision-language models have them."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"pixel_values": torch.full((3 + index, 4), float(index)), "labels": torch.tensor(index % 2)}


def packed(items):
    return {
        "pixel_values": torch.cat([item["pixel_values"] for item in items]),
        "labels": torch.stack([item["labels"] for item in items]),
    }


class OfPatches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)

    def forward(self, pixel_values, labels):
        outputs = self.last(self.second(self.first(pixel_values))).mean(0).expand(len(labels), 2)
        return {"loss": torch.nn.functional.cross_entropy(outputs, labels), "logits": outputs}


def test_samples_are_counted_where_tensors_have_other_rows(tmp_path):
    args = arguments(tmp_path, per_device_eval_batch_size=4, eval_strategy="epoch", max_steps=2)
    trainer = RobustTrainer(
        model=OfPatches(), args=args, train_dataset=Images(), eval_dataset=Images(), data_collator=packed,
        robustq={**W4A8, "calibration_samples": 7}, sweep=["w8a8"],
    )  # fmt: skip
    assert sum(count for _, count in counted_batches(trainer, Images(), 7, 0)) == 7
    loader = trainer.get_eval_dataloader()
    assert [(real, own) for _, real, own in with_real_samples(trainer, loader)] == [(4, 4), (4, 4), (2, 2)]
    trainer.train()
    sweep = trainer.sweep_callback.sweeps[-1]
    assert sweep.rows[0].samples == 10 and sweep.context["calibration_samples"] == 7


def test_rows_of_a_batch_are_what_most_tensors_have():
    batch = {"pixel_values": torch.zeros(50, 3), "input_ids": torch.zeros(4, 7), "labels": torch.zeros(4), "n": 3}
    assert rows(batch) == 4 and rows(torch.zeros(3, 2)) == 3 and rows(torch.tensor(1.0)) == 1 and rows({}) == 1
    assert rows([torch.zeros(5, 2), torch.zeros(5)]) == 5


def test_calibration_draws_nothing_and_is_the_same_again(tmp_path):
    trainer = RobustTrainer(model=bert(), args=arguments(tmp_path), train_dataset=text(), robustq=W4A8, sweep=())
    state = torch.get_rng_state()
    first, second = (list(calibration_batches(trainer, text(), 10, seed=3)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a)
    other = next(calibration_batches(trainer, text(), 10, seed=4))
    assert not torch.equal(other["input_ids"], first[0]["input_ids"])
    assert RobustQ.of(trainer.model) is trainer.robustq
