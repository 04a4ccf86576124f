"""Five steps and a sweep on a tiny Llama, with any backend and number of processes; run by `serve.py`."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_robustq import RobustQ, RobustQCallback, RobustTrainer
from hf_robustq.calibrate import stages
from hf_robustq.sharded import assign, whole, whole_shape
from tests.test_trainer import Rows
from tests.zoo import llama, mixtral, tokens

CONFIG = {
    "regularizers": {"kure": {"strength": 0.5}},
    "weights": {"bits": 8},
    "activations": {"bits": 8},
    "calibration_samples": 8,
}
LEARNED = {
    **CONFIG,
    "weights": {"method": "noise", "bits": 8},
    "activations": {"method": "lsq", "bits": 8},
    "first_last": "same",
}
SATURATED = {
    "satnl": {},
    "regularizers": {"sym1": {"strength": 0.5}, "sym2": {}, "kure": {}},
    "weights": {"method": "noise", "bits": 8},
    "calibration_samples": 8,
}
WAVEQ = {
    "regularizers": {"waveq": {"strength": 10.0, "rise": 1, "fall": 4, "smoothness": 0.3}},
    "budget": {"megabytes": 0.025},
    "weights": {"method": "absmax", "bits": 9},
    "first_last": 8,
    "calibration_samples": 8,
}
SETTINGS = ["fp", "w4", "w3a4", "w3@kmeans/channel/bc", "w4a4@mse/asym/x0.9", "trained"]


def shards_on_a_cpu() -> bool:
    """accelerate has no DeepSpeed or FSDP for CPUs: let it start the gloo backend and go on. Whether it had to.

    DeepSpeed would compile collectives of its own for CPUs: here it takes gloo's.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        kind = DistributedType.MULTI_CPU
    elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
        kind = DistributedType.MULTI_GPU
    else:
        return False
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", kind)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    return True


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help="a saved model; default: the tiny Llama of seed 0")
    parser.add_argument("--experts", action="store_true", help="a tiny Mixtral instead")
    parser.add_argument("--resume", help="a checkpoint")
    parser.add_argument("--lapq", action="store_true", help="sweep with a joint search too")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--optim", default="sgd")
    parser.add_argument("--rows", type=int, default=16, help="samples to evaluate")
    parser.add_argument("--save", action="store_true", help="a checkpoint after the second step")
    parser.add_argument("--plain", action="store_true", help="without the plugin")
    parser.add_argument("--stock", action="store_true", help="a stock Trainer with the callback")
    parser.add_argument("--learned", action="store_true", help="learned steps, noise, and a learning rate for them")
    parser.add_argument("--satnl", action="store_true", help="SatNL, SymReg and KURE")
    parser.add_argument("--waveq", action="store_true", help="WaveQ with a budget")
    parser.add_argument("--asam", action="store_true", help="two passes a step")
    parser.add_argument("--per_rank", action="store_true", help="two passes, the first of each rank on its own")
    parser.add_argument("--ema", action="store_true", help="averages of the weights")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--memory", default="keep", help="of the config")
    parser.add_argument("--collectives", action="store_true", help="count those of a step")
    parser.add_argument("--count", action="store_true", help="bytes that a step keeps for its backward")
    parser.add_argument("--disagree", action="store_true", help="another config on the last rank")
    return parser.parse_args(arguments)


class Collectives(TrainerCallback):
    """Counts calls into torch.distributed in the second step: nothing was saved or evaluated before it."""

    def __init__(self):
        self.profile = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profile.start()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.profile.stop()

    def counts(self):
        names = [event.name for event in self.profile.events() if event.name.startswith("c10d::")]
        return {name: names.count(name) for name in sorted(set(names))}


class Kept(TrainerCallback):
    """Bytes of the distinct storages that the second step's forward leaves for its backward.

    Counted where the forward ends: a parameter that FSDP2 gathered for it has given its storage back by then.
    """

    def __init__(self, model):
        self.saved, self.bytes, self.hooks = [], None, None
        model.register_forward_hook(self.count)
        attaching = sys.modules["hf_robustq.sites.attach"]
        pack = attaching._pack

        def counting_pack(reads, saved):  # of nested hooks only the inner ones are called
            packed = pack(reads, saved)
            return self.keep(packed) if isinstance(packed, torch.Tensor) else packed

        attaching._pack = counting_pack

    def keep(self, tensor):
        self.saved.append(tensor)
        return tensor

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
            self.hooks.__enter__()

    def count(self, *_):
        if self.hooks is not None:
            self.hooks.__exit__(None, None, None)
            storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in self.saved)}
            self.saved, self.hooks, self.bytes = [], None, sum(storages.values())


class Watch(TrainerCallback):
    """The logits, and what the stages learn, before the first step."""

    def __init__(self, trainer, plugin):
        self.plugin = plugin
        self.trainer, self.logits, self.learned = trainer, None, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.logits = logits(self.trainer)
        for name, parameter in RobustQ.of(self.trainer.model).own_parameters().items() if self.plugin else ():
            with whole(parameter) as values:
                self.learned[name] = values.clone()


@torch.no_grad()
def logits(trainer):
    model = trainer.model_wrapped
    training = model.training
    model.eval()
    result = model(**tokens(batch=2)).logits.clone()
    model.train(training)
    return result


