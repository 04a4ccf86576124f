"""The config of one quantizer, regularizer or reparametrization."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from hf_robustq.grid import Bits
from hf_robustq.options import (
    OptionError,
    Range,
    check_fields,
    check_known,
    check_mapping,
    check_options,
    option_names,
    shown,
    under,
)
from hf_robustq.quantizers import QUANTIZERS
from hf_robustq.regularizers import REGULARIZERS
from hf_robustq.reparam import SatNL
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

    bits: Bits
    method: str = "fixed"
    per_channel: bool = False
    narrow: bool | None = None
    scale: str | None = None
    mixed: Mapping[str, Bits] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        check_name("method", self.method, QUANTIZERS, "quantizer")
        method = QUANTIZERS[self.method]
        if self.scale is not None:
            check_name("scale", self.scale, SCALE_RULES, "scale rule")
            if not method.calibrated:
                raise OptionError("scale", f"{self.method} has no steps to set by a rule: leave scale out")
        check_options(self.method, method, self.options)

    def bits_of(self, name: str) -> int:
        """Of the weight with this name, or of its layer's input."""
        return next((bits for pattern, bits in self.mixed.items() if fnmatchcase(name, pattern)), self.bits)


@dataclass(frozen=True, kw_only=True)
class RegularizerConfig:
    """How a weight is regularized: `strength` (lambda) times a schedule of `SCHEDULES`, averaged over the weights.

    every   act at every n-th optimizer step only, n times as strongly
    """

    method: str
    strength: Literal[0] | Annotated[float, Range(1e-12, 1e6)] = 1.0
    schedule: str = "constant"
    every: Annotated[int, Range(1, 1_000_000)] = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("method", self.method, REGULARIZERS, "regularizer")
        with under(self.method):
            check_fields(self)
            check_name("schedule", self.schedule, SCHEDULES, "schedule")
            check_options(self.method, REGULARIZERS[self.method], self.options)

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
        check_options("satnl", SatNL, vars(self))


def check_name(key: str, value: Any, known: Mapping[str, Any], what: str) -> None:
    """Raise `OptionError` for what is not a name of a table."""
    with under(key):
        check_known([value], known, what)


def check_role(config: QuantizerConfig | None, role: Literal["weight", "input"]) -> None:
    """Raise `OptionError` for a quantizer that cannot quantize such tensors."""
    if config is None:
        return
    method = QUANTIZERS[config.method]
    if role == "input" and config.per_channel:
        raise OptionError("per_channel", "inputs are quantized per tensor: remove per_channel from activations")
    if role not in method.roles:
        raise OptionError("method", f"{config.method} quantizes weights only: inputs take fixed, lsq or another method")
    if method.only_narrow and config.narrow is False:
        raise OptionError("narrow", f"the grid of {config.method} is symmetric: leave narrow out")


def quantizer(values: Any) -> QuantizerConfig:
    """One from its mapping; keys that are no field are the method's own options."""
    if isinstance(values, QuantizerConfig):
        return values
    method = check_mapping("", values).get("method", "fixed")
    check_name("method", method, QUANTIZERS, "quantizer")
    return _of(QuantizerConfig, QUANTIZERS[method], {**values, "method": method})


def regularizers(values: Any) -> tuple[RegularizerConfig, ...]:
    """All from a mapping of names to options, or from a list of mappings with their `method`."""
    if isinstance(values, Mapping):
        check_known(values, REGULARIZERS, "regularizer")
        return tuple(_regularizer(name, options) for name, options in values.items())
    if not isinstance(values, list | tuple):
        raise OptionError("", f"expected a mapping of names to options, got {shown(values)}: write {{kure: {{}}}}, say")
    given: list[RegularizerConfig] = []
    for i, one in enumerate(values):
        if not isinstance(one, RegularizerConfig):
            method: Any = check_mapping(f"[{i}]", one).get("method")
            check_name(f"[{i}].method", method, REGULARIZERS, "regularizer")
            one = _regularizer(method, one)
        given.append(one)
    return tuple(given)


def _regularizer(name: str, values: Any) -> RegularizerConfig:
    with under(name):
        if values is None or isinstance(values, bool):
            raise OptionError("", f"expected a mapping of options, got {shown(values)}: write {{}}, or leave it out")
        if check_mapping("", values).get("method", name) != name:
            raise OptionError("method", f"must be {name!r} or left out, got {shown(values['method'])}")
    return _of(RegularizerConfig, REGULARIZERS[name], {**values, "method": name}, name)


def satnl(values: Any) -> SatNLConfig:
    """One from its mapping."""
    if isinstance(values, SatNLConfig):
        return values
    check_known(check_mapping("", values), option_names(SatNL), "key of satnl")
    return SatNLConfig(**values)


def _of(cls: type[Any], method: type, values: Mapping[Any, Any], key: str = "") -> Any:
    """A nested config. Its keys that are no field are options, which may also be together under `options`."""
    own = [f.name for f in fields(cls)]
    with under(key) if key else nullcontext():
        check_known(values, [*option_names(method), *own], f"key of {values['method']}")
        together = check_mapping("options", values.get("options", {}))
        beside = {name: value for name, value in values.items() if name not in own}
        for name in beside.keys() & together.keys():
            raise OptionError(name, "is there twice, under options too: remove one")
        for one in fields(cls):
            if one.name not in values and one.default is MISSING and one.default_factory is MISSING:
                raise OptionError(one.name, "is missing")
    given = {name: value for name, value in values.items() if name in own}
    return cls(**{**given, "options": {**together, **beside}})
