"""Settings: the ways a sweep quantizes a model, and how they are written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from hf_robustq.grid import check_bits
from hf_robustq.quantizers import LEARNED
from hf_robustq.scales import CODEBOOK_RULES, SCALE_RULES
from hf_robustq.scales.codebook import MOST_BITS

LAPQ = "lapq"

MODIFIERS: dict[str, tuple[str, Any]] = {
    "channel": ("per_channel", True),
    "asym": ("asymmetric", True),
    "full": ("full", True),
    "fold": ("fold", True),
    "bc": ("correction", "mean"),
    "bcv": ("correction", "variance"),
    "bn": ("reestimate", True),
    "pow2": ("power_of_two", "log"),
    "pow2v": ("power_of_two", "value"),
    "half_away": ("rounding", "half_away"),
    "floor": ("rounding", "floor"),
    "stochastic": ("rounding", "stochastic"),
    "wrap": ("overflow", "wrap"),
    "unclipped": ("overflow", "none"),
    "weights": ("perturb_inputs", False),
}
"""What may follow a method, and the field it sets; `x0.9` sets the ratio."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to quantize a model for evaluation, written `fp`, `trained` or `w4a8@method/modifier/...`.

    weights, activations   storage bits; None: float
    scale         the method: a name of `SCALE_RULES` or `CODEBOOK_RULES`, "lapq", or "learned": the model's own
                  quantizers at these bits, with the clip range they were trained to (s * high)
    trained       the model's own quantizers, as it was trained
    per_channel   /channel: a step per output channel of the weights
    asymmetric    /asym: an integer zero point, the range from min to max within what the method would clip at
    full          /full: weights take all 2^b levels -2^(b-1) .. 2^(b-1) - 1, not the narrow 2^b - 1
    fold          /fold: weights are quantized with the batch norm that follows folded into them
    correction    /bc: each output channel of a quantized weight gets the mean of the float one; /bcv: and its deviation
                  (arXiv 1810.05723)
    reestimate    /bn: batch-norm statistics anew, of the quantized model on the calibration set
    ratio         /x0.9: all steps times 0.9, on the same integers
    power_of_two  /pow2: the step 2^round(log2 step); /pow2v: the power of two nearest in value
    rounding      half_even; /half_away, /floor, /stochastic
    overflow      saturate; /wrap: as two's complement does; /unclipped: as many levels as it takes
    perturb_inputs   /weights: ratio, power of two, rounding and overflow are those of the weights only

    Weights take the narrow grid, activations the full one of their sign; with "learned", their own.
    """

    weights: int | None = None
    activations: int | None = None
    scale: str = "mse"
    per_channel: bool = False
    trained: bool = False
    asymmetric: bool = False
    full: bool = False
    fold: bool = False
    correction: Literal["none", "mean", "variance"] = "none"
    reestimate: bool = False
    ratio: float = 1.0
    power_of_two: Literal["no", "log", "value"] = "no"
    rounding: Literal["half_even", "half_away", "floor", "stochastic"] = "half_even"
    overflow: Literal["saturate", "wrap", "none"] = "saturate"
    perturb_inputs: bool = True

    def __post_init__(self) -> None:
        if self.trained and (self.weights or self.activations):
            raise ValueError("a setting is either trained or has bits of its own")
        for what, bits in (("weight bits", self.weights), ("activation bits", self.activations)):
            if bits is not None:
                check_bits(bits, what)
        for field, _ in MODIFIERS.values():
            if getattr(self, field) not in (getattr(type(self), field), *self._values(field)):
                raise ValueError(f"{field} cannot be {getattr(self, field)!r}")
        if not (self.weights or self.activations or self.trained) and self.scale != "mse":
            raise ValueError(f"{self.scale} needs weight or activation bits")
        known = [*SCALE_RULES, *CODEBOOK_RULES, LAPQ, LEARNED]
        if self.scale not in known:
            raise ValueError(f"unknown scale rule {self.scale!r}: known: {', '.join(known)}")
        if not 0 < self.ratio < float("inf"):
            raise ValueError(f"a step ratio must be positive, got {self.ratio:g}")
        self._check_codebook()
        self._check_own()

    def _check_codebook(self) -> None:
        if self.scale not in CODEBOOK_RULES:
            return
        if max(self.weights or 0, self.activations or 0) > MOST_BITS:
            raise ValueError(f"{self.scale} takes at most {MOST_BITS} bits")
        if self.activations and self.scale in ("dorefa", "aciq_levels"):
            raise ValueError(f"{self.scale} is for weights: leave the activations out")
        if self.scale == "aciq_levels" and not self.per_channel:
            raise ValueError("aciq_levels shares levels out among channels: add /channel")
        self._refuse("is for evenly spaced levels", "asymmetric", "full", "power_of_two", "rounding", "overflow")

    def _check_own(self) -> None:
        if self.scale == LEARNED or self.trained:
            if self.per_channel:
                raise ValueError("the learned steps are per tensor or per channel as they were trained: drop /channel")
            own = "does not go with the model's own quantizers"
            self._refuse(own, "asymmetric", "full", "fold", "correction", "rounding", "overflow")
        elif not self.weights:
            self._refuse("is for weights", "per_channel", "full", "fold", "correction")
        if not (self.weights or self.activations or self.trained):
            self._refuse("needs bits", "asymmetric", "ratio", "power_of_two", "rounding", "overflow")
        if self.fold and self.reestimate:
            raise ValueError("a folded batch norm has no statistics to re-estimate: drop /fold or /bn")

    def _refuse(self, why: str, *fields: str) -> None:
        for field, text in self._modified():
            if field in fields:
                raise ValueError(f"/{text} {why}{f' ({self.scale} has none)' if self.scale in CODEBOOK_RULES else ''}")

    @staticmethod
    def _values(field: str) -> list[Any]:
        """What the modifiers can set a field to."""
        return [value for own, value in MODIFIERS.values() if own == field]

    def _modified(self) -> list[tuple[str, str]]:
        """(field, text) of what is not as usual."""
        found = [(field, text) for text, (field, value) in MODIFIERS.items() if getattr(self, field) == value]
        return found + ([("ratio", f"x{self.ratio:.12g}")] if self.ratio != 1 else [])

    @classmethod
    def parse(cls, text: str) -> Self:
        head, *modifiers = text.split("/")
        match = re.fullmatch(r"(?:w(\d+))?(?:a(\d+))?(?:@(\w+))?", head)
        own = head in ("fp", "trained")
        if not own and (match is None or not (match[1] or match[2])):
            raise ValueError(
                f"cannot read setting {text!r}: write fp, trained, w4, w4a8, w4@absmax or w4@mse/channel/x0.9"
            )
        values: dict[str, Any] = {}
        for modifier in modifiers:
            ratio = re.fullmatch(r"x(\d+\.?\d*)", modifier)
            if not ratio and modifier not in MODIFIERS:
                raise ValueError(f"unknown modifier /{modifier} in {text!r}: known: x0.9, {', '.join(MODIFIERS)}")
            field, value = ("ratio", float(ratio[1])) if ratio else MODIFIERS[modifier]
            if field in values:
                raise ValueError(f"{text!r} says /{modifier} besides another of its kind")
            values[field] = value
        if own or match is None:
            values["trained"] = head == "trained"
        else:
            values |= {"weights": int(match[1]) if match[1] else None, "scale": match[3] or "mse"}
            values["activations"] = int(match[2]) if match[2] else None
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from None

    @property
    def name(self) -> str:
        """The shortest text that `parse` reads back; `_` instead of `@` and `/` makes it a metric's name."""
        modifiers = [text for _, text in self._modified()]
        bits = (f"w{self.weights}" if self.weights else "") + (f"a{self.activations}" if self.activations else "")
        scale = "" if not bits or (self.scale == "mse" and not modifiers) else f"@{self.scale}"
        return "/".join([("trained" if self.trained else bits or "fp") + scale, *modifiers])

    @property
    def key(self) -> str:
        return re.sub(r"[@/]", "_", self.name)

    @property
    def own(self) -> bool:
        """Whether it keeps the model's own quantizers."""
        return self.trained or self.scale == LEARNED

    @property
    def needs_calibration(self) -> bool:
        """Whether it reads training samples itself."""
        return self.reestimate or (self.scale == LAPQ and not self.trained)

    @property
    def plain(self) -> bool:
        """Whether a step and the integer range of a grid say all of it."""
        changed = self.asymmetric or self.fold or self.correction != "none"
        usual = (self.rounding, self.overflow) == ("half_even", "saturate")
        return usual and not changed and self.scale not in CODEBOOK_RULES

    @property
    def steps(self) -> Setting:
        """The setting whose steps this one starts from: without what is done to them afterwards."""
        return replace(self.unperturbed, correction="none", reestimate=False)

    @property
    def unperturbed(self) -> Setting:
        """The same without what hardware does to steps, rounding and range."""
        usual = {"ratio": 1.0, "power_of_two": "no", "rounding": "half_even", "overflow": "saturate"}
        return replace(self, **usual, perturb_inputs=True)


def parse_settings(settings: Sequence[Setting | str]) -> list[Setting]:
    """Settings, read where they are text. Raises `ValueError` for one that is listed twice."""
    parsed = [Setting.parse(setting) if isinstance(setting, str) else setting for setting in settings]
    if len({setting.name for setting in parsed}) < len(parsed):
        raise ValueError(f"a setting is listed twice: {', '.join(setting.name for setting in parsed)}")
    return parsed


DEFAULT_SETTINGS = tuple(Setting.parse(s) for s in ["fp", "w8", "w6", "w5", "w4", "w3", "w2", "w8a8", "w6a6", "w4a4"])
