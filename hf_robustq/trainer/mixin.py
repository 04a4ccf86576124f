"""`RobustTrainer`, and the mixin that makes any Trainer subclass one."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_utils import default_compute_objective

from hf_robustq.card import write_card
from hf_robustq.config import RobustQConfig
from hf_robustq.optim import ASAM, EMA
from hf_robustq.optim.asam import UNDER_DEEPSPEED, check_optimizer
from hf_robustq.options import check_mapping, check_options, under
from hf_robustq.plugin import RobustQ
from hf_robustq.plugin.adapters import load as load_stages
from hf_robustq.plugin.adapters import save as save_stages
from hf_robustq.plugin.publish import load_state, save_state
from hf_robustq.plugin.robustq import BITS_LR, check_rates
from hf_robustq.sweep import DEFAULT_SETTINGS, Setting, parse_settings
from hf_robustq.trainer import checkpoints
from hf_robustq.trainer.batches import calibration_batches, forward
from hf_robustq.trainer.callback import RobustQCallback, several_gpus
from hf_robustq.trainer.checkpoints import last_whole
from hf_robustq.trainer.optimizer import check_section, checked_schedule, group_apart, learning_rate_factor
from hf_robustq.trainer.record import Histograms, card_facts
from hf_robustq.trainer.resume import check_config, own_names, readable
from hf_robustq.trainer.secret import Secret
from hf_robustq.trainer.sweep_callback import BitWidthSweepCallback

logger = logging.getLogger(__name__)

_AnyTrainer = Trainer if TYPE_CHECKING else object


class RobustQMixin(_AnyTrainer):
    """Put before any Trainer class: `class RobustSeq2SeqTrainer(RobustQMixin, Seq2SeqTrainer): ...`

    robustq              a `RobustQ`, or its config (then, and with `model_init`, it is created here); default: the
                         one the model was loaded with
    sweep                settings to measure after every evaluation; None: the default ones; (): no sweep
    sweep_options        what else `BitWidthSweepCallback` takes
    calibration_dataset  training samples with the evaluation transform; default: `train_dataset`
    scale_lr             learning rate of steps and offsets that are learned; default: that of the weights
    bits_lr              learning rate of bit-widths that are learned
    lr_schedule          {"name": one of `LR_SCHEDULES`, and its options}; default: the Trainer's own
    asam                 options of `ASAM`, {"rho": 1.0}: two passes a step; default: one
    ema                  options of `EMA`, {"decay": 0.9999}: averages of the weights are what is evaluated, swept,
                         saved and published; default: the weights
    """

    robustq: RobustQ
    asam: ASAM | None = None
    _scheduler_state: Path | None = None
    _resumed: Path | None = None
    _observed: int | None = None
    histograms: Histograms | None = None

    def __init__(
        self,
        *args: Any,
        robustq: RobustQ | RobustQConfig | Mapping[str, Any] | None = None,
        sweep: Sequence[Setting | str] | None = None,
        sweep_options: Mapping[str, Any] | None = None,
        calibration_dataset: Any = None,
        scale_lr: float | None = None,
        bits_lr: float = BITS_LR,
        lr_schedule: Mapping[str, Any] | None = None,
        asam: Mapping[str, Any] | None = None,
        ema: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name, options, kind in (("asam", asam, ASAM), ("ema", ema, EMA)):
            if options is not None:
                with under(name):
                    check_options(name, kind, check_mapping("", options))
        check_rates(scale_lr, bits_lr)
        self.asam_options, self.ema_options = asam, ema
        self._sweep_options = dict(sweep_options or {})
        self._robustq_config = robustq.config if isinstance(robustq, RobustQ) else robustq
        given = robustq if isinstance(robustq, RobustQ) else None
        self.scale_lr, self.bits_lr = scale_lr, bits_lr
        self.lr_schedule = None if lr_schedule is None else checked_schedule(lr_schedule)
        settings = parse_settings(DEFAULT_SETTINGS if sweep is None else sweep)
        super().__init__(*args, **kwargs)
        if self.args.hub_token:
            self.args.hub_token = Secret(self.args.hub_token)
        if self.args.n_gpu > 1:
            raise ValueError(several_gpus(self.args.n_gpu))
        if given is not None:
            given.follow(cast(nn.Module, self.model))
        if self.model_init is None:  # else `call_model_init` has created it
            self.robustq = given or self._stage(cast(nn.Module, self.model))
            try:
                self._set_up()
            except Exception:
                if given is None:
                    self.robustq.detach()
                raise
        self.calibration_dataset = calibration_dataset
        self.robustq_callback = RobustQCallback(self.robustq, lambda: self._calibrate_once(wrapped=True), self._begin)
        self.add_callback(self.robustq_callback)
        self.sweep_callback = None
        if settings:
            options = {"calibration_dataset": calibration_dataset, **self._sweep_options}
            try:
                self.sweep_callback = BitWidthSweepCallback(self, self.robustq, settings, **options)
            except Exception:
                if given is None:
                    self.robustq.detach()
                raise
            self.add_callback(self.sweep_callback)
            self.sweep_callback.come_first()

    def _stage(self, model: nn.Module) -> RobustQ:
        return RobustQ.of(model) if self._robustq_config is None else RobustQ(model, self._robustq_config)

    def _set_up(self) -> None:
        """What goes with the plugin: two passes, averages."""
        plugin = self.robustq
        if self.asam_options is not None:
            self.asam = ASAM(plugin.model, exclude=plugin.own_parameters(), **self.asam_options)
        if self.ema_options is not None:
            plugin.average(**self.ema_options)

    def _begin(self) -> None:
        """The model is wrapped and a checkpoint loaded: go on with what else it has, or begin."""
        if self.asam is not None:
            if self.is_deepspeed_enabled:
                raise ValueError(UNDER_DEEPSPEED)
            check_optimizer(self.optimizer)
        if self._resumed is not None:
            load_state(self.robustq, self._resumed)
        elif self.robustq.ema is not None:
            self.robustq.ema.start()
        if self.sweep_callback is not None:
            folder, resumed = str(self.args.output_dir), self._resumed is not None
            self.histograms = Histograms(self.robustq, folder, resumed, write=self.is_world_process_zero())

    def call_model_init(self, trial: Any = None) -> Any:
        model = super().call_model_init(trial)
        self.robustq = self._stage(model)
        self._set_up()
        for callback in (getattr(self, "robustq_callback", None), getattr(self, "sweep_callback", None)):
            if callback is not None:
                callback.plugin = self.robustq
        return model

    def _calibration_batches(self) -> Iterator[Any]:
        config = self.robustq.config
        dataset = self.calibration_dataset if self.calibration_dataset is not None else self.train_dataset
        return calibration_batches(self, dataset, config.calibration_samples, config.seed)

    def _calibrate_once(self, wrapped: bool = False) -> None:
        """Unless a checkpoint has brought everything; under FSDP and DeepSpeed, which place the model, once wrapped."""
        if not self.robustq.calibrated:
            self.robustq.restored()
        if not self.robustq.calibrated and (wrapped or not (self.is_fsdp_enabled or self.is_deepspeed_enabled)):
            self.robustq.calibrate(self._calibration_batches(), forward(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ever; a checkpoint to resume from must be of this config, and may be of another backend.

        At the end, as before every checkpoint, the inputs are observed once more: what is saved has the statistics
        of its own weights.
        """
        deepspeed = self.accelerator.state.deepspeed_plugin
        if deepspeed is not None and self.robustq.own_parameters():
            apart = self.scale_lr is not None or bool(self.robustq.bits.stages())
            check_section(deepspeed.deepspeed_config.get("optimizer"), apart)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_whole(Path(str(self.args.output_dir)), self.args.save_only_model))
        if resume_from_checkpoint:
            result = self._resume(Path(resume_from_checkpoint), *args, **kwargs)
        else:
            result = super().train(None, *args, **kwargs)
        try:
            self.observe()
        except (RuntimeError, ValueError) as error:
            logger.warning("the statistics of the inputs are those of the last evaluation or checkpoint: %s", error)
        if self.histograms is not None:
            with self.robustq.averaged():
                self.histograms.add_end()
        return result

    def observe(self) -> None:
        """Observe the inputs on the calibration samples, unless that was done at this optimizer step."""
        if self._observed != self.state.global_step:
            with self.robustq.averaged():
                self.robustq.observe(self._calibration_batches(), forward(self))
            self._observed = self.state.global_step

    def _resume(self, checkpoint: Path, *args: Any, **kwargs: Any) -> Any:
        checkpoints.check(checkpoint)
        check_config(checkpoint, self.robustq)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        with ExitStack() as stack:
            folder = stack.enter_context(readable(checkpoint, sharded))
            bare = folder != checkpoint and not (folder / "optimizer.pt").exists()
            folder = folder if sharded else stack.enter_context(own_names(folder, self.robustq.model))
            self._scheduler_state = folder / "scheduler.pt" if bare else None
            self._resumed = folder
            if self.robustq.adapted:
                load_stages(self.robustq, folder)
            try:
                return super().train(str(folder), *args, **kwargs)
            finally:
                self._resumed = None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As ever; no more batches for a run that has had all its steps, which the Trainer would give one more."""
        return (
            ([], None) if self.state.global_step >= self.state.max_steps else super().get_batch_samples(*args, **kwargs)
        )

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As ever; with ASAM twice."""
        once = partial(super().training_step, model, inputs, *args, **kwargs)
        return once() if self.asam is None else self.asam(once, model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Calibrate, so that steps are set before the wrapping; then as ever, with a group for what stages learn."""
        self._calibrate_once()
        created = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if created:
            group_apart(optimizer, self.robustq.own_groups(self.scale_lr, self.bits_lr))
        return optimizer

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As ever; the default objective is of the Trainer's own metrics, without what sweeps add to them."""
        return super().hyperparameter_search(hp_space, compute_objective or self._objective, *args, **kwargs)

    def _objective(self, metrics: dict[str, float]) -> float:
        added = self.sweep_callback.added if self.sweep_callback is not None else ()
        return default_compute_objective({key: value for key, value in metrics.items() if key not in added})

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Calibrate where nothing has yet (`evaluate` or `predict` before `train`); then as ever."""
        if self.sweep_callback is not None and "ignore_keys" not in self._sweep_options:
            given = inspect.signature(Trainer.evaluation_loop).bind(self, *args, **kwargs).arguments
            self.sweep_callback.ignore_keys = given.get("ignore_keys")
        self._calibrate_once()
        if not self.robustq.calibrated:
            self.robustq.check_initialized()
        with self.robustq.averaged():
            return super().evaluation_loop(*args, **kwargs)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """The Trainer's own choice, less everything the stages learn."""
        own = set(self.robustq.own_parameters())
        return [name for name in super().get_decay_parameter_names(model) if name not in own]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's own scheduler, or `lr_schedule` by the epoch, after a linear warm-up if there is one."""
        self.robustq.after_wrapping()  # comes before a checkpoint is loaded
        if self.lr_schedule is None:
            super().create_scheduler(num_training_steps, optimizer)
        elif self.lr_scheduler is None:
            epoch = max(1, math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps))
            warmup = self.args.get_warmup_steps(num_training_steps)
            factor = learning_rate_factor(self.lr_schedule, num_training_steps, epoch, warmup)
            self.lr_scheduler = LambdaLR(cast(Any, self.optimizer if optimizer is None else optimizer), factor)
            self._created_lr_scheduler = True
        if self._scheduler_state is not None and self._scheduler_state.is_file():
            # The Trainer loads the schedule of a checkpoint only together with an optimizer's state.
            scheduler = cast(Any, self.lr_scheduler)
            scheduler.load_state_dict(torch.load(self._scheduler_state, weights_only=True))
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
        return self.lr_scheduler

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Training logs also carry the mean kurtosis and each penalty; the loss stays the task's.

        Those of evaluations carry the bits of each weight, where they are learned.
        """
        if "loss" in logs:
            logs.update(self.robustq.metrics())
        elif "eval_loss" in logs:
            logs.update({f"eval_bits/{name}": bits for name, bits in self.robustq.bits.by_layer().items()})
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ever, of the published model; a checkpoint also gets what a resumed run goes on with.

        The folder of an adapter gets what the stages hold, too (`RobustQ.load` reads it).
        """
        self.robustq.watch.check(self.state.global_step)
        if _internal_call and self.is_in_train:
            self.observe()
        with self.robustq.published():
            super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None:
            save_state(self.robustq, output_dir, write=self.args.should_save)
        if self.robustq.adapted:
            save_stages(self.robustq, output_dir or str(self.args.output_dir), write=self.args.should_save)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A card that says how the model does at each bit-width; the Trainer's own where nothing was swept.

        Takes the Trainer's own arguments.
        """
        if self.sweep_callback is None or not self.sweep_callback.sweeps:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            given = inspect.signature(Trainer.create_model_card).bind(self, *args, **kwargs).arguments
            facts = card_facts(cast(Any, self), given)
            write_card(str(self.args.output_dir), sweeps=self.sweep_callback.sweeps, **facts)


class RobustTrainer(RobustQMixin, Trainer):
    """`Trainer` with a `RobustQ`: calibrates by itself, sweeps after every evaluation, writes the card."""
