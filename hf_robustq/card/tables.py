"""Sweeps as Markdown, with every text escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from hf_robustq.report.chart import is_share
from hf_robustq.report.charts import title
from hf_robustq.sweep import Row, Sweep


def table(sweeps: Mapping[str, Sweep], metric: str, aligned: bool = False) -> str:
    """A Markdown table: a row for each named sweep, a column for each setting of any; shares in percent.

    `aligned`: its columns line up in plain text too.
    """
    columns = {row.setting: title(row.setting) for sweep in sweeps.values() for row in sweep.rows}
    cells = {label: {row.setting: _figure(row, metric) for row in sweep.rows} for label, sweep in sweeps.items()}
    return _grid(columns, cells, aligned)


def table_by_method(sweeps: Mapping[str, Sweep], metric: str) -> str:
    """The same with a column for each bit-width, and a row for each method and modifier of each sweep."""
    columns: dict[str, str] = {}
    cells: dict[str, dict[str, str]] = {}
    for label, sweep in sweeps.items():
        for row in sweep.rows:
            bits, how = re.fullmatch(r"([^@/]*)(.*)", row.setting, re.DOTALL).groups()  # type: ignore[union-attr]
            columns[bits] = title(bits)
            name = ", ".join(filter(None, [label, how.lstrip("@/")]))
            cells.setdefault(name, {})[bits] = _figure(row, metric)
    return _grid(columns, cells)


def sweep_table(sweep: Sweep, metrics: Sequence[str]) -> str:
    """One sweep for a terminal: a row for each metric, a column for each setting; shares in percent."""
    columns = {row.setting: title(row.setting) for row in sweep.rows}
    cells = {metric: {row.setting: _figure(row, metric) for row in sweep.rows} for metric in metrics}
    return _grid(columns, cells, aligned=True)


def _figure(row: Row, metric: str) -> str:
    return f"{row.value(metric) * (100 if is_share(metric) else 1):.2f}"


def _grid(columns: Mapping[str, str], cells: Mapping[str, Mapping[str, str]], aligned: bool = False) -> str:
    rows = [["", *map(escaped, columns.values())]]
    rows += [[escaped(label), *(values.get(column, "") for column in columns)] for label, values in cells.items()]
    widths = [max(map(len, column)) if aligned else 0 for column in zip(*rows, strict=True)]
    head, *lines = ["| " + " | ".join(_padded(row, widths)) + " |" for row in rows]
    return "\n".join([head, "|" + "|".join("-" * max(width + 2, 3) for width in widths) + "|", *lines])


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The label to the left, numbers to the right."""
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]


def escaped(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)


def moment(sweep: Sweep) -> str:
    """When in the training it was made."""
    return f"step {sweep.step}" if sweep.epoch is None else f"epoch {sweep.epoch:g}"
