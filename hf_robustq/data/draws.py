"""Random draws that are a pure function of (seed, epoch, index).

SplitMix64: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, figure 16:
draw k of a stream that starts at `state` is mix(state + k gamma), k = 1, 2, ...
Here state = absorb(absorb(absorb(0, seed), epoch), index), absorb(state, word) = mix((state ^ word) + gamma).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
WORD = 2**64


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draws(seed: int, epoch: int, indices: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """`count` independent 64-bit draws for each of N indices: uint64 [N, count]."""
    # Arrays throughout, also for one word: numpy warns when a scalar wraps around, not when an array does.
    state = np.zeros(1, np.uint64)
    for word in (seed, epoch):
        state = _mix((state ^ np.uint64(word % WORD)) + np.uint64(GAMMA))
    state = _mix((state ^ np.asarray(indices).astype(np.uint64)) + np.uint64(GAMMA))
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GAMMA)
    return _mix(state[:, None] + steps)


def shared_epoch(epoch: int = 0) -> Tensor:
    """The epoch, int64 scalar in shared memory: DataLoader workers, persistent ones too, see it change."""
    return torch.tensor(epoch).share_memory_()
