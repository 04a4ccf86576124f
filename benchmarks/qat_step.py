"""A training step with 4-bit weights and inputs against the float step: ours and our peers', in one process.

    python benchmarks/qat_step.py
    python benchmarks/qat_step.py --cases resnet18 --dtypes float32 --compile --threads 2 --output step

A step is the forward, the backward, SGD, and what ours adds before and after. Contenders take turns, one step each,
and every step is divided by the float step of the same turn: the table has the median of these ratios, the time to the
end of the second step (warm-up, compilation included) and memory (parameters, momentum, and the distinct storages that
autograd keeps for the backward; on a GPU the allocator's peak), as a ratio to the float model's. `float again` says how
far noise goes.

Peers: pip install torchao brevitas optimum-quanto nvidia-modelopt. What is not installed, or cannot do a case, is
left out with a message. Writes <output>.md and <output>.json.
"""

import argparse
import copy
import gc
import importlib.metadata
import json
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_robustq import RobustQ

BITS = 4


class Unable(Exception):
    """A contender cannot do a case; the message says why."""


# ---- the cases ---------------------------------------------------------------------------------------------------


def vision(name: str, batch: int, size: int) -> Callable[[], tuple[nn.Module, dict[str, Tensor]]]:
    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        import timm

        model = timm.create_model(name, num_classes=1000).to(memory_format=torch.channels_last)
        pixels = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        return Images(model), {"inputs": pixels, "labels": torch.randint(1000, (batch,))}

    return build


class Images(nn.Module):
    """A classifier that returns its loss, as models of transformers do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(inputs), labels)


class Texts(Images):
    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(input_ids=inputs).logits, labels)


def camembert(batch: int = 8, length: int = 128) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import CamembertConfig, CamembertForSequenceClassification

    config = CamembertConfig(num_hidden_layers=6, num_labels=10, pad_token_id=1, vocab_size=32005)
    inputs = torch.randint(5, 32000, (batch, length))
    return Texts(CamembertForSequenceClassification(config)), {"inputs": inputs, "labels": torch.randint(10, (batch,))}


CASES = {
    "resnet18": vision("resnet18", 16, 112),
    "mobilenetv2": vision("mobilenetv2_100", 16, 112),
    "resnet50": vision("resnet50", 8, 112),
    "camembert": camembert,
}


# ---- the contenders: (float model, batch) -> model ---------------------------------------------------------------


def ours(**options: Any) -> Callable[[nn.Module, dict[str, Tensor]], nn.Module]:
    def build(model: nn.Module, batch: dict[str, Tensor]) -> nn.Module:
        weights = {"method": options.get("method", "lsq"), "bits": BITS}
        config = {"weights": weights, "activations": {"method": "lsq", "bits": BITS}, "first_last": "same"}
        plugin = RobustQ(model, {**config, "memory": options.get("memory", "keep")})
        plugin.calibrate([batch], lambda model, batch: model(**batch))
        return model

    return build


class RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        return grad


class AutogradLSQ(nn.Module):
    """LSQ as papers' repositories write it: every operation is autograd's."""

    def __init__(self, sample: Tensor, signed: bool) -> None:
        super().__init__()
        self.low, self.high = (-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1) if signed else (0, 2**BITS - 1)
        self.scale = nn.Parameter(2 * sample.detach().abs().mean() / self.high**0.5)

    def forward(self, x: Tensor) -> Tensor:
        factor = (x.numel() * self.high) ** -0.5
        scale = (self.scale - self.scale * factor).detach() + self.scale * factor
        return RoundThrough.apply((x / scale).clamp(self.low, self.high)) * scale


def autograd_lsq(model: nn.Module, batch: dict[str, Tensor]) -> nn.Module:
    """The textbook: parametrized weights, pre-hooks on the inputs."""
    seen: dict[nn.Module, Tensor] = {}
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.setdefault(m, args[0].detach())) for m in layers]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    for layer in layers:
        layer.input_quantizer = AutogradLSQ(seen[layer], signed=bool(seen[layer].min() < 0))
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", AutogradLSQ(layer.weight, signed=True))
        layer.register_forward_pre_hook(lambda m, args: (m.input_quantizer(args[0]), *args[1:]))
    return model


def brevitas(model: nn.Module, batch: dict[str, Tensor]) -> nn.Module:  # noqa: ARG001
    """Both scales learned from the second step on."""
    import brevitas.nn as qnn
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat

    class Weight(Int8WeightPerTensorFloat):
        bit_width = BITS
        scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS

    class Input(Int8ActPerTensorFloat):
        bit_width = BITS
        collect_stats_steps = 1

    how = {"weight_quant": Weight, "input_quant": Input, "return_quant_tensor": False}
    return layerwise_quantize(model, {nn.Conv2d: (qnn.QuantConv2d, how), nn.Linear: (qnn.QuantLinear, how)})


def torchao(model: nn.Module, batch: dict[str, Tensor]) -> nn.Module:
    """Linear layers only; weights' scales learned, inputs quantized by token as they come (it has no learned ones)."""
    from torchao.quantization import quantize_
    from torchao.quantization.granularity import PerAxis, PerToken
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig, initialize_fake_quantizers

    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise Unable("it has no convolutions")
    inputs = IntxFakeQuantizeConfig(torch.int4, PerToken(), is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int4, PerAxis(0), is_symmetric=True, is_dynamic=False, range_learning=True)
    quantize_(model, QATConfig(activation_config=inputs, weight_config=weights, step="prepare"))
    initialize_fake_quantizers(model, (batch["inputs"], batch["labels"]))
    return model


