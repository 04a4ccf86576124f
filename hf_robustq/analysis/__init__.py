"""Why a network survives quantization or does not: sensitivity, distributions, sharpness, theory."""

from hf_robustq.analysis.distributions import WeightStatistics, output_divergence, weight_sqnr, weight_statistics
from hf_robustq.analysis.sensitivity import layer_sensitivity
from hf_robustq.analysis.sharpness import sharpness

__all__ = [
    "WeightStatistics",
    "layer_sensitivity",
    "output_divergence",
    "sharpness",
    "weight_sqnr",
    "weight_statistics",
]
