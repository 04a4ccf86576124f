"""Figures 1A, 2A, 4A and 5A of the supplement of arXiv 2208.00338, from what `robustq` measured of several networks.

    for net in baseline ours; do robustq analyze outputs/$net --data <cifar10 folder> --parts statistics divergence \\
      --settings w8@aciq --out measured/$net.json; done
    robustq sweep outputs/baseline outputs/ours --data <cifar10 folder> --settings fp w4@log2 ... --out measured/sweep
    python recipes/symreg_figures.py --analyses measured/baseline.json measured/ours.json --sweep measured/sweep \\
      --layer layer3.0.conv1 --out docs/figures

A network is called by its file's or folder's name. What was not measured is left out.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2")


def panels(count: int, height: float = 3.2) -> tuple[Figure, list[Any]]:
    """A figure of panels side by side."""
    figure = Figure(figsize=(4.2 * count, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def divergence(analyses: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Fig. 1A: KL divergence of each layer's output, quantized against float, in the order of the forward pass."""
    figure, (axes,) = panels(1)
    axes.figure.set_size_inches(8, 3.2)
    for colour, (name, analysis) in zip(COLOURS, analyses.items(), strict=False):
        for setting, measured in analysis.get("settings", {}).items():
            values = list(measured.get("divergence", {}).values())
            axes.plot(range(1, len(values) + 1), values, "o-", ms=3, color=colour, label=f"{name}, {setting}")
    axes.set(xlabel="layer", ylabel="KL divergence (nats)", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return figure


def histograms(analyses: Mapping[str, Mapping[str, Any]], layer: str) -> Figure:
    """Fig. 2A: the weights of one layer."""
    figure, axes = panels(len(analyses))
    for axis, colour, (name, analysis) in zip(axes, COLOURS, analyses.items(), strict=False):
        known = analysis["statistics"]
        found = [key for key in known if key.removesuffix(".weight").endswith(layer)]
        if len(found) != 1:
            raise ValueError(f"{layer}: {len(found)} weights of {name} end so: name one of {', '.join(known)}")
        one = known[found[0]]
        edges = one["edges"]
        widths = [b - a for a, b in pairwise(edges)]
        axis.bar(edges[:-1], one["counts"], widths, align="edge", color=colour)
        facts = f"kurtosis {one['kurtosis']:.2f}, skewness {one['skewness']:.2f}, symmetry {one['symmetry']:.3f}"
        axis.set_title(f"{name}\n{facts}", fontsize=9)
        axis.set(xlabel="weight", yticks=[])
    return figure


def bits(rows: Rows, methods: Sequence[str] = ("log2", "kmeans")) -> Figure:
    """Fig. 4A: accuracy against the weights' bits, a panel for each method."""
    figure, axes = panels(len(methods))
    for axis, method in zip(axes, methods, strict=True):
        own = [row for row in rows if row["setting"].endswith(f"@{method}") and row["activations"] is None]
        lines(axis, own, "weights")
        axis.set(title=method, xlabel="weight bits", ylabel="accuracy (%)")
    axes[0].legend()
    return figure


def ratios(rows: Rows) -> Figure:
    """Fig. 5A: accuracy against the weights' step, in terms of the step that was searched; a panel for each setting."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        bits, _, rest = row["setting"].partition("@")
        method, _, modifiers = rest.partition("/")
        if not modifiers or modifiers.startswith("x"):
            found.setdefault(f"{bits}@{method or 'mse'}", []).append(row)
    found = {base: own for base, own in found.items() if any(row["ratio"] != 1 for row in own)}
    figure, axes = panels(len(found))
    for axis, (base, own) in zip(axes, found.items(), strict=True):
        lines(axis, own, "ratio")
        axis.set(title=base, xlabel="step / searched step", ylabel="accuracy (%)")
    axes[0].legend()
    return figure


def lines(axis: Any, rows: Rows, key: str) -> None:
    """A line for each network."""
    for colour, name in zip(COLOURS, dict.fromkeys(row["model"] for row in rows), strict=False):
        points = sorted((row[key], 100 * row["accuracy"]) for row in rows if row["model"] == name)
        axis.plot(*zip(*points, strict=True), "o-", ms=3, color=colour, label=Path(name).name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--analyses", type=Path, nargs="+", default=[], help="JSON files of `robustq analyze`")
    parser.add_argument("--sweep", type=Path, help="folder of `robustq sweep`")
    parser.add_argument("--layer", help="the layer of Fig. 2A, by the end of its name")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    analyses = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in args.analyses}
    rows = json.loads((args.sweep / "rows.json").read_text(encoding="utf-8"))["rows"] if args.sweep else []
    figures = {}
    compared = {name: one for name, one in analyses.items() if one.get("settings")}
    if compared:
        figures["divergence"] = divergence(compared)
    if analyses and args.layer:
        figures["histograms"] = histograms(analyses, args.layer)
    if any(row["setting"].endswith(("@log2", "@kmeans")) for row in rows):
        figures["bits"] = bits(rows)
    if any("/x" in row["setting"] for row in rows):
        figures["ratios"] = ratios(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(args.out / f"symreg_{name}.png", dpi=110)
        print(args.out / f"symreg_{name}.png")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, KeyError) as error:
        raise SystemExit(f"error: {error}") from None
