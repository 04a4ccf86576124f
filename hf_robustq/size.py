"""How large a model is, and how much it computes, at the bits its quantizers have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from torch import nn

from hf_robustq.calibrate import own_buffers, stages, weight_probe
from hf_robustq.products import Products
from hf_robustq.quantizers import QUANTIZERS, Quantizer
from hf_robustq.sharded import whole_shape
from hf_robustq.sites import Site

FLOAT_BITS = 32
"""Of what is not quantized, whatever dtype it is trained in."""

LAYER = {"name": str, "weights": int, "bits": float, "activation_bits": float, "steps": int, "macs": float, "grid": str}
SIZE = {
    "bits": float, "others": int, "layers": [LAYER],
    "products?": ({"staged": int, "unstaged": {str: int}}, None),
}  # fmt: skip
"""What `Size.to_dict` gives: see `hf_robustq.shapes`."""


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """One weight.

    weights          number of elements
    bits             storage bits of each, sign included
    activation_bits  of the layer's input
    steps            number of scales
    macs             multiply-accumulates for one sample, as calibration saw them; 0: not counted
    grid             its quantizer's method and number of levels; empty: none
    """

    name: str
    weights: int
    bits: int
    activation_bits: int
    steps: int
    macs: float
    grid: str

    @property
    def quantized(self) -> bool:
        """Whether it has a quantizer."""
        return bool(self.grid)

    @property
    def megabytes(self) -> float:
        """10^6 bytes, its scales included."""
        return (self.weights * self.bits + self.steps * FLOAT_BITS) / 8e6

    @property
    def bit_operations(self) -> float:
        """macs * bits of the weight * bits of the input (Baskin et al., UNIQ)."""
        return self.macs * self.bits * self.activation_bits


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model: its staged weights, and how many other elements it stores (biases, norms, layers left out).

    products   the weights it multiplies by, staged and not, once calibrated
    """

    layers: tuple[LayerSize, ...]
    others: int
    products: Products | None = None

    @property
    def bits(self) -> float:
        """Mean storage bits of the elements of the quantized weights; NaN where there are none."""
        quantized = [layer for layer in self.layers if layer.quantized]
        total = sum(layer.weights for layer in quantized)
        return sum(layer.weights * layer.bits for layer in quantized) / total if total else float("nan")

    @property
    def megabytes(self) -> float:
        """10^6 bytes of the whole model."""
        return sum(layer.megabytes for layer in self.layers) + self.others * FLOAT_BITS / 8e6

    @property
    def float_megabytes(self) -> float:
        """The same in float."""
        return (sum(layer.weights for layer in self.layers) + self.others) * FLOAT_BITS / 8e6

    @property
    def bit_operations(self) -> float:
        """Of the staged layers, for one sample."""
        return sum(layer.bit_operations for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        totals = ("bits", "megabytes", "float_megabytes", "bit_operations")
        layers = [asdict(layer) for layer in self.layers]
        products = self.products and self.products.to_dict()
        own = {"others": self.others, "layers": layers, "products": products}
        return {**{name: getattr(self, name) for name in totals}, **own}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` gave."""
        products = values.get("products")
        return cls(
            layers=tuple(LayerSize(**one) for one in values["layers"]),
            others=values["others"],
            products=Products.from_dict(products) if products else None,
        )

    def __str__(self) -> str:
        """A Markdown table."""
        heads = ("weight", "elements", "bits", "grid", "input bits", "MB", "bit-operations")
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for one in self.layers:
            counted = f"{one.bit_operations:.3g}" if one.macs else "not counted"
            grid, size = one.grid or "float", f"{one.megabytes:.4g}"
            cells = (one.name, f"{one.weights:,}", one.bits, grid, one.activation_bits, size, counted)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        for name, count in self.products.unstaged.items() if self.products is not None else ():
            megabytes = count * FLOAT_BITS / 8e6
            lines.append(f"| {name} | {count:,} | {FLOAT_BITS} | float, not staged | | {megabytes:.4g} | |")
        total = f"{self.megabytes:.4g} of {self.float_megabytes:.4g} in float"
        everything = f"all, with {self.others:,} elements of no staged weight"
        share = f" of {self.products.share:.0%}" if self.products is not None and self.products.unstaged else ""
        lines.append(f"| {everything} | | {self.bits:.2f}{share} | | | {total} | {self.bit_operations:.3g} |")
        return "\n".join(lines)


def _grid(quantizer: Quantizer) -> str:
    (method,) = (name for name, kind in QUANTIZERS.items() if kind is type(quantizer))
    return f"{method}, {int(quantizer.high - quantizer.low) + 1} levels"


def size(model: nn.Module, sites: Sequence[Site]) -> Size:
    """The size of a staged model, at the bits its quantizers have now."""
    seen = {id(parameter) for stage in stages(sites) for parameter in stage.parameters()}
    layers = []
    for site in sites:
        if id(site.parameter) in seen:
            continue
        seen.add(id(site.parameter))
        weight, activation = (
            sequence._modules.get("quantizer") for sequence in (site.weight_stages, site.activation_stages)
        )
        layers.append(
            LayerSize(
                name=site.name,
                weights=site.shape.numel(),
                bits=weight.bits if isinstance(weight, Quantizer) else FLOAT_BITS,
                activation_bits=activation.bits if isinstance(activation, Quantizer) else FLOAT_BITS,
                steps=weight.channels if isinstance(weight, Quantizer) else 0,
                macs=float(weight_probe(site).macs),
                grid=_grid(weight) if isinstance(weight, Quantizer) else "",
            )
        )
    own = set(own_buffers(model, sites))
    others = [whole_shape(p) for p in model.parameters() if id(p) not in seen]
    others += [b.shape for name, b in model.named_buffers() if name not in own and b.is_floating_point()]
    return Size(layers=tuple(layers), others=sum(shape.numel() for shape in others))
