"""Settings: the ways a sweep quantizes a model, and how they are written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from hf_robustq.grid import check_bits
from hf_robustq.quantizers import LEARNED
from hf_robustq.scales import SCALE_RULES


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to quantize a model for evaluation: `fp`, `trained`, `w4`, `w4a8`, `w4@absmax` or `w4@mse/channel`.

    weights, activations   storage bits; None: float
    scale                  a name of `SCALE_RULES`, or "learned": the model's own quantizers at these bits, with the
                           clip range they were trained to (s * high)
    per_channel            a step per output channel of the weights
    trained                the model's own quantizers, as it was trained
    Weights take the narrow grid of 2^b - 1 levels, activations the full one of 2^b; with "learned", their own.
    """

    weights: int | None = None
    activations: int | None = None
    scale: str = "mse"
    per_channel: bool = False
    trained: bool = False

    def __post_init__(self) -> None:
        if self.trained and (self.weights or self.activations):
            raise ValueError("a setting is either trained or has bits of its own")
        for what, bits in (("weight bits", self.weights), ("activation bits", self.activations)):
            if bits is not None:
                check_bits(bits, what)
        if self.scale not in (*SCALE_RULES, LEARNED):
            raise ValueError(f"unknown scale rule {self.scale!r}: known: {', '.join([*SCALE_RULES, LEARNED])}")
        if self.scale == LEARNED and self.per_channel:
            raise ValueError("the learned steps are per tensor or per channel as they were trained: drop /channel")

    @classmethod
    def parse(cls, text: str) -> Self:
        if text in ("fp", "trained"):
            return cls(trained=text == "trained")
        match = re.fullmatch(r"(?:w(\d+))?(?:a(\d+))?(?:@(\w+))?(/channel)?", text)
        if match is None or not (match[1] or match[2]):
            raise ValueError(f"cannot read setting {text!r}: write fp, trained, w4, w4a8, w4@absmax or w4@mse/channel")
        weights, activations = (int(bits) if bits else None for bits in match.groups()[:2])
        return cls(weights=weights, activations=activations, scale=match[3] or "mse", per_channel=bool(match[4]))

    @property
    def name(self) -> str:
        """The shortest text that `parse` reads back; `_` instead of `@` and `/` makes it a metric's name."""
        if self.trained:
            return "trained"
        bits = (f"w{self.weights}" if self.weights else "") + (f"a{self.activations}" if self.activations else "")
        scale = "" if self.scale == "mse" and not self.per_channel else f"@{self.scale}"
        return (bits + scale + ("/channel" if self.per_channel else "")) if bits else "fp"

    @property
    def key(self) -> str:
        return re.sub(r"[@/]", "_", self.name)


def parse_settings(settings: Sequence[Setting | str]) -> list[Setting]:
    """Settings, read where they are text. Raises `ValueError` for one that is listed twice."""
    parsed = [Setting.parse(setting) if isinstance(setting, str) else setting for setting in settings]
    if len(set(parsed)) < len(parsed):
        raise ValueError(f"a setting is listed twice: {', '.join(setting.name for setting in parsed)}")
    return parsed


DEFAULT_SETTINGS = tuple(Setting.parse(s) for s in ["fp", "w8", "w6", "w5", "w4", "w3", "w2", "w8a8", "w6a6", "w4a4"])
