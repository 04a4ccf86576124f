"""How a step is chosen from data: pure functions `rule(sample, grid) -> [C] positive steps`."""

from collections.abc import Callable

from torch import Tensor

from hf_robustq.grid import Grid
from hf_robustq.scales.absmax import absmax
from hf_robustq.scales.aciq import aciq_gauss, aciq_laplace
from hf_robustq.scales.lsq import lsq, lsq_plus
from hf_robustq.scales.mse import mse, quantization_error
from hf_robustq.scales.percentile import percentile
from hf_robustq.scales.sample import Sample

ScaleRule = Callable[[Sample, Grid], Tensor]

SCALE_RULES: dict[str, ScaleRule] = {
    "absmax": absmax,
    "aciq_gauss": aciq_gauss,
    "aciq_laplace": aciq_laplace,
    "lsq": lsq,
    "lsq_plus": lsq_plus,
    "mse": mse,
    "percentile": percentile,
}

__all__ = [
    "SCALE_RULES",
    "Sample",
    "ScaleRule",
    "absmax",
    "aciq_gauss",
    "aciq_laplace",
    "lsq",
    "lsq_plus",
    "mse",
    "percentile",
    "quantization_error",
]
