"""The config of one quantizer, regularizer or reparametrization."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

from hf_robustq.config.checks import check_known, check_options, check_types, option_names
from hf_robustq.grid import check_bits
from hf_robustq.quantizers import QUANTIZERS
from hf_robustq.regularizers import REGULARIZERS
from hf_robustq.reparam import SATURATING
from hf_robustq.scales import SCALE_RULES
from hf_robustq.schedules import SCHEDULES


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """How a tensor is quantized in training.

    method       a name of `QUANTIZERS`
    bits         storage bits, sign included, 2 to 16
    mixed        bits of some layers, {"encoder.layer.0.*": 5}: by fnmatch patterns of the weights' names, the first
                 that matches; the rest has `bits`
    per_channel  one step per output channel (weights only)
    narrow       2^b - 1 symmetric levels instead of 2^b; default: of weights with method fixed only
    scale        a name of `SCALE_RULES`: how calibration sets the first steps; default: the method's own rule
    options      what the method's own constructor takes
    """

    bits: int
    method: str = "fixed"
    per_channel: bool = False
    narrow: bool | None = None
    scale: str | None = None
    mixed: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)
        check_bits(self.bits)
        if not isinstance(self.mixed, Mapping) or not all(isinstance(pattern, str) for pattern in self.mixed):
            raise ValueError(f"mixed must be a mapping of patterns to bits, got {self.mixed!r}")
        for pattern, bits in self.mixed.items():
            check_bits(bits, f"mixed: bits of {pattern}")
        check_known([self.method], QUANTIZERS, "quantizer")
        check_known([] if self.scale is None else [self.scale], SCALE_RULES, "scale rule")
        if self.scale is not None and not QUANTIZERS[self.method].calibrated:
            raise ValueError(f"{self.method}: has no steps to set by a rule: leave scale out")
        check_options(self.method, QUANTIZERS[self.method], self.options)

    def bits_of(self, name: str) -> int:
        """Of the weight with this name, or of its layer's input."""
        return next((bits for pattern, bits in self.mixed.items() if fnmatchcase(name, pattern)), self.bits)


@dataclass(frozen=True, kw_only=True)
class RegularizerConfig:
    """How a weight is regularized: `strength` (lambda) times a schedule of `SCHEDULES`, averaged over the weights.

    every   act at every n-th optimizer step only, n times as strongly
    """

    method: str
    strength: float = 1.0
    schedule: str = "constant"
    every: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)
        check_known([self.method], REGULARIZERS, "regularizer")
        check_known([self.schedule], SCHEDULES, "schedule")
        check_options(self.method, REGULARIZERS[self.method], self.options)
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"{self.method}: strength must be 0 or more, got {self.strength!r}")
        if self.every < 1:
            raise ValueError(f"{self.method}: every must be at least 1, got {self.every!r}")

    @property
    def learns_bits(self) -> bool:
        """Whether it learns the bits of weights."""
        return self.method == "waveq" and bool(self.options.get("learn", True))

    def fits(self, weights: QuantizerConfig | None) -> bool:
        """Whether it works on weights with this quantizer."""
        known = REGULARIZERS[self.method].works_with
        return not known or (weights is not None and weights.method in known)


@dataclass(frozen=True, kw_only=True)
class SatNLConfig:
    """A saturating nonlinearity on every weight: the options of `SatNL`."""

    function: str = "tanh"
    d: float | None = None
    invert: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        check_known([self.function], SATURATING, "function of satnl")
        number = isinstance(self.d, (int, float)) and not isinstance(self.d, bool)
        if self.d is not None and not (number and 0 < self.d < math.inf):
            raise ValueError(f"satnl: d must be a positive number, got {self.d!r}")


def nested(cls: type[Any], where: str, values: Any) -> Any:
    """One nested config; keys that are no field are the method's own options."""
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a mapping of options, got {values!r}")
    own = [f.name for f in fields(cls)]
    table, default = (QUANTIZERS, "fixed") if cls is QuantizerConfig else (REGULARIZERS, None)
    method = values.get("method", default)
    check_known([method], table, "quantizer" if cls is QuantizerConfig else "regularizer")
    given = {key: value for key, value in values.items() if key in own}
    options = {key: value for key, value in values.items() if key not in own}
    check_known(options, [*option_names(table[method]), *own], f"key of {method}")
    missing = [
        f.name for f in fields(cls) if f.name not in given and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{where}: {missing[0]} is missing")
    return cls(**{**given, "options": {**given.get("options", {}), **options}})
