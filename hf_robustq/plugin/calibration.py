"""Before training: what the stages are told of the model and of each other's ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_robustq import calibrate, distributed
from hf_robustq.calibrate import Forward
from hf_robustq.plugin.publish import saturated
from hf_robustq.products import ENOUGH, Products, ProductWatch
from hf_robustq.sharded import is_sharded, settle
from hf_robustq.sites import RAW

if TYPE_CHECKING:
    from hf_robustq.plugin.robustq import RobustQ

logger = logging.getLogger(__name__)


class Calibration:
    """Steps, statistics and how they are kept. The methods are documented at `RobustQ`, which passes its calls on."""

    def __init__(self, plugin: RobustQ) -> None:
        self.plugin = plugin
        self._unsaved: list[tuple[nn.Module, str]] = []

    def calibrate(self, batches: Iterable[Any], forward: Forward) -> None:
        plugin = self.plugin
        plugin.check_in_place()
        plugin.agree()
        distributed.broadcast(stage.d for _, stage in saturated(plugin))
        if distributed.weights_on_rank_0(plugin.model):
            raise RuntimeError(
                "with cpu_ram_efficient_loading other ranks have no weights yet: calibrate after accelerator.prepare"
            )
        self._observe(batches, forward, plugin.config.activations is not None, ProductWatch(plugin.model))
        if plugin.products is not None and plugin.products.share < ENOUGH:
            logger.warning("%s print(plugin) lists them, with the reasons", plugin.products.sentence)
        self.initialize()
        self._share()
        plugin.bits.check()

    def observe(self, batches: Iterable[Any], forward: Forward, activations: bool) -> None:
        watch = ProductWatch(self.plugin.model) if self.plugin.products is None else None
        self._observe(batches, forward, activations or self.plugin.config.activations is not None, watch)
        self._share()

    def _observe(self, batches: Iterable[Any], forward: Forward, need_inputs: bool, watch: ProductWatch | None) -> None:
        model, sites = self.plugin.model, self.plugin.sites
        count = calibrate.observe(model, sites, batches, forward, watch)
        settle(model)
        idle = [] if watch is None else self._no_products(watch)
        calibrate.count_uses(sites, count, need_inputs, idle)
        if watch is not None:
            self.plugin.know(Products.of(model, sites, watch.names))

    def _no_products(self, watch: ProductWatch) -> list[str]:
        """Weights that were staged for their names only, and are multiplied by nothing: a norm's, or a table."""
        config, named = self.plugin.config, self.plugin.model.named_parameters(remove_duplicate=False)
        multiplied = {id(parameter) for name, parameter in named if name in watch.names}
        found = [s for s in self.plugin.sites if s.float_input == RAW and id(s.parameter) not in multiplied]
        return [s.name for s in found if not any(fnmatchcase(s.name, pattern) for pattern in config.parameters)]

    def initialize(self) -> None:
        """Set the steps that are not set yet, each by the rule of its config."""
        weights, activations = self.plugin.config.weights, self.plugin.config.activations
        rules = {"weights": weights and weights.scale, "activations": activations and activations.scale}
        calibrate.initialize(self.plugin.sites, rules)

    def _share(self) -> None:
        """Rank 0's steps and statistics on every rank."""
        stages = list(calibrate.stages(self.plugin.sites))
        tensors = (tensor for stage in stages for tensor in (*stage.buffers(), *stage.parameters()))
        distributed.broadcast(tensor for tensor in tensors if not is_sharded(tensor))
        self.plugin.check_stages()

    def before_wrapping(self) -> None:
        model, sites = self.plugin.model, self.plugin.sites
        names = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ())}
        names.update(calibrate.own_buffers(model, sites))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        if distributed.weights_on_rank_0(model):
            self._unsaved += calibrate.keep_from_saving(sites)

    def after_wrapping(self) -> None:
        while self._unsaved:
            stage, name = self._unsaved.pop()
            stage.register_buffer(name, stage._buffers[name], persistent=True)
