"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hf_robustq.options import Range, checked
from hf_robustq.sharded import assign, held, settle, uses_deepspeed, values_kept, whole


class EMA:
    """average <- decay_t * average + (1 - decay_t) * parameter, with decay_t = min(decay, (1 + t) / (10 + t)).

    Of every parameter that is trainable at the start, in float32, after each optimizer step; under FSDP2 of the pieces
    this rank holds. Buffers, batch-norm statistics among them, are the model's own.

        ema = EMA(model, 0.9999)
        for batch in loader: ...; optimizer.step(); ema.update()
        with ema.applied(): evaluate(model)
        accelerator.register_for_checkpointing(ema)      # saved and loaded with the rest

    Raises `ValueError` for a decay that is not in [0, 1), and under DeepSpeed, which keeps the weights to itself.
    """

    @checked("ema")
    def __init__(self, model: nn.Module, decay: Annotated[float, Range(0, 1, below=True)] = 0.9999) -> None:
        self.model = model
        self.decay = decay
        self.updates = 0
        self.averages: dict[str, Tensor] = {}
        self._applied = False

    def _parameters(self) -> dict[str, nn.Parameter]:
        settle(self.model)
        return dict(self.model.named_parameters())

    @torch.no_grad()
    def start(self) -> None:
        """Begin with the weights as they are: after wrapping, before the first step. Else the first update does it."""
        parameters = {name: p for name, p in self._parameters().items() if p.requires_grad}
        if any(uses_deepspeed(p) for p in parameters.values()):
            raise ValueError("ema: DeepSpeed keeps the weights to itself: train with DDP or FSDP2, or leave ema out")
        self.averages = {name: p.detach().to(_dtype(p), copy=True) for name, p in parameters.items()}
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Call after each optimizer step."""
        if not self.averages:
            self.start()
            return
        parameters = self._parameters()
        current = [held(parameters[name]).to(_dtype(parameters[name])) for name in self.averages]
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)([held(average) for average in self.averages.values()], current, self.updates)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averages for its weights; afterwards with its own, to the bit. May be nested."""
        if self._applied or not self.averages:
            yield
            return
        parameters = self._parameters()
        pairs = [(held(parameters[name]), held(average)) for name, average in self.averages.items()]
        with values_kept(self.model, [own for own, _ in pairs]):
            with torch.no_grad():
                for own, average in pairs:
                    own.copy_(average)
            self._applied = True
            try:
                yield
            finally:
                self._applied = False

    def state_dict(self) -> dict[str, Any]:
        """{"updates", "averages": whole, by parameter}. A collective where they are sharded."""
        found = {}
        for name, average in self.averages.items():
            with whole(average) as values:
                found[name] = values.clone()
        return {"updates": self.updates, "averages": found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.start()
        for name, average in self.averages.items():
            assign(average, state["averages"][name])
        self.updates = state["updates"]


def _dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
