"""The sweep: one model under many quantizers, the data read once."""

from hf_robustq.sweep.rows import (
    Row,
    Sweep,
    curves,
    load_measured,
    load_sweeps,
    measured_sweeps,
    read_json,
    robustness,
    save_sweeps,
    write_json,
)
from hf_robustq.sweep.run import chunked, quantized, sweep
from hf_robustq.sweep.settings import DEFAULT_SETTINGS, MODIFIERS, Setting, parse_settings
from hf_robustq.sweep.steps import Calibration, Steps

__all__ = [
    "DEFAULT_SETTINGS",
    "MODIFIERS",
    "Calibration",
    "Row",
    "Setting",
    "Steps",
    "Sweep",
    "chunked",
    "curves",
    "load_measured",
    "load_sweeps",
    "measured_sweeps",
    "parse_settings",
    "quantized",
    "read_json",
    "robustness",
    "save_sweeps",
    "sweep",
    "write_json",
]