def checksum(model) -> str:
    """Of every tensor of every stage on this rank."""
    plugin = RobustQ.of(model)
    digest = hashlib.sha256()
    for stage in stages(plugin.sites):
        for name, tensor in (*stage.named_buffers(), *stage.named_parameters()):
            with whole(tensor) as values:
                digest.update(f"{name} {values.tolist()}".encode())
    return digest.hexdigest()


def smallest_after_projection(plugin) -> float:
    """The smallest step, in the model and in DeepSpeed's master copy, after something made all of them negative."""
    own = list(plugin.own_parameters().values())
    for parameter in own:
        assign(parameter, torch.full(whole_shape(parameter), -1.0))
    plugin.step(0.0, first=True, index=0)
    plugin.after_optimizer_step()
    smallest = []
    for parameter in own:
        with whole(parameter) as values:
            smallest.append(float(values.min()))
        if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer"):
            from deepspeed.utils import safe_get_full_fp32_param

            smallest.append(float(safe_get_full_fp32_param(parameter).min()))
    return min(smallest)


def accuracy(predictions):
    return {"accuracy": float(np.mean(predictions.predictions[:, :-1] == predictions.label_ids[:, 1:]))}


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    shards = shards_on_a_cpu()
    processes = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    out = options.out
    save = {"save_strategy": "steps", "save_steps": 2} if options.save else {"save_strategy": "no"}
    args = TrainingArguments(
        output_dir=str(out / "run"), report_to=[], use_cpu=not shards, disable_tqdm=True, max_steps=options.steps,
        per_device_train_batch_size=8 // processes // options.accumulate, per_device_eval_batch_size=4,
        gradient_accumulation_steps=options.accumulate, optim=options.optim,
        learning_rate=0.05 if options.optim == "sgd" else 1e-3, max_grad_norm=0.0, logging_steps=options.steps,
        eval_strategy="steps", eval_steps=options.steps, dataloader_pin_memory=False, **save,
    )  # fmt: skip
    assert args.world_size == processes
    torch.manual_seed(0)
    if options.model:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(options.model)
    else:
        model = mixtral() if options.experts else llama()
    staged = "_robustq" in vars(model)
    if options.model and not staged:  # a float model: transformers leaves it where the backend wants it
        if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == "true" and rank:
            for parameter in model.parameters():  # nothing is promised of what is here
                parameter.data.fill_(float("nan"))
        if os.environ.get("ACCELERATE_DEEPSPEED_ZERO3_INIT") == "true":
            assert all(parameter.numel() == 0 for parameter in model.parameters())
    config = {**CONFIG, "weights": {"bits": 4 if options.disagree and rank == processes - 1 else 8}}
    if options.learned:
        config = {**LEARNED, "memory": options.memory}
    if options.satnl:
        config = SATURATED
    if options.waveq:
        config = WAVEQ
    stock = options.plain or options.stock
    robust = {} if stock else {"sweep": SETTINGS, "scale_lr": 0.01 if options.learned else None}
    if options.lapq:
        robust |= {"sweep": [*SETTINGS, "w3a4@lapq"], "sweep_options": {"lapq_iterations": 1}}
    if not stock and not staged:
        robust["robustq"] = config
    if options.waveq:
        robust["bits_lr"] = 0.5
    if options.asam or options.per_rank:
        robust["asam"] = {"rho": 0.5, "per_rank": options.per_rank}
    if options.ema:
        robust["ema"] = {"decay": 0.5}
    trainer = (Trainer if stock else RobustTrainer)(
        model=model, args=args, train_dataset=Rows(tokens(batch=40)), eval_dataset=Rows(tokens(batch=options.rows)),
        compute_metrics=accuracy, preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1), **robust,
    )  # fmt: skip
    if options.stock:
        trainer.add_callback(RobustQCallback(RobustQ.of(model)))
    watch = Watch(trainer, not options.plain)
    trainer.add_callback(watch)
    collectives = Collectives() if options.collectives else None
    if collectives:
        trainer.add_callback(collectives)
    kept = Kept(model) if options.count else None
    if kept:
        trainer.add_callback(kept)
    trainer.train(resume_from_checkpoint=options.resume)
    result = {"collectives": collectives and collectives.counts(), "kept": kept and kept.bytes}
    if not stock:
        result["rows"] = [row for sweep in trainer.sweep_callback.sweeps for row in sweep.to_dict()["rows"]]
        keys = ("kurtosis", "kure", "loss")
        result["logs"] = {k: v for log in trainer.state.log_history for k, v in log.items() if k in keys}
    if not options.plain:
        result["checksum"] = checksum(trainer.model)
        result["size"] = RobustQ.of(trainer.model).size().to_dict()
    end = logits(trainer)
    trainer.save_model(str(out / "final"))
    if options.learned:
        result["projected"] = smallest_after_projection(RobustQ.of(trainer.model))
    (out / f"rank{rank}.json").write_text(json.dumps(result))
    if rank == 0:
        torch.save({"begin": watch.logits, "end": end, "learned": watch.learned}, out / "logits.pt")
    trainer.accelerator.end_training()
