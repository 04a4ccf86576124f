"""Regularizers: one file a method, and the table of methods."""

from hf_robustq.regularizers.damping import Damping
from hf_robustq.regularizers.kure import KURE
from hf_robustq.regularizers.regularizer import Regularizer
from hf_robustq.regularizers.symreg import SymReg, SymReg2
from hf_robustq.regularizers.waveq import WaveQ

REGULARIZERS: dict[str, type[Regularizer]] = {
    "damping": Damping,
    "kure": KURE,
    "sym1": SymReg,
    "sym2": SymReg2,
    "waveq": WaveQ,
}

__all__ = ["KURE", "REGULARIZERS", "Damping", "Regularizer", "SymReg", "SymReg2", "WaveQ"]
