"""Sweeps as Markdown, with every text escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hf_robustq.report.charts import is_share, title
from hf_robustq.sweep import Sweep


def table(sweeps: Mapping[str, Sweep], metric: str) -> str:
    """A Markdown table: a row for each named sweep, a column for each setting of any; shares in percent."""
    names = list(dict.fromkeys(row.setting for sweep in sweeps.values() for row in sweep.rows))
    cells = {(label, ""): {row.setting: row.metrics[metric] for row in sweep.rows} for label, sweep in sweeps.items()}
    return _grid({name: title(name) for name in names}, cells, is_share(metric))


def table_by_method(sweeps: Mapping[str, Sweep], metric: str) -> str:
    """The same with a column for each bit-width, and a row for each method and modifier of each sweep."""
    columns: dict[str, str] = {}
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for label, sweep in sweeps.items():
        for row in sweep.rows:
            bits, how = re.fullmatch(r"([^@/]*)(.*)", row.setting, re.DOTALL).groups()  # type: ignore[union-attr]
            columns[bits] = title(bits)
            cells.setdefault((label, how.lstrip("@/")), {})[bits] = row.metrics[metric]
    return _grid(columns, cells, is_share(metric))


def _grid(columns: Mapping[str, str], cells: Mapping[tuple[str, str], Mapping[str, float]], percent: bool) -> str:
    head = ["", *map(escaped, columns.values())]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (label, how), values in cells.items():
        written = [f"{values[c] * (100 if percent else 1):.2f}" if c in values else "" for c in columns]
        lines.append("| " + " | ".join([escaped(f"{label}, {how}" if how else label), *written]) + " |")
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)


def measured_on(sweep: Sweep) -> str:
    """What the figures of a sweep are of, in a sentence."""
    sets = {f"{row.samples} samples of {row.dataset} ({row.subset})" for row in sweep.rows}
    calibration = sweep.context.get("calibration_samples")
    trained = f" Activation steps come from {calibration} training samples." if calibration else ""
    return escaped(f"Measured on {', '.join(sorted(sets))}.{trained}")


def moment(sweep: Sweep) -> str:
    """When in the training it was made."""
    return f"step {sweep.step}" if sweep.epoch is None else f"epoch {sweep.epoch:g}"
