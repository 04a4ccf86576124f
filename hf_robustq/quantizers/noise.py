"""Noise-tempered LSQ: error-aware quantization through noise tempering (arXiv 2212.05603)."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import torch
from torch import Tensor

from hf_robustq.functional import Noise, fake_quantize
from hf_robustq.grid import Grid
from hf_robustq.options import Range, check_known, checked, under
from hf_robustq.quantizers.lsq import LSQ
from hf_robustq.quantizers.quantizer import Role
from hf_robustq.schedules import SCHEDULES
from hf_robustq.stage import Moment


class NoiseTempered(LSQ):
    """LSQ plus, in training, noise that depends on the quantization error (eq. 7 to 9):

        Q(x) + c * exp(-k * e) * sqrt(e) * eps,   e = |Q(x) - x|,   eps ~ N(0, 1) for each element

    No gradient goes through the noise; c = 0 is LSQ to the bit. eps is a function of (seed, optimizer step,
    micro-batch, site, position in the tensor): alike under checkpointing, after resuming and on every rank.

    c                0.2 to 0.4 in the paper
    k                per unit of x, 50 in the paper; with `k_relative` per step: exp(-k * e / s)
    schedule         of c over training, a name of `SCHEDULES`
    noise_lr_scale   c follows the learning rate: c * lr / (its value at the start)

    Choice: the paper does not say how steps begin and are scaled, nor whether inputs get noise: they are LSQ's,
    and noise acts where this is the config's method.
    """

    @checked("noise")
    def __init__(
        self,
        grid: Grid,
        channels: int = 1,
        role: Role = "weight",
        c: Annotated[float, Range(0, 100)] = 0.2,
        k: Annotated[float, Range(0, 1e6)] = 50.0,
        k_relative: bool = False,
        schedule: str = "constant",
        noise_lr_scale: bool = False,
    ) -> None:
        super().__init__(grid, channels, role)
        self.c, self.k, self.k_relative = c, k, k_relative
        self.schedule, self.noise_lr_scale = schedule, noise_lr_scale
        self.active = False
        self.register_buffer("temperature", torch.zeros((), dtype=torch.float32), persistent=False)
        self.register_buffer("decay", torch.zeros((), dtype=torch.float32), persistent=False)
        self.register_buffer("key", torch.zeros((), dtype=torch.long), persistent=False)

    @staticmethod
    def check_together(schedule: str = "constant", **_: Any) -> None:
        """Raise `ValueError` for a schedule that is not known."""
        with under("schedule"):
            check_known([schedule], SCHEDULES, "schedule")

    def at(self, moment: Moment) -> None:
        temperature = self.c * SCHEDULES[self.schedule](moment.progress)
        if self.noise_lr_scale:
            temperature *= moment.learning_rate
        self.active = temperature > 0
        if self.active:
            self.kept = None
            where = f"{moment.seed}/{moment.step}/{moment.micro_batch}/{self.role}/{self.site}"
            digest = hashlib.blake2b(where.encode(), digest_size=8).digest()
            self.get_buffer("key").fill_(int.from_bytes(digest, "little") >> 1)
            self.get_buffer("temperature").fill_(temperature)
            self.get_buffer("decay").fill_(self.k)

    def quantize(self, x: Tensor) -> Tensor:
        if not (self.active and self.training):
            return super().quantize(x)
        temperature, decay, key = (self.get_buffer(name) for name in ("temperature", "decay", "key"))
        noise = Noise(temperature, decay, key, self.k_relative)
        return fake_quantize(x, self.steps, self.low, self.high, noise=noise, **self.options(x))
