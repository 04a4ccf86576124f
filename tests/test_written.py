"""What other code writes in place to a staged weight reaches the stored parameter, or is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from hf_robustq import RobustQ, sweep
from tests.zoo import beit, images, llama, tokens

W4 = {"weights": {"bits": 4}, "first_last": "same"}


def run(model, batch):
    return model(**batch)


class Read(nn.Module):
    """Its second layer is read past its module, as timm's attention does."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        return nn.functional.linear(self.first(x), self.second.weight, self.second.bias)


def staged(config=W4):
    model = Read()
    plugin = RobustQ(model, config)
    plugin.calibrate([torch.linspace(-1, 1, 12).view(2, 6)], lambda model, batch: model(batch))
    return model, plugin


def scaled(weight):
    weight.data *= 2


def grown(weight):
    weight.data = weight.data + 1


def first_row(weight):
    weight.data[0] = 7


def rows_of_transposed(weight):
    with torch.no_grad():
        weight.T[1:3].fill_(5)


def no_grad_item(weight):
    with torch.no_grad():
        weight[0, 1] = 3
        weight.view(-1)[2:4].mul_(0)


def indexed(weight):
    weight.data.index_copy_(0, torch.tensor([1]), torch.ones(1, weight.size(1)))


def clamped(weight):
    weight.data.clamp_(-0.01, 0.01)


def pieces(weight):
    with torch.no_grad():
        weight.chunk(2)[1].fill_(2)
        weight.unbind(1)[0].zero_()


WRITERS = [pieces, scaled, grown, first_row, rows_of_transposed, no_grad_item, indexed, clamped]
WRITERS += [nn.init.normal_, nn.init.xavier_uniform_, nn.init.orthogonal_, nn.init.trunc_normal_, nn.init.zeros_]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("layer", ["first", "second"])
def test_a_write_to_the_attribute_is_one_to_the_parameter(layer, write):
    """The same call on the same layer without stages gives the same parameter."""
    model, _ = staged()
    module = getattr(model, layer)
    twin = nn.Linear(module.in_features, module.out_features)
    twin.load_state_dict({key: value for key, value in module.state_dict().items() if "stages" not in key})
    torch.manual_seed(3)
    write(module.weight)
    torch.manual_seed(3)
    write(twin.weight)
    assert torch.equal(module._parameters["weight"], twin.weight)
    assert len(module._parameters["weight"].unique()) == len(twin.weight.unique())  # not what was on the grid


def test_each_tensor_of_a_layer_is_written():
    """A recurrent layer has several."""
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "gru": nn.GRU(4, 4), "last": nn.Linear(4, 4)})
    plugin = RobustQ(model, {"weights": {"bits": 4}})
    plugin.calibrate([torch.randn(3, 2, 4)], lambda model, x: model["last"](model["gru"](model["first"](x))[0]))
    nn.init.zeros_(model["gru"].weight_hh_l0)
    model["gru"].weight_ih_l0.data += 1
    stored = model["gru"]._parameters
    assert not stored["weight_hh_l0"].any() and float(stored["weight_ih_l0"].detach().min()) > 0.4
    with pytest.raises(RuntimeError, match="weight_hh_l0 is staged and cannot be"):
        del model["gru"].weight_hh_l0


def test_every_in_place_method_of_a_tensor_goes_through():
    model, _ = staged()
    names = [name for name in dir(torch.Tensor) if name.endswith("_") and not name.startswith("_")]
    assert len(names) > 100
    for name in names:
        assert getattr(type(model.first.weight), name) is not getattr(torch.Tensor, name), name


def test_reading_gives_staged_values_and_gradients_through_every_view():
    model, plugin = staged()
    weight, site = model.second.weight, plugin.sites[1]
    expected = site.weight_stages(site.parameter)
    assert isinstance(weight, torch.Tensor) and torch.equal(weight, expected) and len(weight.unique()) <= 16
    for read in (weight.t().t(), weight[:], weight.view(-1).view_as(weight), weight.detach(), weight + 0):
        assert torch.equal(read, expected)
    (weight.T[:3] * 2).sum().backward()
    grad = site.parameter.grad.clone()
    site.parameter.grad = None
    (expected.T[:3] * 2).sum().backward()
    assert torch.equal(grad, site.parameter.grad)
    assert torch.equal(weight.grad, grad)
    again = copy.deepcopy(weight.detach())
    assert type(again) is torch.Tensor and torch.equal(again, expected)


def test_what_goes_past_the_methods_is_said(caplog):
    model, plugin = staged()
    before = plugin.sites[0].parameter.detach().clone()
    with torch.no_grad():
        _ = torch.relu(model.first.weight), model.first.weight.sum()
        torch.nn.functional.linear(torch.ones(2, 6), model.first.weight)
    assert not caplog.records
    nn.init.eye_(model.first.weight)
    assert "wrote to a staged weight is lost" in caplog.text
    assert torch.equal(plugin.sites[0].parameter, before)


