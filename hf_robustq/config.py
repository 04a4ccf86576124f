"""Configuration: frozen dataclasses, to and from dict, YAML and JSON. Unknown keys are errors."""

from __future__ import annotations

import difflib
import inspect
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

import yaml

from hf_robustq.grid import check_bits
from hf_robustq.quantizers import QUANTIZERS
from hf_robustq.regularizers import REGULARIZERS
from hf_robustq.reparam import SATURATING
from hf_robustq.scales import SCALE_RULES
from hf_robustq.schedules import SCHEDULES


def check_known(keys: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise `ValueError` for the first key that is not known, naming the nearest one that is."""
    known = list(known)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"unknown {what} {key!r}: {hint}")


KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list of texts"}


def _check_type(name: str, value: Any, default: Any) -> None:
    """Raise `ValueError` for a value of another type than the default's, where that says which."""
    kind = type(default)
    wrong = not isinstance(value, (int, float) if kind is float else kind) or (kind is not bool and value is True)
    if kind in KINDS and wrong:
        raise ValueError(f"{name} must be {KINDS[kind]}, got {value!r}")


def _check_types(config: Any) -> None:
    """`_check_type` of every field."""
    for one in fields(config):
        value = getattr(config, one.name)
        if one.name != "first_last":
            _check_type(one.name, value, one.default)
        if type(one.default) is tuple and one.name != "regularizers" and not all(isinstance(x, str) for x in value):
            raise ValueError(f"{one.name} must be {KINDS[tuple]}, got {value!r}")


def option_names(method: type) -> list[str]:
    """The options a method's constructor takes, besides the grid it is given."""
    return [name for name in inspect.signature(method).parameters if name not in ("grid", "channels", "role")]


def _check_options(name: str, method: type, options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for an option that a method does not take, or not of this type."""
    check_known(options, option_names(method), f"option of {name}")
    for key, value in options.items():
        _check_type(f"{name}: {key}", value, inspect.signature(method).parameters[key].default)


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """How a tensor is quantized in training.

    method       a name of `QUANTIZERS`
    bits         storage bits, sign included, 2 to 16
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
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_types(self)
        check_bits(self.bits)
        check_known([self.method], QUANTIZERS, "quantizer")
        check_known([] if self.scale is None else [self.scale], SCALE_RULES, "scale rule")
        if self.scale is not None and not QUANTIZERS[self.method].calibrated:
            raise ValueError(f"{self.method}: has no steps to set by a rule: leave scale out")
        _check_options(self.method, QUANTIZERS[self.method], self.options)


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
        _check_types(self)
        check_known([self.method], REGULARIZERS, "regularizer")
        check_known([self.schedule], SCHEDULES, "schedule")
        _check_options(self.method, REGULARIZERS[self.method], self.options)
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
        _check_types(self)
        check_known([self.function], SATURATING, "function of satnl")
        number = isinstance(self.d, (int, float)) and not isinstance(self.d, bool)
        if self.d is not None and not (number and 0 < self.d < math.inf):
            raise ValueError(f"satnl: d must be a positive number, got {self.d!r}")


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
    memory: Literal["keep", "recompute"] = "keep"
    oscillations: Literal["ignore", "watch", "freeze"] = "ignore"
    freeze_above: float = 0.02
    calibration_samples: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
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
            given["regularizers"] = tuple(_nested(RegularizerConfig, "regularizers", one) for one in regularizers)
        for name in ("weights", "activations"):
            if given.get(name) is not None:
                given[name] = _nested(QuantizerConfig, name, given[name])
        if given.get("satnl") is not None and not isinstance(given["satnl"], SatNLConfig):
            values = given["satnl"]
            if not isinstance(values, Mapping):
                raise ValueError(f"satnl: expected a mapping of options, got {values!r}")
            check_known(values, [f.name for f in fields(SatNLConfig)], "key of satnl")
            given["satnl"] = SatNLConfig(**values)
        for name in ("include", "exclude", "weights_only"):
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


def _nested(cls: type[Any], where: str, values: Any) -> Any:
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
