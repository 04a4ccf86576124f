"""The Trainer's side: callbacks for a stock Trainer, and a mixin for any of its subclasses. Public hooks only."""

from hf_robustq.trainer.callback import RobustQCallback
from hf_robustq.trainer.mixin import RobustQMixin, RobustTrainer
from hf_robustq.trainer.sweep_callback import BitWidthSweepCallback

__all__ = ["BitWidthSweepCallback", "RobustQCallback", "RobustQMixin", "RobustTrainer"]
