"""What is saved of a model whose stored weights are not those of its network (SatNL), or not the ones to publish (EMA).

Every folder with a `config.json` holds the network's weights under the user's names. A checkpoint has, besides, the
stored ones, which a resumed run goes on with to the bit, in `robustq_state.safetensors`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.quantizers.base import HfQuantizer

from hf_robustq import distributed
from hf_robustq.reparam import SatNL, satnl
from hf_robustq.sharded import assign, held, is_sharded, settle, uses_deepspeed, values_kept, whole
from hf_robustq.sites import Site, inner

if TYPE_CHECKING:
    from hf_robustq.plugin.robustq import RobustQ

logger = logging.getLogger(__name__)

STATE = "robustq_state.safetensors"


def saturated(plugin: RobustQ) -> list[tuple[Site, SatNL]]:
    """The sites with SatNL."""
    return [(site, stage) for site in plugin.sites if (stage := satnl(site)) is not None]


def differs(plugin: RobustQ) -> bool:
    """Whether what is to be published is not what the model holds."""
    return plugin.ema is not None or bool(saturated(plugin))


@contextmanager
def published(plugin: RobustQ) -> Iterator[None]:
    """See `RobustQ.published`. Local to every rank: SatNL works element by element."""
    plugin.check_in_place()
    pairs = [(site, stage) for site, stage in saturated(plugin) if stage.enabled]
    settle(plugin.model)
    model: Any = inner(plugin.model)
    publisher = vars(model).pop("hf_quantizer", None)  # what is saved now is as it should be
    try:
        with plugin.averaged(), values_kept(plugin.model, [held(site.parameter) for site, _ in pairs]):
            with torch.no_grad():
                for site, stage in pairs:
                    held(site.parameter).copy_(stage(held(site.parameter)))
            for _, stage in pairs:
                stage.enabled = False
            yield
    finally:
        for _, stage in pairs:
            stage.enabled = True
        if publisher is not None:
            model.hf_quantizer = publisher


class FloatModel(HfQuantizer):
    """To transformers the model is the float model that it is: trained, saved and compiled like any other."""

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class Publisher(FloatModel):
    """transformers asks it for the tensors to save: those of the published model, in place of any it was given."""

    def __init__(self, plugin: RobustQ) -> None:
        self.plugin = plugin

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        if any(is_sharded(parameter) for parameter in model.parameters()):
            raise RuntimeError(
                "the weights are in pieces, and the stored ones are not those to publish: gather and save them "
                "inside `with plugin.published():`, or by RobustTrainer.save_model()"
            )
        copies: dict[tuple[Any, ...], Tensor] = {}  # tied tensors stay tied
        with self.plugin.published():
            state = model.state_dict()
            for name, tensor in state.items():
                key = (tensor.data_ptr(), tensor.shape, tensor.dtype)
                if key not in copies:
                    copies[key] = tensor.clone()
                state[name] = copies[key] if tensor.numel() else tensor
        return state, {}


def save_state(plugin: RobustQ, folder: str | Path, write: bool) -> None:
    """The stored weights and the averages into a checkpoint; gathered on every rank, written by one (`write`)."""
    if not differs(plugin):
        return
    averages = {} if plugin.ema is None else plugin.ema.state_dict()["averages"]
    settle(plugin.model)
    names = {*averages, *(site.name for site, _ in saturated(plugin))}
    tensors = {f"average.{name}": values for name, values in averages.items()}
    for name, parameter in plugin.model.named_parameters():
        if name in names:
            with whole(parameter) as values:
                tensors[f"stored.{name}"] = values.clone()
    if write:
        updates = 0 if plugin.ema is None else plugin.ema.updates
        tensors = {name: values.cpu().contiguous() for name, values in tensors.items()}
        Path(folder).mkdir(parents=True, exist_ok=True)  # FSDP's sharded checkpoints come later
        save_file(tensors, Path(folder) / STATE, metadata={"updates": str(updates)})


def load_state(plugin: RobustQ, folder: str | Path) -> None:
    """Go on with what `save_state` wrote, after the folder's own weights were loaded.

    FSDP and DeepSpeed have brought the stored weights themselves. A folder without the file gives weights that are the
    stored ones but for rounding. Raises `ValueError` for one without the averages of a run that has some, and the other
    way round: the weights would be other ones than the run was at.
    """
    file = Path(folder) / STATE
    parameters = dict(plugin.model.named_parameters())
    stored = not any(is_sharded(p) or uses_deepspeed(p) for p in parameters.values())
    if not file.is_file() and not any(Path(folder).glob("*.safetensors")):
        logger.warning("%s holds no weights: those of now are kept", folder)
        return
    if not file.is_file():
        if stored and saturated(plugin):
            logger.warning("%s has no %s: the stored weights are found from the network's", folder, STATE)
            unfold(plugin)
        if plugin.ema is not None:
            raise ValueError(
                f"{folder} has no {STATE}, which a run with ema writes: resume without ema, or start from its weights"
            )
        return
    with safe_open(file, framework="pt") as tensors:
        names = list(tensors.keys())
        for name in names:
            kind, _, parameter = name.partition(".")
            if kind == "stored" and stored:
                assign(parameters[parameter], tensors.get_tensor(name))
        averages = {n.partition(".")[2]: tensors.get_tensor(n) for n in names if n.startswith("average.")}
        if bool(averages) != (plugin.ema is not None):
            has, lacks = ("averages", "none") if averages else ("no averages", "some")
            raise ValueError(f"{folder} has {has} and this run {lacks}: resume with the ema it was written with")
        if plugin.ema is not None:
            plugin.ema.load_state_dict({"averages": averages, "updates": int(tensors.metadata()["updates"])})


def wrap(plugin: RobustQ) -> None:
    """Give every weight with SatNL the stored values that leave the network as it is."""
    if plugin.config.satnl is None:
        return
    owners: dict[int, list[str]] = {}
    for prefix, module in plugin.model.named_modules():  # each module once, under however many names
        for name, parameter in module.named_parameters(prefix, recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for site, _ in saturated(plugin):
        if len(names := owners[id(site.parameter)]) > 1:
            raise ValueError(f"satnl: {names[0]} is tied to {names[1]}: add both to exclude, or drop satnl")
    unfold(plugin, frozenset(site.name for site in plugin.sites))


def unfold(plugin: RobustQ, new: frozenset[str] = frozenset()) -> None:
    """The stored weights from the network's, which the parameters hold now; `new` ones are wrapped for the first time.

    Nothing is done on ranks that have no weights yet.
    """
    if distributed.weights_on_rank_0(plugin.model) and distributed.rank():
        return
    pairs = [(site, stage) for site, stage in saturated(plugin) if not site.parameter.is_meta]
    for site, stage in pairs:
        if site.name in new:
            with whole(site.parameter) as weight:
                try:
                    stage.bound(weight.detach())
                except ValueError as error:
                    raise ValueError(f"satnl: {site.name}: {error}") from None
    for site, stage in pairs:
        if stage.invert or site.name not in new:
            with whole(site.parameter) as weight:
                values = stage.right_inverse(weight)
            assign(site.parameter, values)
