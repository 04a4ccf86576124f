"""Normal noise as a pure function of a key and a position, alike on every device and in compiled code."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


class Noise(NamedTuple):
    """Quantization-error-aware noise: c * exp(-k * e) * sqrt(e) * eps, e = |Q(x) - x| (arXiv 2212.05603, eq. 7).

    c, k      0-dim float32; `relative`: k counts in steps, exp(-k * e / s)
    key       0-dim int64 in [0, 2^63): what eps is a function of, besides the position
    places    what the positions of x's elements are the sum of, broadcast: see `moved_places`; default: x is contiguous
    """

    c: Tensor
    k: Tensor
    key: Tensor
    relative: bool = False
    places: tuple[Tensor, Tensor, Tensor] | None = None


def _mix(h: Tensor) -> Tensor:
    """A bijection of 32-bit words (held in int64, where its products do not overflow) in which every bit counts."""
    h = ((h ^ (h >> 16)) * 0x21F0AAAD) & WORD
    h = ((h ^ (h >> 15)) * 0x735A2D97) & WORD
    return h ^ (h >> 15)


def moved_places(n: int, positions: int, channels: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where the elements of an [n, positions, channels] tensor lie in the same one as [n, channels, positions].

    Made outside the kernel, which is ten times slower on a CPU where it counts in three dimensions by itself.
    """
    first, second, third = (torch.arange(size, device=device) for size in (n, positions, channels))
    return first[:, None, None] * (positions * channels), second[:, None], third * positions


def normal(x: Tensor, key: Tensor, places: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    """Standard normal values in the shape of `x`: that at position i is a function of (key, i): hash and Box-Muller."""
    if places is None:
        i = torch.arange(x.numel(), device=key.device).view(x.shape)
    else:
        i = places[0] + places[1] + places[2]
    radius = _mix(i ^ (key & WORD))
    angle = _mix(radius ^ (key >> 32))
    u = ((radius >> 8) + 1).float() * 2.0**-24  # (0, 1]
    v = (angle >> 8).float() * (2.0**-24 * 2.0 * torch.pi)
    return torch.sqrt(-2.0 * torch.log(u)) * torch.cos(v)
