"""Regularizers: one file a method, and the table of methods."""

from hf_robustq.regularizers.damping import Damping
from hf_robustq.regularizers.kure import KURE
from hf_robustq.regularizers.regularizer import Regularizer

REGULARIZERS: dict[str, type[Regularizer]] = {
    "damping": Damping,
    "kure": KURE,
}

__all__ = ["KURE", "REGULARIZERS", "Damping", "Regularizer"]
