"""Configuration: frozen dataclasses, to and from dict, YAML and JSON. Unknown keys are errors."""

from hf_robustq.config.files import read_file
from hf_robustq.config.methods import QuantizerConfig, RegularizerConfig, SatNLConfig
from hf_robustq.config.whole import RobustQConfig
from hf_robustq.options import check_known, option_names

__all__ = [
    "QuantizerConfig",
    "RegularizerConfig",
    "RobustQConfig",
    "SatNLConfig",
    "check_known",
    "option_names",
    "read_file",
]