def quanto(model: nn.Module, batch: dict[str, Tensor]) -> nn.Module:
    """4-bit weights, 8-bit inputs (it has no fewer), fixed scales."""
    from optimum.quanto import Calibration, qint4, qint8, quantize

    quantize(model, weights=qint4, activations=qint8)
    with torch.no_grad(), Calibration():
        model(**batch)
    return model


def modelopt(model: nn.Module, batch: dict[str, Tensor]) -> nn.Module:
    """Fixed scales."""
    import modelopt.torch.quantization as mtq

    plain = {"num_bits": BITS, "axis": None}
    settings = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": plain, "enable": True},
        {"quantizer_name": "*input_quantizer", "cfg": plain, "enable": True},
    ]
    return mtq.quantize(model, {"quant_cfg": settings, "algorithm": "max"}, lambda model: model(**batch))


CONTENDERS: dict[str, tuple[str | None, bool, Callable[[nn.Module, dict[str, Tensor]], nn.Module]]] = {
    "float": (None, False, lambda model, _: model),
    "float again": (None, False, lambda model, _: model),
    "hf_robustq, LSQ": ("hf_robustq", True, ours()),
    "hf_robustq, LSQ, memory=recompute": ("hf_robustq", True, ours(memory="recompute")),
    "hf_robustq, noise-tempered LSQ": ("hf_robustq", True, ours(method="noise")),
    "LSQ by plain autograd": (None, True, autograd_lsq),
    "Brevitas": ("brevitas", True, brevitas),
    "torchao": ("torchao", True, torchao),
    "optimum-quanto (W4A8)": ("optimum-quanto", False, quanto),
    "ModelOpt": ("nvidia-modelopt", False, modelopt),
}
"""By name: the package, whether its steps are learned, and what builds it."""


# ---- the measurement ---------------------------------------------------------------------------------------------


@dataclass
class Line:
    """What the table says of a contender in a case."""

    case: str
    dtype: str
    compiled: bool
    contender: str
    learned: bool
    ratio: float
    milliseconds: float
    warm_up_seconds: float
    memory: float


