"""CIFAR ResNets and MobileNetV2: against published accuracies, plain loops and torchvision."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel

from hf_robustq.models import load_weights
from hf_robustq.models.mobilenet_v2 import from_torchvision
from hf_robustq.models.plain import from_torchvision as alexnet_from_torchvision
from hf_robustq.models.resnet_cifar import ResNetCifar, ZeroPadShortcut

# Published top-1 of the weights on the 10,000 CIFAR-10 test images.
PUBLISHED = {"resnet20_cifar": ("resnet20-12fca82f", 91.73), "resnet56_cifar": ("resnet56-4bfd9763", 93.39)}


def real_data() -> Path:
    if "HF_ROBUSTQ_DATA" not in os.environ:
        pytest.skip("needs real CIFAR-10 and weights: set HF_ROBUSTQ_DATA")
    return Path(os.environ["HF_ROBUSTQ_DATA"])


def wrapped(architecture: str = "resnet20_cifar") -> TimmWrapperForImageClassification:
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture=architecture, num_labels=10))


@pytest.mark.parametrize(("name", "millions"), [("resnet20_cifar", 0.27), ("resnet56_cifar", 0.85)])
def test_parameters_as_in_the_paper(name: str, millions: float) -> None:
    model = timm.create_model(name, num_classes=10)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == int(name[len("resnet") : -len("_cifar")])


def test_depth_is_checked() -> None:
    with pytest.raises(ValueError, match="depth 21 is not 6n"):
        ResNetCifar(21)


def test_shortcut_is_option_a() -> None:
    x = torch.randn(2, 4, 6, 6)
    expected = torch.zeros(2, 8, 3, 3)
    for channel in range(4):
        for row in range(3):
            for column in range(3):
                expected[:, channel + 2, row, column] = x[:, channel, 2 * row, 2 * column]
    assert torch.equal(ZeroPadShortcut(2)(x), expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_accuracy(name: str) -> None:
    import datasets

    from hf_robustq.data import ImageDataset, decode_images

    data = real_data()
    weights, percent = PUBLISHED[name]
    model = wrapped(name).eval()
    load_weights(model, data / "weights" / f"{weights}.safetensors")
    shard = str(next((data / "cifar10").glob("test-*.parquet")))
    test = datasets.Dataset.from_parquet(shard, split="test", keep_in_memory=True).select(range(1000))
    cfg = model.timm_model.default_cfg
    pixels, labels = decode_images(test, "img", "label")
    images = ImageDataset(pixels, labels, num_labels=10, mean=cfg["mean"], std=cfg["std"])
    items = images.__getitems__(range(1000))
    with torch.no_grad():
        logits = model(torch.stack([item["pixel_values"] for item in items])).logits
    correct = logits.argmax(-1) == labels
    # A sample of 1,000 has a standard deviation of 0.9 points here.
    assert 100 * correct.double().mean() == pytest.approx(percent, abs=2.5)


def test_wrapper_trains_and_round_trips(tmp_path: Path) -> None:
    model = wrapped()
    pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 9])
    model(pixel_values=pixels, labels=labels).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = TimmWrapperForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again.eval()(pixels).logits, model.eval()(pixels).logits)


def test_backbone_pools_to_64_features() -> None:
    model = TimmWrapperModel(TimmWrapperConfig(architecture="resnet20_cifar")).eval()
    output = model(torch.randn(2, 3, 32, 32))
    assert output.last_hidden_state.shape == (2, 64, 8, 8)
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state.mean((2, 3)))


def test_timm_methods() -> None:
    model = timm.create_model("resnet20_cifar", num_classes=10, in_chans=1).eval()
    x = torch.randn(2, 1, 32, 32)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    assert torch.equal(model.get_classifier()(model.forward_head(features, pre_logits=True)), model(x))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert model.num_classes == model.get_classifier().out_features == 7
    with pytest.raises(TypeError, match="dept"):
        timm.create_model("resnet20_cifar", dept=3)


def test_checkpointing_changes_no_gradient() -> None:
    model, x = timm.create_model("resnet20_cifar"), torch.randn(4, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_load_weights(tmp_path: Path) -> None:
    source = timm.create_model("resnet20_cifar")
    state = {key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    save_file(state, tmp_path / "old.safetensors")
    for target in (timm.create_model("resnet20_cifar"), wrapped()):
        load_weights(target, tmp_path / "old.safetensors")
        loaded = getattr(target, "timm_model", target).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())
    del state["bn1.bias"]
    state |= {"fc.weight": torch.zeros(1), "linear.bias": torch.zeros(3)}
    save_file(state, tmp_path / "bad.safetensors")
    expected = r"missing: bn1.bias; unexpected: fc.weight; of another shape: linear.bias\)$"
    with pytest.raises(ValueError, match=expected) as error:
        load_weights(source, tmp_path / "bad.safetensors")
    assert "\n" not in str(error.value)


def test_without_timm_one_line_names_the_extra() -> None:
    code = "import sys; sys.modules['timm'] = None; import hf_robustq.models"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "ImportError: hf_robustq.models needs timm: pip install 'hf_robustq[vision]'"
    )


def test_mobilenet_v2_computes_what_torchvision_does() -> None:
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    theirs = mobilenet_v2().eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    ours = timm.create_model("mobilenetv2_100").eval()
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = theirs(x)
        assert expected.std() > 1e-2  # the comparison would see a difference
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5)


def test_mobilenet_v2_keys_are_checked() -> None:
    from torchvision.models import mobilenet_v2

    state = mobilenet_v2().state_dict()
    renamed = {key.replace("classifier.1", "head"): value for key, value in state.items()}
    with pytest.raises(ValueError, match=r"missing: classifier.1; unexpected: head\)"):
        from_torchvision(renamed)


def test_mobilenet_v2_for_cifar_keeps_the_resolution_longer() -> None:
    """(Channels, pixels) of the rows of table 2 of the paper; the weights are mobilenetv2_100's."""
    model = timm.create_model("mobilenetv2_cifar").eval()
    seen = []
    for row in model.blocks:
        row.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape[1:3])))
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 100)
    assert seen == [(16, 32), (24, 32), (32, 16), (64, 8), (96, 8), (160, 4), (320, 4)]
    shapes = {
        name: value.shape for name, value in timm.create_model("mobilenetv2_100", num_classes=100).state_dict().items()
    }
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    with pytest.raises(ValueError, match="has no trained weights"):
        timm.create_model("mobilenetv2_cifar", pretrained=True)


