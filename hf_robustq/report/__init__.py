"""Runs as charts: an interactive page that needs no network, and pictures."""

from hf_robustq.report.chart import Bars, Cells, Chart, Line, Lines, figure, save_png
from hf_robustq.report.page import write_report
from hf_robustq.report.runs import RUN_FILE, SWEEP_FILE, WEIGHTS_FILE, Run, check_resumable, read, read_facts

__all__ = [
    "RUN_FILE",
    "SWEEP_FILE",
    "WEIGHTS_FILE",
    "Bars",
    "Cells",
    "Chart",
    "Line",
    "Lines",
    "Run",
    "check_resumable",
    "figure",
    "read",
    "read_facts",
    "save_png",
    "write_report",
]
