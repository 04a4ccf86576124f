"""The config of the plugin, to and from dict, YAML and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

import yaml

from hf_robustq.config.checks import check_known, check_types
from hf_robustq.config.methods import QuantizerConfig, RegularizerConfig, SatNLConfig, nested
from hf_robustq.quantizers import QUANTIZERS
from hf_robustq.regularizers import REGULARIZERS


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
    budget: Mapping[str, float] | None = None
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
    freeze_above: float = 0.02
    calibration_samples: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        if self.first_last not in ("float", 8, "same"):
            raise ValueError(f"first_last must be 'float', 8 or 'same', got {self.first_last!r}")
        if self.oscillations not in ("ignore", "watch", "freeze"):
            raise ValueError(f"oscillations must be 'ignore', 'watch' or 'freeze', got {self.oscillations!r}")
        if not 0 < self.freeze_above < 1:
            raise ValueError(f"freeze_above is a frequency between 0 and 1, got {self.freeze_above!r}")
        if self.memory not in ("keep", "recompute"):
            raise ValueError(f"memory must be 'keep' or 'recompute', got {self.memory!r}")
        if self.calibration_samples < 1:
            raise ValueError(f"calibration_samples must be at least 1, got {self.calibration_samples!r}")
        if self.activations is not None and self.activations.per_channel:
            raise ValueError("activations are quantized per tensor: remove per_channel from activations")
        for regularizer in self.regularizers:
            if not regularizer.fits(self.weights):
                known = " or ".join(REGULARIZERS[regularizer.method].works_with)
                raise ValueError(f"{regularizer.method}: needs weights with method {known}")
        if self.oscillations != "ignore" and (self.weights is None or not QUANTIZERS[self.weights.method].uniform):
            raise ValueError("oscillations: needs weights with a quantizer that rounds to steps, such as lsq")
        if self.budget is not None:
            self._check_budget()
        if self.oscillations != "ignore" and any(one.learns_bits for one in self.regularizers):
            raise ValueError("oscillations: levels move while waveq learns bits: set it to ignore, or learn to false")
        if self.satnl is not None and self.oscillations == "freeze":
            raise ValueError("satnl: weights cannot be frozen on the levels beyond it: watch oscillations, or drop one")
        names = [regularizer.method for regularizer in self.regularizers]
        if len(set(names)) < len(names):
            raise ValueError(f"a regularizer is listed twice: {', '.join(names)}")

    def _check_budget(self) -> None:
        check_known(self.budget or {}, ("bits", "megabytes", "bit_operations"), "measure of budget")
        values = list((self.budget or {}).values())
        number = all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < math.inf for v in values)
        if len(values) != 1 or not number:
            raise ValueError(
                f"budget: one of bits, megabytes, bit_operations and a positive number, got {self.budget!r}"
            )
        if not any(one.learns_bits for one in self.regularizers):
            raise ValueError("budget: bits are learned by the regularizer waveq: add it, with learn: true")

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
        check_known(values, [f.name for f in fields(cls)], "config key")
        given = dict(values)
        regularizers = given.get("regularizers", ())
        if isinstance(regularizers, Mapping):
            regularizers = [{"method": name, **(options or {})} for name, options in regularizers.items()]
        if "regularizers" in given:
            given["regularizers"] = tuple(nested(RegularizerConfig, "regularizers", one) for one in regularizers)
        for name in ("weights", "activations"):
            if given.get(name) is not None:
                given[name] = nested(QuantizerConfig, name, given[name])
        if given.get("satnl") is not None and not isinstance(given["satnl"], SatNLConfig):
            values = given["satnl"]
            if not isinstance(values, Mapping):
                raise ValueError(f"satnl: expected a mapping of options, got {values!r}")
            check_known(values, [f.name for f in fields(SatNLConfig)], "key of satnl")
            given["satnl"] = SatNLConfig(**values)
        for name in ("include", "exclude", "weights_only", "parameters"):
            if name in given:
                given[name] = (given[name],) if isinstance(given[name], str) else tuple(given[name])
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
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a mapping of config keys")
        return cls.from_dict(values)
