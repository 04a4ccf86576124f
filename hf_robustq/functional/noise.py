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
    moved     x is [n, positions, channels] in memory, and its elements count as those of [n, channels, positions]
    """

    c: Tensor
    k: Tensor
    key: Tensor
    relative: bool = False
    moved: bool = False


def _mix(h: Tensor) -> Tensor:
    """A bijection of 32-bit words (held in int64, where its products do not overflow) in which every bit counts."""
    h = ((h ^ (h >> 16)) * 0x21F0AAAD) & WORD
    h = ((h ^ (h >> 15)) * 0x735A2D97) & WORD
    return h ^ (h >> 15)


def normal(x: Tensor, key: Tensor, moved: bool = False) -> Tensor:
    """Standard normal values in the shape of `x`: the i-th is a function of (key, i), by hashing and Box-Muller.

    i counts the elements of a contiguous `x`; `moved`: of `x` with its last two of three dimensions exchanged.
    """

    def count(size: int) -> Tensor:
        return torch.arange(size, device=key.device)

    if moved:
        n, positions, channels = x.shape
        i = (count(n)[:, None, None] * channels + count(channels)) * positions + count(positions)[:, None]
    else:
        i = count(x.numel()).view(x.shape)
    radius = _mix(i ^ (key & WORD))
    angle = _mix(radius ^ (key >> 32))
    u = ((radius >> 8) + 1).float() * 2.0**-24  # (0, 1]
    v = (angle >> 8).float() * (2.0**-24 * 2.0 * torch.pi)
    return torch.sqrt(-2.0 * torch.log(u)) * torch.cos(v)
