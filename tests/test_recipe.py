import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import Trainer

from hf_robustq import RobustQConfig
from hf_robustq.cli.train import script
from hf_robustq.models import image_classifier
from hf_robustq.recipe import last_checkpoint, open_output, parse
from hf_robustq.schedules import LR_SCHEDULES

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "configs"
sys.path.insert(0, str(ROOT / "recipes"))

import kure_qat  # noqa: E402
import kure_resnet50  # noqa: E402
import noise_lsq_resnet  # noqa: E402
import symreg_satnl  # noqa: E402
import waveq_camembert  # noqa: E402
import waveq_vision  # noqa: E402

RECIPES = {
    "kure": kure_resnet50,
    "qat": kure_qat,
    "noise_lsq": noise_lsq_resnet,
    "symreg_satnl": symreg_satnl,
    "waveq": waveq_vision,
    "parser": waveq_camembert,
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_headed_by_its_command_and_parses(path):
    prefix = next(name for name in RECIPES if path.stem.startswith(name))
    module = RECIPES[prefix]
    assert path.read_text().startswith(f"# accelerate launch recipes/{module.__name__}.py")
    recipe, args = parse(module.RecipeArguments, CONFIGS, prefix, ["--preset", path.stem.removeprefix(f"{prefix}_")])
    values = yaml.safe_load(path.read_text())
    assert args.learning_rate == values["learning_rate"] and recipe.variants == values["variants"]
    assert script(path.stem) == (ROOT / "recipes" / f"{module.__name__}.py", path)


# architecture: batch size, epochs, learning rate, divide by 10 every n epochs (Tables 1 and 3 of the supplement)
PAPER = {
    "imagenet_resnet18": (256, 83, 1e-3, 30),
    "imagenet": (128, 49, 1e-3, 30),
    "imagenet_mobilenetv2": (256, 83, 1e-3, 30),
}


@pytest.mark.parametrize("preset", PAPER)
def test_imagenet_presets_are_the_papers(preset):
    batch, epochs, rate, every = PAPER[preset]
    recipe, args = parse(kure_resnet50.RecipeArguments, CONFIGS, "kure", ["--preset", preset])
    assert (args.per_device_train_batch_size, args.num_train_epochs, args.learning_rate) == (batch, epochs, rate)
    assert recipe.lr_step_epochs == every and recipe.kure_strength == 1.0 and recipe.kure_target == 1.8
    assert args.optim == "sgd" and "momentum=0.9" in args.optim_args and args.weight_decay == 1e-4
    assert args.max_grad_norm == 0


# method, bits of weights and inputs, batch size, epochs, learning rate, divide by 10 every n epochs (Tables 2 and 4)
PAPER_QAT = {
    "imagenet_dorefa44": ("resnet18", "dorefa", 4, 4, 256, 80, 1e-4, 30),
    "imagenet_lsq66": ("resnet18", "lsq", 6, 6, 128, 60, 1e-3, 20),
    "imagenet_lsq44": ("resnet18", "lsq", 4, 4, 128, 60, 1e-3, 20),
    "imagenet_lsq68": ("resnet50", "lsq", 6, 8, 64, 50, 1e-3, 20),
}


@pytest.mark.parametrize("preset", PAPER_QAT)
def test_presets_of_training_with_quantizers_are_the_papers(preset):
    model, method, weights, inputs, batch, epochs, rate, every = PAPER_QAT[preset]
    recipe, args = parse(kure_qat.RecipeArguments, CONFIGS, "qat", ["--preset", preset])
    config = RobustQConfig.from_dict(kure_qat.quantizers(recipe))
    assert (config.weights.method, config.weights.bits) == (method, weights) and config.first_last == "float"
    assert (config.activations.method, config.activations.bits) == (method, inputs)
    assert recipe.model_name_or_path == f"{model}.tv_in1k" and recipe.lr_step_epochs == every
    assert (args.per_device_train_batch_size, args.num_train_epochs, args.learning_rate) == (batch, epochs, rate)
    assert recipe.kure_strength == 1.0 and recipe.kure_target == 1.8 and args.weight_decay == 1e-4
    assert f"w3a{inputs}@learned" in kure_qat.settings(recipe)


def test_imagenet_alone_is_the_resnet50():
    recipe, args = parse(kure_resnet50.RecipeArguments, CONFIGS, "kure", ["--preset", "imagenet"])
    assert recipe.model_name_or_path == "resnet50.tv_in1k" and args.num_train_epochs == 49


def test_zero_without_deepspeed_names_the_extra(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'hf_robustq\[deepspeed\]'"):
        parse(kure_resnet50.RecipeArguments, CONFIGS, "kure", [])


def test_flags_win_over_the_preset_and_unknown_ones_are_refused(tmp_path):
    _, args = parse(kure_resnet50.RecipeArguments, CONFIGS, "kure", ["--preset=cifar10", "--learning_rate", "0.5"])
    assert args.learning_rate == 0.5 and args.per_device_train_batch_size == 128
    with pytest.raises(ValueError, match="unknown preset 'cifar': did you mean 'cifar10'"):
        parse(kure_resnet50.RecipeArguments, CONFIGS, "kure", ["--preset", "cifar"])
    (tmp_path / "kure_odd.yaml").write_text("learning_rat: 1\n")
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        parse(kure_resnet50.RecipeArguments, tmp_path, "kure", ["--preset", "odd"])


def test_a_full_output_folder_needs_a_choice(tmp_path):
    folder = tmp_path / "out"
    open_output(folder, resume=False, overwrite=False)
    assert last_checkpoint(folder) is None
    (folder / "checkpoint-7").mkdir(parents=True)
    with pytest.raises(ValueError, match="--overwrite to delete it, --resume to go on"):
        open_output(folder, resume=False, overwrite=False)
    open_output(folder, resume=True, overwrite=False)
    assert last_checkpoint(folder) == str(folder / "checkpoint-7")
    open_output(folder, resume=False, overwrite=True)
    assert not folder.exists()


def test_head_and_labels_must_agree(tmp_path):
    model, source = image_classifier("test_resnet", ["a", "b", "c"])
    assert source == "random (test_resnet)" and model.config.id2label[2] == "c"
    model.save_pretrained(tmp_path / "three")
    again, _ = image_classifier(str(tmp_path / "three"), ["a", "b", "c"])
    assert again.config.num_labels == 3
    with pytest.raises(ValueError, match="has 3 outputs but the dataset has 10 labels.*--new_head"):
        image_classifier(str(tmp_path / "three"), [str(i) for i in range(10)])
    new, _ = image_classifier(str(tmp_path / "three"), [str(i) for i in range(10)], new_head=True)
    assert new.timm_model.get_classifier().out_features == 10


def test_random_weights_are_timms_own_initialisation():
    """The transformers wrapper would draw N(0, 0.02) for every layer."""
    import timm

    ours = image_classifier("resnet18", ["a", "b"])[0].timm_model.layer1[0].conv1.weight.std().item()
    theirs = timm.create_model("resnet18", num_classes=2).layer1[0].conv1.weight.std().item()
    assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize(
    ("preset", "rates"),
    [("imagenet", {0: 1.0, 100: 0.5 / 100, 150: 0.1464466 / 1000}), ("cifar", {0: 1.0, 50: 0.5})],
)
def test_noise_presets_are_those_of_the_appendix(preset, rates):
    """Appendix A.3: weights only, all layers, 0.01; on ImageNet a cosine and a tenth every 50 of 200 epochs."""
    recipe, args = parse(noise_lsq_resnet.RecipeArguments, CONFIGS, "noise_lsq", ["--preset", preset])
    assert noise_lsq_resnet.quantizers(recipe, "noise") == {
        "weights": {
            "method": "noise",
            "c": 0.2,
            "k": 50.0,
            "k_relative": False,
            "schedule": "constant",
            "noise_lr_scale": False,
            "bits": 2,
            "per_channel": False,
        },
        "first_last": "same",
    }
    assert args.learning_rate == 0.01 and args.weight_decay == 1e-4 and args.optim == "sgd"
    assert args.num_train_epochs == {"imagenet": 200, "cifar": 100}[preset]
    schedule = noise_lsq_resnet.schedule(recipe)
    for epoch, rate in rates.items() if schedule else ():
        options = {key: value for key, value in schedule.items() if key != "name"}
        assert LR_SCHEDULES[schedule["name"]](epoch, args.num_train_epochs, **options) == pytest.approx(rate)
    assert bool(schedule) == (preset == "imagenet") and args.lr_scheduler_type == "cosine"


def test_the_noise_recipes_flags_reach_the_quantizers():
    flags = ["--weight_bits", "3", "--activation_bits", "4", "--noise_activations", "--first_last", "8", "--c", "0.4"]
    recipe, _ = parse(noise_lsq_resnet.RecipeArguments, CONFIGS, "noise_lsq", flags)
    config = RobustQConfig.from_dict(noise_lsq_resnet.quantizers(recipe, "noise"))
    assert config.first_last == 8 and config.activations.method == "noise" and config.weights.options["c"] == 0.4
    config = RobustQConfig.from_dict(noise_lsq_resnet.quantizers(recipe, "lsq"))
    assert config.weights.method == config.activations.method == "lsq" and config.activations.bits == 4


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """run(flags, recipe): the script of a recipe, as `python recipes/<recipe>.py` runs it, in the test's folder.

    In this process, which has imported everything: what it printed, and how it ended.
    """
    monkeypatch.chdir(tmp_path)

    def script(*arguments, recipe="kure_resnet50"):
        monkeypatch.setattr(sys, "argv", [f"recipes/{recipe}.py", "--report_to", "none", *arguments])
        capfd.readouterr()
        ended = None
        try:
            runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
        except SystemExit as error:  # of which Python prints the message, and ends with status 1
            ended = error.code
        return subprocess.CompletedProcess(arguments, 1 if ended else 0, capfd.readouterr().out, str(ended))

    return script


@pytest.mark.parametrize("bars", [False, True])
def test_the_recipe_end_to_end_on_a_tiny_net(run, tmp_path, bars):
    small = ["--model_name_or_path", "test_resnet", "--max_steps", "3", "--output_dir", "out"]
    small += ["--disable_tqdm", str(not bars)]
    done = run(*small, "--eval_strategy", "steps", "--eval_steps", "3", "--sweep", "fp", "w4", "w2", "w4a4")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| without", "| with"))]
    assert len(rows) == 2 and all(len(re.findall(r"\d+\.\d\d", row)) == 4 for row in rows)
    assert "{'" not in done.stdout and re.search(r"without_kure, epoch 0.13, eval_worst [\d.]+, eval_rob", done.stdout)
    swept = [line for line in done.stdout.splitlines() if line.startswith("| accuracy |")]
    assert [re.findall(r"\d+\.\d\d", line) for line in swept] == [re.findall(r"\d+\.\d\d", row) for row in rows]
    last = done.stdout.strip().splitlines()[-1]
    for name in ("robustness.png", "results.md", "with_kure", "without_kure", "report/index.html"):
        assert (tmp_path / "out" / name).exists() and f"out/{name}" in last
    for name in ("with_kure/README.md", "without_kure/model.safetensors"):
        assert (tmp_path / "out" / name).exists()
    assert "without_kure" in (tmp_path / "out" / "report" / "index.html").read_text()
    refused = run(*small)
    assert refused.returncode == 1 and refused.stderr.startswith("error: out is not empty")


def test_the_noise_recipe_end_to_end_on_a_tiny_net(run, tmp_path):
    small = ["--model_name_or_path", "test_resnet", "--max_steps", "3", "--eval_strategy", "no", "--output_dir", "out"]
    done = run(*small, "--pretrain_epochs", "1", recipe="noise_lsq_resnet")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| lsq", "| noise"))]
    assert len(rows) == 2 and all(len(re.findall(r"\d+\.\d\d", row)) == 2 for row in rows)
    config = json.loads((tmp_path / "out" / "noise" / "config.json").read_text())["quantization_config"]
    assert config["weights"]["method"] == "noise" and config["weights"]["bits"] == 2


@pytest.mark.parametrize("method", ["dorefa", "noise"])
def test_the_recipe_of_training_with_quantizers_end_to_end_on_a_tiny_net(run, tmp_path, method):
    small = ["--model_name_or_path", "test_resnet", "--max_steps", "3", "--eval_strategy", "no", "--output_dir", "out"]
    flags = ["--method", method, "--activation_bits", "6", "--sweep_weight_bits", "8", "3"]
    done = run(*small, *flags, "--pretrain_epochs", "1", recipe="kure_qat")
    assert done.returncode == 0, done.stderr[-3000:]
    head, _, *rows = done.stdout.partition("Settings:")[0].strip().split("\n\n")[-1].splitlines()
    learned, others = ["trained", "W8/A6 learned", "W3/A6 learned"], ["W8/A6", "W3/A6"]
    columns = [column.strip() for column in head.split("|")[2:-1]]
    assert columns == (["FP", *learned, *others] if method == "noise" else learned)
    assert len(rows) == 2 and all(len(re.findall(r"\d+\.\d\d", row)) == len(head.split("|")) - 3 for row in rows)
    config = json.loads((tmp_path / "out" / "with_kure" / "config.json").read_text())["quantization_config"]
    assert config["weights"]["method"] == method
    assert config["activations"]["method"] == ("lsq" if method == "noise" else method)
    assert config["regularizers"] and (tmp_path / "out" / "robustness.png").exists()


# epochs, rate, weight decay, warm-up epochs, eta_min, ASAM's rho (Table 1A of the supplement)
PAPER_SYMREG = {
    "imagenet_resnet18": ("resnet18", 150, 0.4, 1e-5, 5, 1e-2, 1.0),
    "imagenet_mobilenetv2": ("mobilenetv2_100", 150, 0.4, 1e-5, 5, 1e-2, 1.0),
    "imagenet_mobilenetv3": ("mobilenetv3_large_100", 240, 0.4, 1e-5, 5, 1e-2, 0.2),
    "imagenet_qat": (None, 90, 0.04, 1e-5, 5, 1e-2, 1.0),
    "cifar100_mobilenetv2": ("mobilenetv2_cifar", 120, 0.4, 5e-5, 5, 1e-2, 1.0),
}


@pytest.mark.parametrize("preset", PAPER_SYMREG)
def test_symreg_presets_are_the_papers(preset, tmp_path):
    model, epochs, rate, decay, warmup, eta_min, rho = PAPER_SYMREG[preset]
    flags = ["--preset", preset, "--output_dir", str(tmp_path)]
    recipe, args = parse(symreg_satnl.RecipeArguments, CONFIGS, "symreg_satnl", flags)
    assert (args.num_train_epochs, args.learning_rate, args.weight_decay) == (epochs, rate, decay)
    assert recipe.warmup_epochs == warmup and symreg_satnl.options(recipe, "ours")["asam"]["rho"] == rho
    assert model is None or recipe.model_name_or_path == model
    both, plain = (RobustQConfig.from_dict(symreg_satnl.stages(recipe, v)) for v in ("ours_kure", "baseline"))
    assert [r.method for r in both.regularizers] == ["sym1", "kure"] and both.satnl.d == 1.0
    assert both.first_last == plain.first_last == 8
    assert plain.satnl is None and not plain.regularizers and "asam" not in symreg_satnl.options(recipe, "kure")
    assert (both.weights is not None) == (preset == "imagenet_qat") == both.satnl.invert
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    args.warmup_steps, args.eval_strategy = warmup / epochs, "no"  # as the run sets it
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=args, optimizers=(optimizer, None))
    schedule, rates = trainer.create_scheduler(10 * epochs, optimizer), []
    for _ in range(10 * epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == 0 and rates[10 * warmup] == rate == max(rates)
    assert rates[5 * warmup] == pytest.approx(rate / 2) and rates[-1] == pytest.approx(eta_min, rel=0.01)
    middle = 10 * warmup + (10 * epochs - 10 * warmup) // 2
    assert rates[middle] == pytest.approx((rate + eta_min) / 2, rel=0.01)


def test_the_symreg_recipe_and_its_second_stage_end_to_end_on_a_tiny_net(run, tmp_path):
    """Four variants from scratch, the last with SatNL; then quantizers from its folder, whose network it starts as."""
    small = ["--model_name_or_path", "test_resnet", "--max_steps", "3", "--eval_strategy", "no", "--output_dir", "out"]
    flags = ["--variants", *symreg_satnl.VARIANTS, "--sweep", "fp", "w4"]
    done = run(*small, *flags, recipe="symreg_satnl")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| base", "| ours", "| kure"))]
    assert len(rows) == 4 and all(len(re.findall(r"\d+\.\d\d", row)) == 2 for row in rows)
    config = json.loads((tmp_path / "out" / "ours_kure" / "config.json").read_text())["quantization_config"]
    assert config["satnl"] == {"function": "tanh", "d": 1.0, "invert": False}
    second = [
        "--model_name_or_path",
        "out/ours_kure",
        "--max_steps",
        "2",
        "--eval_strategy",
        "no",
        "--output_dir",
        "qat",
    ]
    second += ["--weight_bits", "8", "--satnl_invert", "true", "--variants", "ours", "--learning_rate", "0"]
    second += ["--warmup_epochs", "0", "--ema_decay", "0", "--sweep", "fp", "trained", "w4", "w4@learned"]
    done = run(*second, recipe="symreg_satnl")
    assert done.returncode == 0, done.stderr[-3000:]
    files = [tmp_path / folder / "robustq_sweep.json" for folder in ("out/ours_kure", "qat/ours")]
    last = [json.loads(file.read_text())["sweeps"][-1]["rows"] for file in files]
    figures = [{row["setting"]: row["metrics"]["accuracy"] for row in rows} for rows in last]
    assert figures[1].keys() == {"fp", "trained", "w4", "w4@learned"}
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out/ours_kure", "qat/ours"))
    weights = [name for name in one if name.endswith("weight")]
    assert weights and all(torch.allclose(one[name], two[name], rtol=0, atol=1e-6) for name in weights)


# epochs of the three phases, batch, rate (Table 4 of the supplement; the damaged cells by its ratio 4:5:3)
PAPER_WAVEQ = {
    "simplenet_cifar10": ("simplenet_cifar", [59, 74, 44], 128, 0.001),
    "vgg11_cifar10": ("vgg11_cifar", [83, 104, 62], 128, 0.0001),
    "svhn8": ("svhn8", [36, 45, 27], 128, 0.01),
    "resnet20_paper": ("resnet20_cifar", [32, 40, 24], 128, 0.01),
    "alexnet_imagenet": ("alexnet.torchvision", [28, 35, 21], 256, 0.01),
    "resnet18_imagenet": ("resnet18.tv_in1k", [32, 40, 24], 256, 0.01),
    "mobilenet_imagenet": ("mobilenetv1_100.ra4_e3600_r224_in1k", [41, 52, 31], 256, 0.01),
}


@pytest.mark.parametrize("preset", PAPER_WAVEQ)
def test_waveq_presets_are_the_papers(preset, tmp_path):
    model, phases, batch, rate = PAPER_WAVEQ[preset]
    flags = ["--preset", preset, "--output_dir", str(tmp_path)]
    recipe, args = parse(waveq_vision.RecipeArguments, CONFIGS, "waveq", flags)
    assert (recipe.model_name_or_path, recipe.phases, args.num_train_epochs) == (model, phases, sum(phases))
    assert recipe.flip == (preset != "svhn8")  # a mirrored digit is none
    assert (args.per_device_train_batch_size, args.learning_rate, args.weight_decay) == (batch, rate, 1e-4)
    assert args.optim_args == "momentum=0.9" and args.optim == "sgd"
    config = RobustQConfig.from_dict(waveq_vision.stages(recipe, "with"))
    (one,) = config.regularizers
    assert one.options["rise"] * sum(phases) == pytest.approx(phases[0])
    assert one.options["fall"] * sum(phases) == pytest.approx(sum(phases[:2]))
    assert config.weights.bits == 9 and config.budget is None and one.options["learn"]


def test_waveq_from_scratch_differs_by_the_sine_only(tmp_path):
    for preset in ("scratch_simplenet", "scratch_resnet20", "scratch_svhn8", "scratch_vgg11"):
        flags = ["--preset", preset, "--output_dir", str(tmp_path)]
        recipe, _ = parse(waveq_vision.RecipeArguments, CONFIGS, "waveq", flags)
        without, own = (waveq_vision.stages(recipe, variant) for variant in ("without", "with"))
        assert own.pop("regularizers")["waveq"]["learn"] is False and own == without
        assert own["weights"]["method"] == "dorefa"


@pytest.mark.parametrize("method", ["absmax", "dorefa"])
def test_the_waveq_recipe_end_to_end_on_a_tiny_net(run, tmp_path, method):
    small = ["--model_name_or_path", "test_resnet", "--max_steps", "12", "--output_dir", "out"]
    small += ["--eval_strategy", "steps", "--eval_steps", "12"]
    flags = ["--variants", "without", "with", "--sweep", "fp", "trained", "--method", method, "--pretrain_epochs", "0"]
    flags += ["--budget_bits", "0", "--budget_megabytes", "0.25", "--weight_bits", "3"]
    done = run(*small, *flags, recipe="waveq_vision")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| without", "| with"))]
    assert len(rows) == 2 and all(len(re.findall(r"\d+\.\d\d", row)) == 2 for row in rows)
    assert "bit-widths are fixed" in done.stdout
    sizes = re.findall(r"\| ([0-9.]+) of 1.503 in float", done.stdout)
    assert len(sizes) == 2 and float(sizes[1]) <= 0.25
    card = (tmp_path / "out" / "with" / "README.md").read_text()
    assert "## Size, as it was trained" in card and f"| {sizes[1]} of 1.503 in float" in card
    assert f"| {method}, " in card and "- learning_rate of bits: 0.5" in card
    logs = json.loads((tmp_path / "out" / "with" / "trainer_state.json").read_text())["log_history"]
    logged = [(key, bits) for log in logs for key, bits in log.items() if key.startswith("eval_bits/")]
    found = re.search(r"in the mean: (.*)", done.stdout).group(1)
    assert logged and all(f"{name.removeprefix('eval_bits/')} {bits:g}" in found for name, bits in logged)
    assert (tmp_path / "out" / "with" / "robustq_bits.png").exists()
    sweep = json.loads((tmp_path / "out" / "with" / "robustq_sweep.json").read_text())["sweeps"][-1]["rows"]
    mean = float(re.search(r"bit-widths are fixed, ([0-9.]+) in the mean", done.stdout).group(1))
    assert {row["setting"]: row["weights"] for row in sweep}["trained"] == pytest.approx(mean, abs=0.006)


def test_the_parsers_recipe_end_to_end_on_generated_sentences(run, tmp_path):
    """WaveQ first, whose bits the others take; a run of its own has those of `--weight_bits`."""
    small = ["--pretrain_epochs", "0.3", "--max_steps", "12", "--eval_strategy", "steps", "--eval_steps", "6"]
    small += ["--sweep", "fp", "trained", "w8a8", "--output_dir", "out", "--save_strategy", "no"]
    done = run(*small, "--variants", "lsq", "qat", "waveq", "afterwards", recipe="waveq_camembert")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "A smoke run on generated sentences" in done.stdout
    for metric in ("LAS", "UPOS"):
        text = done.stdout.split(f"{metric}:\n")[1]
        rows = dict(re.findall(r"^\| (\w+) +\|(.*)\|$", text.split("\n\n")[0], re.MULTILINE))
        figures = {name: len(re.findall(r"\d+\.\d\d", row)) for name, row in rows.items()}
        assert figures == {"float": 1, "finetuned": 2, "waveq": 3, "afterwards": 3, "qat": 3, "lsq": 3}
    fixed = re.search(r"bit-widths are fixed, [0-9.]+ in the mean: (.*)", done.stdout).group(1)
    bits = {name: int(b) for name, b in (one.rsplit(" ", 1) for one in fixed.split(", "))}
    assert sum(bits.values()) / len(bits) <= 4.5 and {*bits.values()} == {4, 5}
    for variant in ("qat", "lsq", "afterwards"):
        config = json.loads((tmp_path / "out" / variant / "config.json").read_text())["quantization_config"]
        assert config["weights"]["mixed"] == bits and config["activations"]["bits"] == 8
    sweep = json.loads((tmp_path / "out" / "waveq" / "robustq_sweep.json").read_text())
    assert [one["rows"][0]["dataset"] for one in sweep["sweeps"]] == ["eval", "eval", "test"]
    assert load_file(tmp_path / "out" / "finetuned" / "model.safetensors").keys() <= {
        *load_file(tmp_path / "out" / "afterwards" / "model.safetensors")
    }


def test_the_parsers_recipe_says_what_is_wrong_and_goes_on_from_a_folder(run, tmp_path):
    from hf_robustq.parsing.grammar import generated_treebank

    line = "{}\t{}\t_\t{}\t_\t_\t{}\t{}\t_\t_"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for split, rows in generated_treebank(40, 8, 8, seed=len(name)).items():
            words = (zip(*(row[key] for key in ("words", "upos", "heads", "deprels")), strict=True) for row in rows)
            text = "".join("\n".join(line.format(i, *w) for i, w in enumerate(one, 1)) + "\n\n" for one in words)
            (tmp_path / name / f"x-ud-{split}.conllu").write_text(text)
    small = ["--max_steps", "4", "--eval_strategy", "no", "--sweep", "fp", "w8", "--variants", "kure"]
    first = ["--preset", "scratch", "--pretrain_epochs", "0", "--dataset_name", "one", "two", "--output_dir", "both"]
    done = run(*first, *small, recipe="waveq_camembert")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"kure on one", "kure on two"} == {*re.findall(r"^\| (kure on \w+) +\|", done.stdout, re.MULTILINE)}
    again = ["--preset", "scratch", "--pretrain_epochs", "0", "--dataset_name", "one", "--output_dir", "again"]
    again += ["--model_name_or_path", "both/kure"]
    done = run(*again, *small, recipe="waveq_camembert")
    assert done.returncode == 0 and "Weights: both/kure" in done.stdout, done.stderr[-3000:]
    file = tmp_path / "one" / "x-ud-train.conllu"
    file.write_text(file.read_text().replace("\t0\troot", "\t1\troot", 1))
    done = run(*first, *small, "--overwrite", recipe="waveq_camembert")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.match(r"error: one/x-ud-train.conllu:\d+: ", done.stderr.strip().splitlines()[-1])


def picture_folder(folder, size, rows=12):
    """A parquet folder in the `datasets` image format: train and test, three classes."""
    import datasets
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        pixels = generator.integers(0, 256, (rows, size, size, 3), dtype=np.uint8)
        features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["a", "b", "c"])})
        columns = {"img": [Image.fromarray(p) for p in pixels], "fine": [i % 3 for i in range(rows)]}
        (folder / "data").mkdir(parents=True, exist_ok=True)
        data = datasets.Dataset.from_dict(columns, features=features)
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.mark.parametrize("size", [32, 96])
def test_the_recipe_on_a_folder_with_given_weights_interrupted_and_resumed(run, tmp_path, size):
    """Small images held in memory, larger ones decoded on access; two epochs at once, or one and then the other."""
    from safetensors.torch import load_file, save_file

    data = picture_folder(tmp_path / "pictures", size)
    model, _ = image_classifier("test_resnet", ["a", "b", "c"])
    save_file(model.timm_model.state_dict(), tmp_path / "given.safetensors")
    common = ["--model_name_or_path", "test_resnet", "--weights", str(tmp_path / "given.safetensors")]
    common += ["--dataset_name", data, "--image_size", str(size), "--variants", "with", "--sweep", "fp", "w4"]
    common += ["--per_device_train_batch_size", "4", "--disable_tqdm", "true", "--save_total_limit", "9"]
    whole = run(*common, "--num_train_epochs", "2", "--output_dir", "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert f"Preset: finetune. Weights: {tmp_path / 'given.safetensors'}" in whole.stdout
    import shutil

    shutil.copytree(
        tmp_path / "whole" / "with_kure" / "checkpoint-3", tmp_path / "parts" / "with_kure" / "checkpoint-3"
    )
    shutil.copy(tmp_path / "whole" / "with_kure" / "robustq_sweep.json", tmp_path / "parts" / "with_kure")
    resumed = run(*common, "--num_train_epochs", "2", "--output_dir", "parts", "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    ends = [load_file(tmp_path / name / "with_kure" / "model.safetensors") for name in ("whole", "parts")]
    differ = [key for key in ends[0] if not (ends[0][key] == ends[1][key]).all()]
    assert not differ
    sweeps = [(tmp_path / name / "with_kure" / "robustq_sweep.json").read_text() for name in ("whole", "parts")]
    assert sweeps[0] == sweeps[1]


def test_wrong_data_is_one_line(run, tmp_path):
    data = picture_folder(tmp_path / "pictures", 32)
    done = run("--model_name_or_path", "test_resnet", "--dataset_name", data, "--label_column_name", "coarse")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: --label_column_name coarse") and "fine (ClassLabel)" in last


def test_figures_of_the_second_paper_show_what_was_measured(tmp_path):
    """The lines and bars of each panel are the figures in the files."""
    import symreg_figures as figures

    rows = [
        {"model": f"outputs/{net}", "setting": setting, "weights": bits, "activations": a, "ratio": r, "accuracy": v}
        for net, gain in (("plain", 0.0), ("ours", 0.1))
        for setting, bits, a, r, v in (
            ("fp", None, None, 1.0, 0.8),
            ("w4", 4, None, 1.0, 0.7 + gain),
            ("w4@mse/x0.8", 4, None, 0.8, 0.5 + gain),
            ("w4@mse/bc", 4, None, 1.0, 0.1),
            ("w4@log2", 4, None, 1.0, 0.6 + gain),
            ("w3@log2", 3, None, 1.0, 0.2 + gain),
            ("w3a3@log2", 3, 3, 1.0, 0.1),
        )
    ]
    (panel,) = figures.ratios(rows).axes
    assert panel.get_title() == "w4@mse"
    drawn = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
    assert drawn["plain"] == [[0.8, 50], [1.0, 70]] and drawn["ours"][1] == pytest.approx([1.0, 80])
    log2, _ = figures.bits(rows).axes
    assert [line.get_xydata()[:, 0].tolist() for line in log2.lines] == [[3, 4], [3, 4]]
    known = {"edges": [-1.0, 0.0, 2.0], "counts": [3, 5], "kurtosis": 3.0, "skewness": 0.0, "symmetry": 1.0}
    settings = {"w8@aciq": {"divergence": {"a": 0.1, "b": 0.2}}}
    analysis = {"statistics": {"net.layer1.conv.weight": known}, "settings": settings}
    (panel,) = figures.histograms({"ours": analysis}, "layer1.conv").axes
    assert [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in panel.patches] == [(-1, 1, 3), (0, 2, 5)]
    assert figures.divergence({"ours": analysis}).axes[0].lines[0].get_xydata().tolist() == [[1, 0.1], [2, 0.2]]
    with pytest.raises(ValueError, match="layer7: 0 weights of ours end so"):
        figures.histograms({"ours": analysis}, "layer7")
