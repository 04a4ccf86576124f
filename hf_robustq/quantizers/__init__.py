"""Quantizers: one file a method, and the table of methods."""

from hf_robustq.quantizers.absmax import Absmax
from hf_robustq.quantizers.dorefa import DoReFa
from hf_robustq.quantizers.fixed import Fixed
from hf_robustq.quantizers.lsq import LSQ
from hf_robustq.quantizers.lsq_plus import LSQPlus
from hf_robustq.quantizers.noise import NoiseTempered
from hf_robustq.quantizers.oscillation import Oscillation
from hf_robustq.quantizers.probe import CallProbe, InputProbe, Probe, WeightProbe
from hf_robustq.quantizers.quantizer import LEARNED, Quantizer, Role
from hf_robustq.quantizers.variable_bits import VariableBits

QUANTIZERS: dict[str, type[Quantizer]] = {
    "absmax": Absmax,
    "dorefa": DoReFa,
    "fixed": Fixed,
    "lsq": LSQ,
    "lsq_plus": LSQPlus,
    "noise": NoiseTempered,
}

__all__ = [
    "LEARNED",
    "LSQ",
    "QUANTIZERS",
    "Absmax",
    "CallProbe",
    "DoReFa",
    "Fixed",
    "InputProbe",
    "LSQPlus",
    "NoiseTempered",
    "Oscillation",
    "Probe",
    "Quantizer",
    "Role",
    "VariableBits",
    "WeightProbe",
]
