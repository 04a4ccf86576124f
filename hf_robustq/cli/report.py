"""`robustq report`: one or several runs as an interactive page and as pictures.

    robustq report outputs/kure_digits
    robustq report outputs/kure sweeps/kure analysis.json --out report

Reads folders of a training (its sweeps, logs and histograms), of several (a recipe's), of `robustq sweep`, and files of
`robustq analyze`; draws what their data suffice for, side by side. `index.html` needs no network and fits a phone.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="DIR", help="folder of a run or a sweep, or JSON of an analysis")
    parser.add_argument("--out", type=Path, help="folder to write into; default: `report` in the first DIR")


def run(args: argparse.Namespace) -> None:
    from hf_robustq.report import read, write_report

    runs = read(args.runs)
    first = Path(args.runs[0])
    out = args.out or (first if first.is_dir() else first.parent) / "report"
    written = write_report(runs, out)
    names = ", ".join(run.name for run in runs)
    print(f"{written[0]}, and {len(written) - 1} PNGs beside it: {names}")
