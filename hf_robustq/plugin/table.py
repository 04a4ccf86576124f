"""What `print(plugin)` shows."""

from __future__ import annotations

from collections.abc import Iterable

from hf_robustq.quantizers import Quantizer
from hf_robustq.regularizers import Regularizer
from hf_robustq.sites import LeftOut, Site


def table(
    sites: Iterable[Site],
    left_out: Iterable[LeftOut],
    float_inputs: Iterable[LeftOut],
    unregularized: Iterable[LeftOut] = (),
) -> str:
    """Weight, shape, stages, bits; then what was left out, which inputs stay float, what is not regularized, and why.

    A regularizer that does not act on a weight is not among its stages.
    """
    rows = [("weight", "shape", "stages", "bits")]
    resting = {one.name for one in unregularized}
    for site in sites:
        stages = [
            name
            for name, stage in site.weight_stages.named_children()
            if name != "probe" and not (site.name in resting and isinstance(stage, Regularizer))
        ]
        bits = []
        for letter, sequence in (("w", site.weight_stages), ("a", site.activation_stages)):
            quantizer = next((stage for stage in sequence if isinstance(stage, Quantizer)), None)
            bits.append(f"{letter}{quantizer.bits}" if quantizer else "")
        shape = "x".join(str(size) for size in site.shape)
        rows.append((site.name, shape, " ".join(stages) or "-", "".join(bits) or "float"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"left out: {one.name}: {one.reason}" for one in left_out]
    lines += [f"input stays float: {one.name}: {one.reason}" for one in float_inputs]
    lines += [f"not regularized: {one.name}: {one.reason}" for one in unregularized]
    return "\n".join(lines)