class Step:
    """One contender's training step."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype, compiled: bool) -> None:
        self.batch, self.dtype = batch, dtype
        self.device = batch["labels"].device.type
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-4, momentum=0.9)
        try:
            self.plugin = RobustQ.of(model)
        except ValueError:
            self.plugin = None
        self.model: Any = torch.compile(model.train()) if compiled else model.train()

    def __call__(self) -> float:
        self.synchronize()
        start = time.perf_counter()
        if self.plugin is not None:
            self.plugin.step(0.5, first=True)
        self.loss().backward()
        self.optimizer.step()
        if self.plugin is not None:
            self.plugin.after_optimizer_step()
        self.optimizer.zero_grad()
        self.synchronize()
        return time.perf_counter() - start

    def loss(self) -> Tensor:
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(**self.batch)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> int:
        """Bytes of parameters, momentum, and what is kept for the backward; on a GPU the peak of a step."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self()
            return torch.cuda.max_memory_allocated() - before + 2 * sum(p.nbytes for p in self.parameters)
        kept = {p.untyped_storage().data_ptr(): 0 for p in self.parameters}  # counted below

        def keep(tensor: Tensor) -> Tensor:
            for part in parts(tensor):
                storage = part.untyped_storage()
                kept.setdefault(storage.data_ptr(), storage.nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss()
        del loss
        return sum(kept.values()) + 2 * sum(p.nbytes for p in self.parameters)


def parts(tensor: Tensor) -> list[Tensor]:
    """The tensors with storage that a peer's tensor subclass is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in parts(getattr(tensor, name))]


def measure(case: str, dtype: str, compiled: bool, options: argparse.Namespace) -> list[Line]:
    """Build every contender that can, then let them take turns."""
    gc.collect()  # the models of the case before
    torch.manual_seed(0)
    original, batch = CASES[case]()
    original = original.to(options.device)
    batch = {name: tensor.to(options.device) for name, tensor in batch.items()}
    steps: dict[str, Step] = {}
    warm_up: dict[str, float] = {}
    for name in options.contenders:
        package, _, build = CONTENDERS[name]
        if package and package != "hf_robustq" and not installed(package):
            print(f"{case}, {dtype}: {name} left out: pip install {package}")
            continue
        start = time.perf_counter()
        try:
            step = Step(build(copy.deepcopy(original), batch), batch, getattr(torch, dtype), compiled)
            step(), step()
        except Unable as error:
            print(f"{case}, {dtype}: {name} left out: {error}")
            continue
        except Exception as error:  # a peer's: the others go on
            if package in (None, "hf_robustq"):
                raise
            reason = str(error).strip().splitlines()
            print(f"{case}, {dtype}: {name} left out: {type(error).__name__}: {reason[0][:150] if reason else ''}")
            continue
        steps[name], warm_up[name] = step, time.perf_counter() - start
    memory = {name: step.memory() for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-1, options.repeats):
        for name, step in steps.items():
            seconds = step()
            if turn >= 0:
                times[name].append(seconds)
    return [
        Line(
            case=case,
            dtype=dtype,
            compiled=compiled,
            contender=name,
            learned=CONTENDERS[name][1],
            ratio=statistics.median(a / b for a, b in zip(seconds, times["float"], strict=True)),
            milliseconds=1000 * statistics.median(seconds),
            warm_up_seconds=warm_up[name],
            memory=memory[name] / memory["float"],
        )
        for name, seconds in times.items()
    ]


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def markdown(lines: list[Line], machine: str) -> str:
    head = "| case | contender | steps learned | step / float | ms | warm-up, s | memory / float |"
    rows = [head, "|---|---|---|---|---|---|---|"]
    for line in lines:
        case = f"{line.case}, {line.dtype}" + (", compiled" if line.compiled else "")
        figures = f"{line.ratio:.2f} | {line.milliseconds:.0f} | {line.warm_up_seconds:.1f} | {line.memory:.2f}"
        rows.append(f"| {case} | {line.contender} | {'yes' if line.learned else 'no'} | {figures} |")
    return "\n".join([*rows, "", machine, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="torch.compile every model, the float one included")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("qat_step"))
    options = parser.parse_args()
    options.contenders = ["float", *(name for name in options.contenders if name != "float")]
    warnings.filterwarnings("ignore")
    logging.getLogger("hf_robustq").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    chip = torch.cuda.get_device_name() if options.device == "cuda" else processor()
    packages = sorted({package for package, _, _ in CONTENDERS.values() if package} | {"torch"})
    versions = {name: importlib.metadata.version(name) for name in packages if installed(name)}
    machine = f"{chip}, {options.threads} threads, " + ", ".join(f"{p} {v}" for p, v in versions.items())
    lines: list[Line] = []
    for case in options.cases:
        for dtype in options.dtypes:
            lines += measure(case, dtype, options.compile, options)
            options.output.with_suffix(".md").write_text(markdown(lines, machine), encoding="utf-8")
            record = {"machine": machine, "repeats": options.repeats, "lines": [asdict(line) for line in lines]}
            options.output.with_suffix(".json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(markdown(lines, machine))


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    known = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in known if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
