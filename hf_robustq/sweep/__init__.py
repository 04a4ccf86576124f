"""The sweep: one model under many quantizers, the data read once."""

from hf_robustq.sweep.rows import Row, Sweep, curves, load_sweeps, robustness, save_sweeps
from hf_robustq.sweep.run import Steps, chunked, quantized, sweep
from hf_robustq.sweep.settings import DEFAULT_SETTINGS, Setting, parse_settings

__all__ = [
    "DEFAULT_SETTINGS",
    "Row",
    "Setting",
    "Steps",
    "Sweep",
    "chunked",
    "curves",
    "load_sweeps",
    "parse_settings",
    "quantized",
    "robustness",
    "save_sweeps",
    "sweep",
]
