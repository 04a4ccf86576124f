"""How steps and levels are chosen from data: pure functions.

`SCALE_RULES`: `rule(sample, grid) -> [C] positive steps`; `CODEBOOK_RULES`: `rule(sample, grid) -> Codebook`, levels
that are not evenly spaced.
"""

from collections.abc import Callable

from torch import Tensor

from hf_robustq.grid import Grid
from hf_robustq.scales.absmax import absmax
from hf_robustq.scales.aciq import aciq, aciq_gauss, aciq_laplace
from hf_robustq.scales.codebook import CODEBOOK_RULES, Codebook, CodebookRule, dorefa, kmeans, log2
from hf_robustq.scales.lsq import lsq, lsq_plus
from hf_robustq.scales.mse import mse, quantization_error
from hf_robustq.scales.percentile import percentile
from hf_robustq.scales.sample import Sample

ScaleRule = Callable[[Sample, Grid], Tensor]

SCALE_RULES: dict[str, ScaleRule] = {
    "absmax": absmax,
    "aciq": aciq,
    "aciq_gauss": aciq_gauss,
    "aciq_laplace": aciq_laplace,
    "lsq": lsq,
    "lsq_plus": lsq_plus,
    "mse": mse,
    "percentile": percentile,
}

__all__ = [
    "CODEBOOK_RULES",
    "SCALE_RULES",
    "Codebook",
    "CodebookRule",
    "Sample",
    "ScaleRule",
    "absmax",
    "aciq",
    "aciq_gauss",
    "aciq_laplace",
    "dorefa",
    "kmeans",
    "log2",
    "lsq",
    "lsq_plus",
    "mse",
    "percentile",
    "quantization_error",
]
