"""hf_robustq: train any Hugging Face or timm model so that one checkpoint survives any quantizer."""

from typing import TYPE_CHECKING, Any

from hf_robustq.config import QuantizerConfig, RegularizerConfig, RobustQConfig, SatNLConfig
from hf_robustq.grid import Grid
from hf_robustq.hub import from_pretrained
from hf_robustq.optim import ASAM, EMA
from hf_robustq.plugin import RobustQ
from hf_robustq.quantizers import LSQ, QUANTIZERS, Absmax, DoReFa, Fixed, LSQPlus, NoiseTempered, Quantizer
from hf_robustq.regularizers import KURE, REGULARIZERS, Damping, Regularizer, SymReg, SymReg2, WaveQ
from hf_robustq.reparam import SatNL
from hf_robustq.scales import SCALE_RULES, Sample
from hf_robustq.sites import Site, find_sites
from hf_robustq.size import Size
from hf_robustq.sweep import Row, Setting, Sweep, robustness, sweep

if TYPE_CHECKING:
    from hf_robustq.trainer import BitWidthSweepCallback, RobustQCallback, RobustQMixin, RobustTrainer

__version__ = "0.1.0"

__all__ = [
    "ASAM",
    "EMA",
    "KURE",
    "LSQ",
    "QUANTIZERS",
    "REGULARIZERS",
    "SCALE_RULES",
    "Absmax",
    "BitWidthSweepCallback",
    "Damping",
    "DoReFa",
    "Fixed",
    "Grid",
    "LSQPlus",
    "NoiseTempered",
    "Quantizer",
    "QuantizerConfig",
    "Regularizer",
    "RegularizerConfig",
    "RobustQ",
    "RobustQCallback",
    "RobustQConfig",
    "RobustQMixin",
    "RobustTrainer",
    "Row",
    "Sample",
    "SatNL",
    "SatNLConfig",
    "Setting",
    "Site",
    "Size",
    "Sweep",
    "SymReg",
    "SymReg2",
    "WaveQ",
    "find_sites",
    "from_pretrained",
    "robustness",
    "sweep",
]


def __getattr__(name: str) -> Any:
    # transformers' Trainer imports datasets and torchvision where they are installed: only for those who use it.
    if name in ("BitWidthSweepCallback", "RobustQCallback", "RobustQMixin", "RobustTrainer"):
        from hf_robustq import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
