"""Quantizers: one file a method, and the table of methods."""

from hf_robustq.quantizers.fixed import Fixed
from hf_robustq.quantizers.probe import CallProbe, InputProbe, Probe, WeightProbe
from hf_robustq.quantizers.quantizer import Quantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "fixed": Fixed,
}

__all__ = ["QUANTIZERS", "CallProbe", "Fixed", "InputProbe", "Probe", "Quantizer", "WeightProbe"]
