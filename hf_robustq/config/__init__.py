"""Configuration: frozen dataclasses, to and from dict, YAML and JSON. Unknown keys are errors."""

from hf_robustq.config.checks import check_known, option_names
from hf_robustq.config.methods import QuantizerConfig, RegularizerConfig, SatNLConfig
from hf_robustq.config.whole import RobustQConfig

__all__ = ["QuantizerConfig", "RegularizerConfig", "RobustQConfig", "SatNLConfig", "check_known", "option_names"]
