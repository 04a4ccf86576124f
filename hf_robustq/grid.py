"""The integer grid a tensor is rounded to: the vocabulary every other file speaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from hf_robustq.options import Range, check

MIN_BITS, MAX_BITS = 2, 16
Bits = Annotated[int, Range(MIN_BITS, MAX_BITS)]


def check_bits(bits: int, what: str = "bits") -> int:
    """Return `bits` if it is a whole number from 2 to 16, else raise `ValueError`."""
    check(what, bits, Bits)
    return bits


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Uniform integers {low, ..., high} of `bits` storage bits, sign included.

    signed, narrow      -(2^(b-1) - 1) .. 2^(b-1) - 1    2^b - 1 levels, symmetric
    signed, not narrow  -2^(b-1) .. 2^(b-1) - 1          2^b levels
    unsigned            0 .. 2^b - 1                     2^b levels

    `axis` is the axis with one scale per entry (the output channels of a weight), or two of them with one scale per
    pair of entries (the matrices of a stack and their output channels); None for one scale per tensor.
    """

    bits: int
    signed: bool = True
    narrow: bool = False
    axis: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.narrow and not self.signed:
            raise ValueError("a narrow grid is a signed one: use signed=True or narrow=False")

    @property
    def low(self) -> int:
        if not self.signed:
            return 0
        return -(2 ** (self.bits - 1)) + int(self.narrow)

    @property
    def high(self) -> int:
        return 2 ** (self.bits - int(self.signed)) - 1

    @property
    def levels(self) -> int:
        return self.high - self.low + 1
