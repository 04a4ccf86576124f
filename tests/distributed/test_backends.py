"""Every backend against one process: `accelerate launch`, the real Trainer, two gloo processes.

A backend is launched once. Each of its runs is a fork of the launched processes, made when the first test wants it.
"""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_robustq  # noqa: F401 (registers its method with transformers)
from hf_robustq.functional import SMALLEST
from tests import clock
from tests.distributed.launch import Launch, Run, close
from tests.distributed.train import SETTINGS
from tests.zoo import llama, tokens

SHARDED = ("fsdp2", "zero3")
FIVE = ("--save", "--optim", "sgd", "--collectives")
BACKENDS = ("multi_cpu", "fsdp2", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """launched(config): the processes of a backend."""
    made = {}

    def of(config):
        if config.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed")
        if config not in made:
            with clock.shared():
                made[config] = Launch(tmp_path_factory.mktemp(config), config)
        return made[config]

    yield of
    close(list(made.values()))


@pytest.fixture(scope="module")
def run(launched, tmp_path_factory):
    """run(config, *arguments): the run of `train.py`, made once."""
    made = {}

    def of(config, *arguments, lean=False):
        key = (config, *arguments, lean)
        if key not in made:
            out = tmp_path_factory.mktemp(config)
            launched(config).run("tests.distributed.train", out, *arguments, lean=lean)
            made[key] = Run(out)
        return made[key]

    return of


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The tiny Llama of seed 0, as a folder: what `zero.Init` and lean loading start from."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    llama().save_pretrained(folder)
    return str(folder)


def same_weights(one, other, atol=1e-6):
    assert one.state.keys() == other.state.keys()
    for name, value in one.state.items():
        if name.endswith("probe.counts"):  # of the last sweep: what lies on the edge of a bin may fall to either side
            assert value.sum() == other.state[name].sum() and (value - other.state[name]).abs().sum() <= 10, name
            continue
        rtol = 1e-5 if name.endswith("probe.range") else 0  # of activations: a sum of many rounded terms each
        torch.testing.assert_close(other.state[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def same_rows(one, other):
    rows = one.ranks[0]["rows"]
    assert [row["setting"] for row in rows][: len(SETTINGS)] == SETTINGS
    assert len({row["metrics"]["loss"] for row in rows}) == len(rows)  # each setting does something
    for a, b in zip(rows, other.ranks[0]["rows"], strict=True):
        assert a["setting"] == b["setting"] and a["metrics"]["accuracy"] == b["metrics"]["accuracy"]
        assert b["metrics"]["loss"] == pytest.approx(a["metrics"]["loss"], rel=1e-5)
    assert other.ranks[0]["logs"] == pytest.approx(one.ranks[0]["logs"], rel=1e-5)


@pytest.mark.parametrize("config", BACKENDS)
def test_five_steps_and_the_sweep_equal_one_process(run, config):
    one, two = run("single_gpu", *FIVE), run(config, *FIVE)
    assert any(name.endswith("activation_stages.quantizer.scale") for name in one.state)
    same_weights(one, two)
    same_rows(one, two)


@pytest.mark.parametrize("config", SHARDED)
def test_models_that_no_rank_holds_whole(run, saved, config):
    """`zero.Init`, and FSDP2's `cpu_ram_efficient_loading`; the script empties the other ranks."""
    one, two = run("single_gpu", *FIVE), run(config, "--model", saved, lean=config == "fsdp2")
    same_weights(one, two)
    same_rows(one, two)


@pytest.mark.parametrize("config", BACKENDS)
def test_experts_equal_one_process(run, config):
    one, two = run("single_gpu", "--experts", "--learned"), run(config, "--experts", "--learned")
    stacks = [name for name in one.state if name.endswith("experts.gate_up_proj_stages.quantizer.scale")]
    assert len(stacks) == 2 and all(one.state[name].numel() == 4 for name in stacks)
    assert any(".experts.3.w1.weight" in name for name in one.state)  # under the names of transformers
    same_weights(one, two)
    same_rows(one, two)


@pytest.mark.parametrize("config", BACKENDS)
def test_learned_steps_and_noise_equal_one_process(run, saved, config):
    """Calibrated after wrapping where the model is sharded, `zero.Init` and lean loading included."""
    one = run("single_gpu", "--learned")
    options = ("--model", saved) if config in SHARDED else ()
    two = run(config, "--learned", *options, lean=config == "fsdp2")
    names = [name for name in one.state if name.endswith("quantizer.scale")]
    assert names and two.ranks[0]["checksum"] == two.ranks[1]["checksum"]
    start = one.logits["learned"]
    assert start.keys() == set(names) and all(float((one.state[n] / start[n] - 1).abs().max()) > 1e-6 for n in names)
    for name, value in two.logits["learned"].items():
        torch.testing.assert_close(value, start[name], rtol=1e-6, atol=0)
    same_weights(one, two)
    same_rows(one, two)
    assert all(rank["projected"] == pytest.approx(SMALLEST, rel=1e-3) for rank in (*one.ranks, *two.ranks))


@pytest.mark.parametrize("config", BACKENDS)
def test_satnl_and_symreg_equal_one_process(run, saved, config):
    """Weights, sweep and the folder that is saved; wrapped while sharded, where the model comes so."""
    one = run("single_gpu", "--satnl", "--save")
    options = ("--model", saved) if config in SHARDED else ()
    two = run(config, "--satnl", "--save", *options, lean=config == "fsdp2")
    names = [name for name in one.state if name.endswith("satnl.d")]
    assert names and all(float(one.state[name]) > 0 for name in names)
    same_weights(one, two)
    same_rows(one, two)
    stored = [load_file(each.checkpoint / "robustq_state.safetensors") for each in (one, two)]
    folded = load_file(one.checkpoint / "model.safetensors")
    assert stored[0].keys() == stored[1].keys() == {f"stored.{n.removesuffix('_stages.satnl.d')}" for n in names}
    for name, value in stored[0].items():
        torch.testing.assert_close(stored[1][name], value, rtol=0, atol=1e-6)
        own = name.removeprefix("stored.")
        d = folded[f"{own}_stages.satnl.d"]
        torch.testing.assert_close(folded[own], torch.tanh(value / d) * d, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", BACKENDS)
def test_learned_bits_under_a_budget_equal_one_process(run, config):
    """Five steps: one of the task, three in which bits come down, one with fixed bits."""
    options = ("--waveq", "--save", "--optim", "sgd")
    one, two = run("single_gpu", *options), run(config, *options)
    same_weights(one, two)
    same_rows(one, two)
    sizes = [rank["size"] for each in (one, two) for rank in each.ranks]
    assert all(size == sizes[0] for size in sizes)
    betas = [name for name in one.state if name.endswith("waveq.beta")]
    learned = [float(one.state[name]) for name in betas]
    assert sizes[0]["megabytes"] <= 0.025 and len(set(learned)) > 1
    assert all(beta == int(beta) <= 8 for beta in learned)


@pytest.mark.parametrize("config", ["multi_cpu", "fsdp2", "zero3"])
def test_learned_bits_resume_where_they_were(run, config):
    options = ("--waveq", "--optim", "adamw_torch")
    whole = run(config, *options, "--save")
    same_weights(whole, run(config, *options, "--resume", str(whole.checkpoint)), atol=0)


def test_learned_bits_with_accumulation_equal_one_process(run):
    options = ("--waveq", "--accumulate")
    same_weights(run("single_gpu", *options, "2"), run("multi_cpu", *options, "2"))


@pytest.mark.parametrize("config", ["multi_cpu", "fsdp2"])
def test_two_passes_and_averages_equal_one_process(run, config):
    one, two = (run(each, "--satnl", "--asam", "--ema", "--save") for each in ("single_gpu", config))
    same_weights(one, two)
    same_rows(one, two)
    plain = run("single_gpu", "--satnl", "--save")
    name = next(name for name in one.state if name.endswith("proj.weight"))
    assert float((plain.state[name] - one.state[name]).abs().max()) > 1e-4
    states = [load_file(each.checkpoint / "robustq_state.safetensors") for each in (one, two)]
    assert states[0].keys() == states[1].keys() and any(name.startswith("average.") for name in states[0])
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", ["multi_cpu", "fsdp2"])
def test_two_passes_and_averages_resume_where_they_were(run, config):
    options = ("--satnl", "--asam", "--ema", "--optim", "adamw_torch")
    whole = run(config, *options, "--save")
    same_weights(whole, run(config, *options, "--resume", str(whole.checkpoint)), atol=0)
    same_weights(whole, run("single_gpu", *options, "--resume", str(whole.checkpoint)))


def test_two_passes_with_accumulation_equal_one_process(run):
    """Four micro-batches of two in one process; with two, each rank has half of each micro-batch."""
    options = ("--satnl", "--asam", "--accumulate")
    same_weights(run("single_gpu", *options, "2"), run("multi_cpu", *options, "2"))


def test_each_rank_on_its_own_climbs_elsewhere(run):
    """All ranks still end with the same weights; and not with those of a common climb."""
    common, own = run("multi_cpu", "--satnl", "--asam", "--ema", "--save"), run("multi_cpu", "--satnl", "--per_rank")
    assert len({rank["checksum"] for rank in own.ranks}) == 1
    name = next(name for name in own.state if name.endswith("proj.weight"))
    assert float((own.state[name] - common.state[name]).abs().max()) > 1e-5


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("zero2", ("--asam",), "asam: DeepSpeed takes the optimizer step inside the backward"),
        ("zero3", ("--ema",), "ema: DeepSpeed keeps the weights to itself"),
        ("fsdp2", ("--asam", "--accumulate", "2"), "asam: FSDP2 does not keep accumulated gradients apart"),
    ],
)
def test_what_a_backend_cannot_do_is_refused(run, config, options, message):
    with pytest.raises(RuntimeError, match=message):
        run(config, *options)


def test_a_joint_search_takes_the_same_way_on_every_rank(run):
    """Its figures are no other process count's to the last digit: a difference in rounding may send it elsewhere."""
    one, two = run("single_gpu", "--optim", "sgd", "--lapq"), run("fsdp2", "--optim", "sgd", "--lapq")
    rows = [rank["rows"] for rank in (*one.ranks, *two.ranks)]
    assert rows[1] == rows[2] and [row["setting"] for row in rows[0]] == [*SETTINGS, "w3a4@lapq"]
    for own in rows:
        found = {row["setting"]: row["metrics"]["loss"] for row in own}
        assert found["w3a4@lapq"] == pytest.approx(found["fp"], rel=0.2)


@pytest.mark.parametrize("config", BACKENDS)
def test_every_quantizer_tensor_is_equal_across_ranks(run, config):
    one, *others = (rank["checksum"] for rank in run(config, *FIVE).ranks)
    assert others == [one]


@pytest.mark.parametrize("config", ["multi_cpu", *SHARDED])
def test_a_training_step_has_no_collective_more_than_the_float_run(run, config):
    ours, plain = run(config, *FIVE), run(config, "--plain", "--collectives")
    own, floats = ours.ranks[0]["collectives"], plain.ranks[0]["collectives"]
    assert floats and own.keys() == floats.keys()
    if config == "zero3":  # parameters that it lets persist may be at hand already
        assert all(own[name] <= count for name, count in floats.items())
    else:
        assert own == floats


@pytest.mark.parametrize("config", SHARDED)
def test_what_is_recomputed_comes_from_parameters_gathered_anew(run, config):
    """The result is that of keeping it, and under FSDP2 a rank keeps hardly more than the float model's."""
    extra = ("--count",) if config == "fsdp2" else ()
    recomputed = run(config, "--learned", "--memory", "recompute", *extra)
    same_weights(run("single_gpu", "--learned"), recomputed)
    if extra:
        plain, kept = run(config, "--plain", "--count"), run(config, "--learned", *extra)
        quantized = sum(v.numel() * 4 for n, v in plain.state.items() if n.endswith("proj.weight"))
        for one, two, three in zip(plain.ranks, kept.ranks, recomputed.ranks, strict=True):
            print(one["kept"], two["kept"], three["kept"])
            assert two["kept"] > one["kept"] + quantized and three["kept"] < 1.15 * one["kept"]


def test_trees_of_sentences_of_any_length_are_gathered_as_on_one_process(launched, tmp_path):
    found = []
    for config in ("single_gpu", "multi_cpu"):
        launched(config).run("tests.distributed.parse", tmp_path / config)
        found.append(json.loads((tmp_path / config / "metrics.json").read_text()))
    one, two = found
    assert one["samples"] == two["samples"] == [21] * 3 and len(one) == 1 + 4 * 3
    assert two == one


def test_an_uneven_last_batch_is_counted_once(run):
    one, two = (run(config, "--rows", "13").ranks[0]["rows"] for config in ("single_gpu", "multi_cpu"))
    assert [row["samples"] for row in two] == [13] * len(SETTINGS)
    for a, b in zip(one, two, strict=True):
        assert a["metrics"]["accuracy"] == b["metrics"]["accuracy"]  # the loss is a mean of batch means


@pytest.mark.parametrize(
    ("written", "read", "optimizer"),
    [
        ("multi_cpu", "single_gpu", "sgd"),
        ("zero3", "single_gpu", "sgd"),  # its optimizer state stays behind, and SGD has none
        ("zero3", "zero3", "sgd"),
        ("fsdp2", "multi_cpu", "adamw_torch"),
        ("fsdp2", "fsdp2", "adamw_torch"),
    ],
)
def test_a_checkpoint_of_one_backend_goes_on_under_another(run, written, read, optimizer):
    """The same logits after loading, nothing calibrated again, and the weights of the run that never stopped."""
    whole = run(written, *(FIVE if optimizer == "sgd" else ("--save", "--optim", optimizer)))
    resumed = run(read, "--resume", str(whole.checkpoint), "--optim", optimizer)
    loaded = AutoModelForCausalLM.from_pretrained(whole.checkpoint).eval()
    with torch.no_grad():
        torch.testing.assert_close(resumed.logits["begin"], loaded(**tokens(batch=2)).logits, rtol=0, atol=1e-5)
    same_weights(whole, resumed, atol=1e-6 if optimizer == "sgd" else 2e-5)
    saved = load_file(whole.checkpoint / "model.safetensors")
    steps = [name for name in saved if name.endswith("quantizer.scale")]
    assert steps and all(torch.equal(saved[name], resumed.state[name]) for name in steps)


def test_the_optimizers_state_matters_in_that_test(run):
    whole = run("fsdp2", "--save", "--optim", "adamw_torch")
    anew = run("single_gpu", "--model", str(whole.checkpoint), "--optim", "adamw_torch", "--steps", "3")
    name = "model.layers.0.mlp.up_proj.weight"
    assert float((anew.state[name] - whole.state[name]).abs().max()) > 1e-3


@pytest.mark.parametrize("config", ["zero3", "fsdp2"])
def test_saved_models_are_whole_and_train_on_under_every_backend(run, config):
    """`save_model` under sharding writes full weights; what it wrote goes into a stock Trainer and comes out again."""
    first = run(config, *FIVE)
    loaded = AutoModelForCausalLM.from_pretrained(first.out / "final").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**tokens(batch=2)).logits, first.logits["end"], rtol=0, atol=1e-5)
    folder = str(first.out / "final")
    one = run("single_gpu", "--model", folder, "--stock")
    two = run(config, "--model", folder, "--stock", lean=config == "fsdp2")
    same_weights(one, two)
    assert (
        float(
            (two.state["model.layers.0.mlp.up_proj.weight"] - first.state["model.layers.0.mlp.up_proj.weight"])
            .abs()
            .max()
        )
        > 0
    )


def test_ranks_that_disagree_stop_before_the_first_step(run):
    with pytest.raises(RuntimeError, match=r"the ranks disagree .*weights\.bits is 8 on rank 0 and 4 on rank 1"):
        run("multi_cpu", "--disagree")
