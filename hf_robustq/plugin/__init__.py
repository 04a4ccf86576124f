"""The plugin: `RobustQ`, the stages it gives a site, its mark on the model, and its table."""

from hf_robustq.plugin.mark import BESIDES, METHOD
from hf_robustq.plugin.robustq import RobustQ

__all__ = ["BESIDES", "METHOD", "RobustQ"]
