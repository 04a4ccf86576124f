"""Models of the quantization papers that timm lacks. Importing this registers them with timm."""

from pathlib import Path

from torch import nn

try:
    import timm  # noqa: F401
except ImportError as error:
    raise ImportError("hf_robustq.models needs timm: pip install 'hf_robustq[vision]'") from error

from hf_robustq.models import mobilenet_v2
from hf_robustq.models.classifier import image_classifier, preprocessing
from hf_robustq.models.plain import PlainNet
from hf_robustq.models.resnet_cifar import ResNetCifar, resnet20_cifar, resnet56_cifar

__all__ = [
    "PlainNet",
    "ResNetCifar",
    "image_classifier",
    "load_weights",
    "mobilenet_v2",
    "preprocessing",
    "resnet20_cifar",
    "resnet56_cifar",
]


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a .safetensors file into a timm model, bare or inside transformers' TimmWrapper, all keys or none.

    Raises ValueError naming missing, unexpected and differently shaped keys.
    """
    from safetensors.torch import load_file

    timm_model = getattr(model, "timm_model", model)
    state, own = load_file(path), timm_model.state_dict()
    # torch fills in this counter itself: weights saved before it existed lack it.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    reshaped = [key for key in state if key in own and state[key].shape != own[key].shape]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    if any(problems.values()):
        name = type(timm_model).__name__
        found = "; ".join(f"{problem}: {', '.join(keys)}" for problem, keys in problems.items() if keys)
        raise ValueError(f"{path} does not fit {name}: choose the model it came from ({found})")
    timm_model.load_state_dict(state)
