"""The command line, called as a user calls it."""

import json
import os
import re
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_robustq import QUANTIZERS, REGULARIZERS, SCALE_RULES, RobustQ, from_pretrained
from hf_robustq.cli import main
from hf_robustq.cli.methods import methods
from hf_robustq.cli.sweep import ratios
from hf_robustq.data import digits
from hf_robustq.models import image_classifier, preprocessing
from hf_robustq.scales import CODEBOOK_RULES
from tests.test_report import ROOT, training

SMALL = ["--max_samples", "64", "--calibration_samples", "64", "--batch_size", "32"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float model, and the same with quantizers of its own, as they are saved."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model, _ = image_classifier("resnet20_cifar", [str(n) for n in range(10)])
    model.save_pretrained(root / "float")
    plugin = RobustQ(model, {"weights": {"method": "lsq", "bits": 4}, "activations": {"method": "lsq", "bits": 4}})
    train = digits(32)[0].evaluation()
    batch = torch.stack([train[i]["pixel_values"] for i in range(64)])
    plugin.calibrate([batch], lambda model, batch: model(pixel_values=batch))
    model.save_pretrained(root / "lsq")
    return root


def rows(folder):
    return {(row["model"], row["setting"]): row for row in json.loads((folder / "rows.json").read_text())["rows"]}


def test_two_models_under_many_quantizers(folders, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["sweep", str(folders / "float"), str(folders / "lsq"), "--out", str(out), *SMALL]
    command += ["--bits", "4", "w3a8", "--methods", "mse", "log2", "--also", "bn", "--steps", "0.8:1.2:3"]
    command += ["--settings", "trained"]
    main(command)
    found = rows(out)
    assert len(found) == 2 * (1 + 2 * 2 * 2 * 3) + 1
    printed = capsys.readouterr().out
    assert "no quantizers of its own, so no trained" in printed
    assert f"{len(found)} rows in {out}/rows.json" in printed and "W3/A8 log2/bn/x0.8" in printed
    for (model, _), row in found.items():
        assert row["samples"] == 64 and row["seed"] == 0 and row["subset"] == "64 of 360, seed 0"
        trained = row["setting"] == "trained"
        needs = (row["activations"] and not trained) or "bn" in row["setting"]
        method = "log2" if "log2" in row["setting"] else "mse"
        assert row["method"] == (None if trained or row["setting"] == "fp" else method)
        assert row["reestimate"] == ("/bn" in row["setting"]) and (row["ratio"] == 0.8) == ("x0.8" in row["setting"])
        assert row["calibration"] == ("train: 64 samples, seed 0" if needs else None)
        if row["setting"] == "fp":  # the stored float weights are the same
            assert row["loss"] == pytest.approx(found[str(folders / "float"), "fp"]["loss"], rel=1e-6), model
    csv = datasets.Dataset.from_csv(str(out / "rows.csv"), cache_dir=str(tmp_path / "cache"))
    parquet = datasets.Dataset.from_parquet(str(out / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    for flat in (csv, parquet):
        assert flat["setting"][:] == [row["setting"] for row in found.values()]
        assert flat["loss"][:] == pytest.approx([row["loss"] for row in found.values()])
    table = (out / "table.md").read_text().splitlines()
    assert len(table) == 4 and table[0].endswith("trained |") and len({line.count("|") for line in table}) == 1
    assert table[2].endswith("|  |") and not table[3].endswith("|  |")  # the float model has no trained row
    assert not any("scale" in row for row in found.values())

    by_hand = loss_of(from_pretrained(image_class(), folders / "float", bits=4))
    assert found[str(folders / "float"), "w4"]["loss"] == pytest.approx(by_hand, rel=1e-5)


def image_class():
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification


def loss_of(model):
    """On the 64 images of `SMALL`, which the sweep draws by seed."""
    how = preprocessing(model)
    evaluation = digits(32, mean=how["mean"], std=how["std"])[1]
    chosen = sorted(torch.randperm(360, generator=torch.Generator().manual_seed(0))[:64].tolist())
    items = [evaluation[i] for i in chosen]
    pixels, labels = (torch.stack([torch.as_tensor(item[key]) for item in items]) for key in ("pixel_values", "labels"))
    with torch.no_grad():
        return float(model.eval()(pixel_values=pixels, labels=labels).loss)


def test_the_models_own_quantizers_and_going_on(folders, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["sweep", str(folders / "lsq"), "--out", str(out), *SMALL]
    main([*command, "--settings", "trained", "trained/x0.8", "w3a4@learned"])
    found = rows(out)
    trained = from_pretrained(image_class(), folders / "lsq", bits="trained", trainable=True)
    assert found[str(folders / "lsq"), "trained"]["loss"] == pytest.approx(loss_of(trained), rel=3e-4)
    assert len({row["loss"] for row in found.values()}) == 4
    capsys.readouterr()
    main([*command, "--settings", "trained", "trained/x0.8", "w3a4@learned", "w4"])
    printed = capsys.readouterr().out
    again = rows(out)
    assert len(re.findall(r"accuracy \d", printed)) == 1 and len(again) == 5
    assert all(again[key] == row for key, row in found.items())

    for flag in (["--seed", "1"], ["--first_last", "8"], ["--batch_size", "16"], ["--lapq_iterations", "3"]):
        why = rf"holds another sweep \({flag[0][2:]} differ\): name another --out"
        with pytest.raises(SystemExit, match=why):
            main([*command, *flag, "--settings", "w4"])
    from safetensors.torch import load_file, save_file

    file = folders / "lsq" / "model.safetensors"
    before = file.read_bytes()
    changed = {key: value.clone() for key, value in load_file(file).items()}
    changed["timm_model.linear.bias"] += 1
    save_file(changed, file, {"format": "pt"})
    with pytest.raises(SystemExit, match="is not what it was when its rows in"):
        main([*command, "--settings", "w3"])
    file.write_bytes(before)
    (out / "rows.json").write_text("[]")
    with pytest.raises(SystemExit, match="rows.json is no sweep's: name another --out"):
        main([*command, "--settings", "w3"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(SystemExit, match="is not empty and no sweep's"):
        main([*command[:3], str(tmp_path / "other"), *SMALL])


def test_an_analysis_is_what_the_functions_say(folders, tmp_path, capsys):
    from hf_robustq.analysis import weight_sqnr, weight_statistics

    out = tmp_path / "analysis.json"
    command = ["analyze", str(folders / "lsq"), "--out", str(out), "--samples", "32", *SMALL[2:], "--rho", "1e-4"]
    with pytest.raises(SystemExit, match="trained: sensitivity quantizes each layer by itself"):
        main([*command, "--settings", "w3", "trained"])
    main([*command, "--settings", "w3", "w4a4"])
    with pytest.raises(SystemExit, match="is there already: name another --out"):
        main([*command, "--settings", "w3", "w4a4"])
    found = json.loads(out.read_text())
    model = from_pretrained(image_class(), folders / "lsq", bits="trained", trainable=True)
    plugin = RobustQ.of(model)
    sizes = {site.name: site.parameter.numel() for site in plugin.sites}
    names = list(sizes)
    assert list(found["statistics"]) == names and list(found["settings"]) == ["w3", "w4a4"]
    statistics, noise = weight_statistics(plugin), weight_sqnr(plugin, "w3")
    for name in names:
        assert found["statistics"][name]["kurtosis"] == pytest.approx(statistics[name].kurtosis)
        assert sum(found["statistics"][name]["counts"]) == sizes[name]
        assert found["settings"]["w3"]["sqnr"][name] == pytest.approx(noise[name])
        assert found["settings"]["w4a4"]["divergence"][name] > 0
    sensitivity = found["settings"]["w3"]["sensitivity"]
    assert list(sensitivity) == ["", *names]
    assert sensitivity[""]["only"] == found["settings"]["w4a4"]["sensitivity"][""]["only"]
    assert {"loss", "accuracy"} == set(sensitivity[""]["only"]) and len(found["sharpness"]["0.0001"]) == 4
    assert "sharpness, rho 0.0001, ball around the stored weights" in capsys.readouterr().out


def test_bad_input_ends_in_one_line(folders, tmp_path):
    def fails(why, *words, model=folders / "float"):
        with pytest.raises(SystemExit, match=why) as info:
            main(["sweep", str(model), "--out", str(tmp_path / "out"), *words])
        assert "\n" not in str(info.value)

    fails(
        "16 calibration samples are fewer than a batch of 32: raise",
        "--calibration_samples",
        "16",
        "--batch_size",
        "32",
    )
    fails("--steps and --also go with --bits", "--steps", "0.8:1.2", "--settings", "w4")
    fails("nosuchmodel is no folder, no Hub id", *SMALL, model="nosuchmodel")
    fails("w4@kmeans/asym: /asym is for evenly spaced levels", "--bits", "4", "--methods", "kmeans", "--also", "asym")
    fails("--steps takes LOW:HIGH", "--bits", "4", "--steps", "1.2:0.8")
    fails("kmeans takes at most 8 bits", "--bits", "9", "--methods", "kmeans")
    fails("unknown scale rule 'lapqq'", "--bits", "4", "--methods", "lapqq")
    fails("is no checkpoint: it has no config.json", *SMALL, model=tmp_path)
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    weights = load_file(folders / "float" / "model.safetensors")
    name = next(key for key in weights if key.endswith("layer2.0.conv1.weight"))
    weights[name][0, 0, 0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    (broken / "config.json").write_text((folders / "float" / "config.json").read_text())
    fails("broken: non-finite values in timm_model.layer2.0.conv1.weight", *SMALL, "--bits", "4", model=broken)
    with pytest.raises(ValueError):
        main(["sweep", str(tmp_path), "--out", str(tmp_path / "out"), *SMALL, "--debug"])


def test_calibrating_on_what_is_measured_is_refused(texts, folders, tmp_path, capsys):
    command = [
        "sweep",
        str(folders / "float"),
        "--data",
        str(texts[0] / "data"),
        "--out",
        str(tmp_path / "out"),
        *SMALL,
    ]
    for more in (["--calibration_split", "validation"], ["--eval_split", "train"]):
        with pytest.raises(SystemExit, match="which is measured on, flatters every figure"):
            main([*command, *more])
    with pytest.raises(SystemExit, match="no split 'dev': choose with --calibration_split from train, validation"):
        main([*command, "--calibration_split", "dev"])
    analysis = ["analyze", *command[1:4], "--out", str(tmp_path / "a.json"), "--calibration_split", "validation"]
    with pytest.raises(SystemExit, match="which is measured on, flatters every figure"):
        main([*analysis, *SMALL[2:]])


def test_step_ratios():
    assert ratios("0.8:1.2:5") == [0.8, 0.9, 1.0, 1.1, 1.2]
    assert len(ratios("0.7:1.3")) == 9


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A dataset of texts with two labels, as parquet files, and a tokenizer of its words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("texts")
    words = [f"w{i}" for i in range(40)]
    rng = np.random.default_rng(0)
    for split, count in (("train", 80), ("validation", 40)):
        drawn = [list(rng.choice(words, 12)) for _ in range(count)]
        data = {"sentence": [" ".join(text) for text in drawn], "label": [int("w0" in text) for text in drawn]}
        datasets.Dataset.from_dict(data).to_parquet(str(root / "data" / f"{split}.parquet"))
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return root, PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


@pytest.mark.parametrize("task", ["classification", "language"])
def test_models_of_texts(texts, task, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    root, tokenizer = texts
    torch.manual_seed(0)
    if task == "classification":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        model = BertForSequenceClassification(BertConfig(vocab_size=42, num_labels=2, **sizes))
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=42, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["sweep", str(tmp_path / "model"), "--data", str(root / "data"), "--out", str(tmp_path / "out")]
    command += ["--calibration_samples", "32", "--batch_size", "16", "--bits", "4", "w8a8", "--settings", "w3@lapq"]
    main([*command, "--lapq_iterations", "1"])
    found = rows(tmp_path / "out")
    fp = found[str(tmp_path / "model"), "fp"]
    assert len({row["loss"] for row in found.values()}) == 4
    assert found[str(tmp_path / "model"), "w3@lapq"]["calibration"] == "train: 32 samples, seed 0"
    sentences = datasets.Dataset.from_parquet(str(root / "data" / "validation.parquet"), cache_dir=str(tmp_path / "c"))
    model.eval()
    with torch.no_grad():
        if task == "classification":
            encoded = tokenizer(sentences["sentence"][:], return_tensors="pt", padding=True)
            logits = model(**encoded).logits
            accuracy = (logits.argmax(1) == torch.tensor(sentences["label"][:])).float().mean()
            assert fp["accuracy"] == pytest.approx(float(accuracy)) and fp["samples"] == 40
        else:
            joined = [token for ids in tokenizer(sentences["sentence"][:])["input_ids"] for token in ids]
            blocks = torch.tensor(joined[: len(joined) // 16 * 16]).view(-1, 16)
            output = model(blocks, labels=blocks)
            right = (output.logits[:, :-1].argmax(-1) == blocks[:, 1:]).float().mean()
            assert fp["loss"] == pytest.approx(float(output.loss), rel=1e-5)
            assert fp["perplexity"] == pytest.approx(float(output.loss.exp()), rel=1e-4)
            assert fp["accuracy"] == pytest.approx(float(right))
            assert fp["samples"] == len(blocks)


def test_every_method_is_listed_with_its_paper(capsys):
    listed = {(kind, name): paper for kind, name, paper, _ in methods()}
    names = {name for _, name in listed}
    assert names >= {*SCALE_RULES, "lapq", "learned", *CODEBOOK_RULES, *QUANTIZERS, *REGULARIZERS, "/bc, /bcv"}
    expected = {"lsq": "1902.08153", "lapq": "1911.07190", "aciq": "1810.05723", "kure": "2002.07686"}
    without = {"absmax", "mse", "percentile", "kmeans", "fixed", "learned", "sensitivity", "divergence", "ema"}
    for (kind, name), paper in listed.items():
        if not name.startswith("/"):
            assert bool(paper) == (name not in without or (name == "absmax" and "quantizer" in kind)), (kind, name)
            assert paper == expected.get(name, paper)
    main(["methods"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and "arXiv 1606.06160" in printed


def test_train_does_what_the_recipe_does(tmp_path, monkeypatch):
    """The same weights from the project's file, from one of the user's own, and from the script by itself."""
    monkeypatch.chdir(tmp_path)
    small = ["--model_name_or_path", "test_resnet", "--max_steps", "2", "--pretrain_epochs", "0", "--variants", "with"]
    small += ["--eval_strategy", "no", "--sweep", "fp", "w4"]
    given = yaml.safe_load((ROOT / "recipes" / "configs" / "kure_digits.yaml").read_text())
    given |= {"model_name_or_path": "test_resnet", "max_steps": 2, "pretrain_epochs": 0.0, "variants": ["with"]}
    given |= {"eval_strategy": "no", "sweep": ["fp", "w4"]}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(given))
    script = [sys.executable, str(ROOT / "recipes" / "kure_resnet50.py"), *small, "--output_dir", "script"]
    done = subprocess.run(script, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr  # no progress bars in a file
    for argv in (["kure_digits", *small, "--output_dir", "named"], ["my.yaml", "--output_dir", "own"]):
        monkeypatch.setattr(sys, "argv", [])
        main(["train", *argv])
    folders = [tmp_path / name / "with_kure" for name in ("script", "named", "own")]
    one, *others = (load_file(folder / "model.safetensors") for folder in folders)
    for two in others:
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    command = json.loads((folders[1] / "robustq_run.json").read_text())["command"]
    assert "kure_resnet50.py --preset" in command and command.endswith("--output_dir named")


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("recipe: kure_resnet50\nlerning_rate: 1", [], "unknown key in my.yaml 'lerning_rate': did you mean"),
        ("learning_rate: 1", [], "names no recipe: add a line `recipe: NAME`, one of kure_qat, kure_resnet50"),
        ("recipe: kure_resnet", [], "unknown recipe 'kure_resnet': did you mean 'kure_resnet50'"),
        ("- a", [], "holds no keys"),
        ("a: [", [], "is no YAML: while parsing"),
        ("recipe: kure_resnet50", ["--lerning_rate", "1"], "unknown flag 'lerning_rate'"),
        (None, [], "is not there: name a YAML file"),
    ],
)  # fmt: skip
def test_what_train_cannot_read_is_one_line(text, flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    if text is not None:
        (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(SystemExit, match=re.escape(message)) as caught:
        main(["train", str(tmp_path / "my.yaml"), *flags])
    assert str(caught.value).startswith("error: ") and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=re.escape(message)):
        main(["train", "--debug", str(tmp_path / "my.yaml"), *flags])


def test_report_writes_where_it_is_told(tmp_path, capsys):
    training(tmp_path / "runs" / "kure")
    main(["report", str(tmp_path / "runs")])
    assert (tmp_path / "runs" / "report" / "index.html").exists()
    assert capsys.readouterr().out.startswith(f"{tmp_path}/runs/report/index.html, and ")
    with pytest.raises(SystemExit, match="error: .* is no run"):
        main(["report", str(tmp_path)])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="error: .*file"):
        main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "file")])
    with pytest.raises(ValueError, match="is no run"):
        main(["report", str(tmp_path), "--debug"])


def test_help_has_examples_and_imports_nothing_of_other_commands():
    cases = [["--help"], ["nothing"], [], ["report", "--help"]]
    script = f"""if True:
        import contextlib, io, json, sys
        from hf_robustq.cli import main
        for argv in {cases}:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                try:
                    main(argv)
                except SystemExit as error:
                    status = error.code
            modules = [name.rpartition(".")[2] for name in sys.modules if name.startswith("hf_robustq.cli.")]
            print(json.dumps([status, modules, out.getvalue()]))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [status for status, _, _ in found] == [0, 2, 2, 0], done.stderr
    assert [modules for _, modules, _ in found] == [["main"]] * 3 + [["main", "report"]]
    assert "robustq report outputs/kure sweeps/kure analysis.json --out report" in found[3][2]
