"""Around the optimizer: sharpness-aware steps, and averages of the weights."""

from hf_robustq.optim.asam import ASAM
from hf_robustq.optim.ema import EMA

__all__ = ["ASAM", "EMA"]
