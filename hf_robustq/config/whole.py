"""The config of the plugin, to and from dict, YAML and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from hf_robustq.config.files import read_file
from hf_robustq.config.methods import (
    QuantizerConfig,
    RegularizerConfig,
    SatNLConfig,
    check_role,
    quantizer,
    regularizers,
    satnl,
)
from hf_robustq.options import OptionError, Range, check, check_fields, check_known, check_mapping, shown, under
from hf_robustq.quantizers import QUANTIZERS
from hf_robustq.regularizers import REGULARIZERS

BUDGETS = {
    "bits": Annotated[float, Range(0, 32, above=True)],
    "megabytes": Annotated[float, Range(0, 1e9, above=True)],
    "bit_operations": Annotated[float, Range(0, 1e20, above=True)],
}


@dataclass(frozen=True, kw_only=True)
class RobustQConfig:
    """What `RobustQ` does to a model.

    satnl                a saturating nonlinearity on every weight; None: none
    regularizers         penalties on the weights, in order
    budget               of bits that WaveQ learns, one of {"bits": 4} (their mean, each weight counting once),
                         {"megabytes": 10} and {"bit_operations": 1e9} (of the whole model, the latter for one sample)
    weights              quantizer of the weights in training; None: they train in float
    activations          quantizer of the inputs of the same layers; None: float
    include, exclude     fnmatch patterns of parameter names
    weights_only         fnmatch patterns of weights whose layer's input stays float
    first_last           first and last layer: "float" (not touched), 8 (quantized to 8 bits, not regularized, no
                         satnl), or "same" (like every other layer)
    embeddings           stage embedding tables too
    routers              stage what chooses experts too
    parameters           fnmatch patterns of parameters to stage besides, of modules that are no known layers: a
                         matrix [out, in], or a stack of matrices, each with steps of its own
    adapters             stage the layers of adapters too, LoRA's A and B (an adapter's folder then has the stages'
                         tensors, too, of which PEFT warns that they have one dimension)
    memory               "keep": quantized weights and inputs are kept for the backward; "recompute": it makes them
                         anew, which costs a quantization more and no memory, but for what satnl gives (not
                         together with gradient checkpointing, whose work it undoes)
    oscillations         "ignore"; "watch" weights that go back and forth between two levels; or "freeze" those that
                         do so more often than `freeze_above` (watching keeps 7 bytes a weight, freezing 12; one
                         process or DDP)
    calibration_samples  training samples that set activation steps
    seed                 of everything random in the plugin
    """

    satnl: SatNLConfig | None = None
    regularizers: tuple[RegularizerConfig, ...] = ()
    budget: Mapping[str, Any] | None = None
    weights: QuantizerConfig | None = None
    activations: QuantizerConfig | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    weights_only: tuple[str, ...] = ()
    first_last: Literal["float", 8, "same"] = "float"
    embeddings: bool = False
    routers: bool = False
    parameters: tuple[str, ...] = ()
    adapters: bool = False
    memory: Literal["keep", "recompute"] = "keep"
    oscillations: Literal["ignore", "watch", "freeze"] = "ignore"
    freeze_above: Annotated[float, "(a frequency)", Range(0, 1, above=True, below=True)] = 0.02
    calibration_samples: Annotated[int, Range(1, 2**31)] = 512
    seed: Annotated[int, Range(-(2**63), 2**63 - 1)] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        weights, uniform = self.weights, self.weights is not None and QUANTIZERS[self.weights.method].uniform
        learned = any(one.learns_bits for one in self.regularizers)
        names = [regularizer.method for regularizer in self.regularizers]
        if len(set(names)) < len(names):
            raise OptionError("regularizers", f"a regularizer is listed twice: {', '.join(names)}")
        for one in self.regularizers:
            if not one.fits(weights):
                known = " or ".join(REGULARIZERS[one.method].works_with)
                raise OptionError(f"regularizers.{one.method}", f"needs weights with method {known}")
        with under("weights"):
            check_role(weights, "weight")
        with under("activations"):
            check_role(self.activations, "input")
        if self.budget is not None:
            with under("budget"):
                check_known(self.budget, BUDGETS, "measure of budget")
            for key, value in self.budget.items():
                check(f"budget.{key}", value, BUDGETS[key])
            if len(self.budget) != 1:
                raise OptionError("budget", f"must be one of {', '.join(BUDGETS)}, got {shown(self.budget)}")
            if not learned:
                raise OptionError("budget", "bits are learned by the regularizer waveq: add it, with learn: true")
        if self.oscillations != "ignore" and not uniform:
            raise OptionError("oscillations", "needs weights with a quantizer that rounds to steps, such as lsq")
        if self.oscillations != "ignore" and learned:
            raise OptionError(
                "oscillations", "levels move while waveq learns bits: set it to ignore, or learn to false"
            )
        if self.satnl is not None and self.oscillations == "freeze":
            raise OptionError(
                "satnl", "weights cannot be frozen on the levels beyond it: watch oscillations, or drop one"
            )

    def requantized(self, weights: QuantizerConfig | None, activations: QuantizerConfig | None) -> Self:
        """With other quantizers, and without what does not go with them."""
        left = tuple(one for one in self.regularizers if one.fits(weights))
        rounds = weights is not None and QUANTIZERS[weights.method].uniform
        return replace(
            self,
            weights=weights,
            activations=activations,
            regularizers=left,
            budget=self.budget if any(one.learns_bits for one in left) else None,
            oscillations=self.oscillations if rounds else "ignore",
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that `to_dict` wrote; regularizers may also be `{"kure": {"strength": 1.0, "target": 1.8}}`."""
        check_known(check_mapping("", values, "config keys"), [f.name for f in fields(cls)], "config key")
        given = dict(values)
        builders = {"satnl": satnl, "weights": quantizer, "activations": quantizer, "regularizers": regularizers}
        for name, build in builders.items():
            if name in given and (given[name] is not None or name == "regularizers"):
                with under(name):
                    given[name] = build(given[name])
        for name in ("include", "exclude", "weights_only", "parameters"):
            if isinstance(given.get(name), str):
                given[name] = (given[name],)
            elif isinstance(given.get(name), list | set | frozenset):
                given[name] = tuple(given[name])
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, as JSON and YAML hold them."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a `.yaml`, `.yml` or `.json` file."""
        path = Path(path)
        if path.suffix not in (".yaml", ".yml", ".json"):
            raise ValueError(f"{path}: a config is a .yaml, .yml or .json file")
        values = read_file(path)
        if not values:
            raise ValueError(f"{path}: expected a mapping of config keys, and it holds none")
        try:
            return cls.from_dict(values)
        except OptionError as error:
            raise ValueError(f"{path}: {error}") from None