def test_results_are_ordinary_tensors(tmp_path):
    model, _ = staged()
    assert type(model.second.weight * 1) is torch.Tensor and type(model(torch.ones(2, 6))) is torch.Tensor
    torch.save(model.second.weight.detach(), tmp_path / "weight.pt")
    assert torch.equal(torch.load(tmp_path / "weight.pt"), model.second.weight)


def test_flags_are_those_of_the_parameter():
    model, _ = staged()
    stored = model.first._parameters["weight"]
    model.first.weight.requires_grad = False
    assert not stored.requires_grad and not model.first.weight.requires_grad
    model.first.weight.requires_grad_()
    assert stored.requires_grad
    with torch.no_grad():
        assert model.first.weight.requires_grad


def test_a_parameter_may_be_assigned_and_its_shape_is_checked():
    model, plugin = staged()
    new = nn.Parameter(torch.randn(8, 6))
    model.first.weight = new
    assert plugin.sites[0].parameter is new
    model.first.weight = model.first._parameters["weight"]
    with pytest.raises(ValueError, match=r"shape \(8, 6\) cannot become \(9, 6\).*detach"):
        model.first.weight = nn.Parameter(torch.randn(9, 6))
    with pytest.raises(ValueError, match=r"cannot become \(9, 6\).*detach"):
        model.first.weight.data = torch.randn(9, 6)
    with pytest.raises(TypeError, match="cannot assign"):
        model.first.weight = torch.randn(8, 6)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: parametrizations.spectral_norm(layer),
        lambda layer: parametrizations.weight_norm(layer),
        lambda layer: delattr(layer, "weight"),
    ],
)
def test_what_takes_the_parameter_away_is_refused(change):
    model, plugin = staged()
    with pytest.raises(RuntimeError, match=r"weight is staged and cannot be.*plugin.detach\(\)"):
        change(model.first)
    assert plugin.sites[0].parameter is model.first._parameters["weight"]
    model(torch.ones(2, 6))
    plugin.detach()
    change(model.first)


def test_pruning_is_refused():
    model, _ = staged()
    with pytest.raises(TypeError, match="weight_orig"):
        prune.l1_unstructured(model.first, "weight", 0.5)
    model, _ = staged({"first_last": "same"})  # no stage changes anything: the attribute is the parameter
    with pytest.raises(RuntimeError, match=r"weight is staged and cannot be.*plugin.detach\(\)"):
        prune.l1_unstructured(model.first, "weight", 0.5)


def test_with_satnl_the_stored_tensor_is_another_one_and_writing_is_refused():
    model, plugin = staged({"satnl": {}, "first_last": "same"})
    before = plugin.sites[0].parameter.detach().clone()
    for write in (scaled, nn.init.normal_):
        with pytest.raises(RuntimeError, match=r"satnl.*plugin.detach\(\)"):
            write(model.first.weight)
    with pytest.raises(RuntimeError, match="satnl"):
        model.first.weight = nn.Parameter(torch.randn(8, 6))
    assert torch.equal(plugin.sites[0].parameter, before)
    model.first.weight.requires_grad_(False)
    assert not plugin.sites[0].parameter.requires_grad
    state = {name: values.clone() for name, values in model.state_dict().items()}  # which has what is stored
    model.load_state_dict(state, assign=True)
    assert torch.equal(plugin.sites[0].parameter, before)


def test_embeddings_keep_their_size_or_are_refused():
    """transformers fills a larger table and hands it over as `data`."""
    model, batch = llama(), tokens(batch=2)
    plugin = RobustQ(model, {**W4, "embeddings": True})
    plugin.calibrate([batch], run)
    with pytest.raises(ValueError, match=r"cannot become .*plugin.detach\(\)"):
        model.resize_token_embeddings(60)


def test_a_staged_layer_that_was_exchanged_is_missed():
    """transformers makes another head of another size."""
    model, batch = llama(), tokens(batch=2)
    plugin = RobustQ(model, W4)
    plugin.calibrate([batch], run)
    model.resize_token_embeddings(60, mean_resizing=False)
    for use in (
        lambda: plugin.step(0.0),
        lambda: plugin.calibrate([batch], run),
        lambda: plugin.published().__enter__(),
        lambda: sweep(plugin, [batch], run, len, ["w4"]),
    ):
        with pytest.raises(ValueError, match=r"lm_head.weight has been replaced.*then create RobustQ"):
            use()


def test_a_functional_reader_computes_what_it_did():
    """timm's BEiT reads `qkv.weight` past its module: as if the weights had been quantized by hand."""
    model, batch = beit(), images()
    by_hand = copy.deepcopy(model)
    plugin = RobustQ(model, {"weights": {"bits": 3}})
    plugin.calibrate([batch], run)
    for site in plugin.sites:
        by_hand.get_parameter(site.name).data = site.weight_stages(site.parameter).detach()
    loss, expected = model(**batch).loss, by_hand(**batch).loss
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    qkv = next(site for site in plugin.sites if "qkv" in site.name)
    inside = by_hand.get_parameter(qkv.name).detach().abs() < plugin.telemetry()[qkv.name]["step"] * 3
    torch.testing.assert_close(qkv.parameter.grad[inside], by_hand.get_parameter(qkv.name).grad[inside])