@pytest.mark.parametrize(
    ("name", "size", "weighted", "parameters"),
    [("simplenet_cifar", 32, 5, 62_006), ("vgg11_cifar", 32, 9, 9_228_362), ("svhn8", 40, 8, None)],
)
def test_plain_networks_have_the_layers_of_their_papers(name, size, weighted, parameters) -> None:
    """LeNet's 62,006 are known; VGG-11's are those of torchvision's convolutions and norms, and one linear layer."""
    model = timm.create_model(name, num_classes=10)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == weighted
    counted = sum(p.numel() for p in model.parameters())
    assert parameters is None or counted == parameters
    x = torch.randn(2, 3, size, size)
    assert model.eval().forward_features(x).shape == (2, model.num_features, 1, 1)
    output = wrapped(name).eval()(x, labels=torch.tensor([0, 9]))
    assert output.logits.shape == (2, 10) and output.loss > 0
    model.set_grad_checkpointing(True)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_vgg11_is_torchvisions_but_for_the_head() -> None:
    from torchvision.models import vgg11_bn

    theirs = [m for m in vgg11_bn().features if isinstance(m, nn.Conv2d | nn.MaxPool2d)]
    ours = [m for m in timm.create_model("vgg11_cifar").layers.modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d)]
    shapes = [(type(m), getattr(m, "weight", torch.zeros(0)).shape) for m in theirs]
    assert [(type(m), getattr(m, "weight", torch.zeros(0)).shape) for m in ours] == shapes


def test_alexnet_computes_what_torchvision_does() -> None:
    from torchvision.models import alexnet

    torch.manual_seed(0)
    theirs, ours = alexnet().eval(), timm.create_model("alexnet").eval()
    ours.load_state_dict(alexnet_from_torchvision(theirs.state_dict()))
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs(x)
        assert expected.std() > 1e-3
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="not a torchvision alexnet"):
        alexnet_from_torchvision({"conv.weight": torch.zeros(1)})
