"""Damaged JSON ends every subcommand in one line that names the file.

`HF_ROBUSTQ_MUTATIONS=2000` tries as many of each kind; the default is few.
"""

import json
import os
import random
from types import SimpleNamespace

import pytest
import torch
import yaml

from hf_robustq import RobustQ
from tests.mutations import damage, outcome
from tests.test_report import analysis, training

COUNT = int(os.environ.get("HF_ROBUSTQ_MUTATIONS", "16"))
SMALL = ["--max_samples", "32", "--calibration_samples", "32", "--batch_size", "32"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run with its card and a sweep of it, an analysis, and a model in two files with their index."""
    from transformers import ResNetConfig, ResNetForImageClassification

    root = tmp_path_factory.mktemp("whole")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic", "num_labels": 10}
    model = ResNetForImageClassification(ResNetConfig(**sizes))
    plugin = RobustQ(model, {"weights": {"method": "lsq", "bits": 4}, "activations": {"method": "lsq", "bits": 4}})
    plugin.calibrate([torch.randn(4, 3, 32, 32)], lambda model, batch: model(pixel_values=batch))
    run = training(root / "run")
    for folder in (run, root / "out" / "with_kure" / "checkpoint-2"):
        model.save_pretrained(folder, max_shard_size="8KB")
    (run / "README.md").write_text("---\ntags: [robustq]\n---\n\n# A card\n")
    facts = json.loads((run / "robustq_run.json").read_text())
    facts |= {"config": plugin.config.to_dict(), "name": "run", "tags": [], "versions": {"torch": "2"}, "task": None}
    (run / "robustq_run.json").write_text(json.dumps(facts))
    (root / "swept").mkdir()
    analysis(root / "analysis.json")
    checkpoint = root / "out" / "with_kure" / "checkpoint-2"
    state = {"global_step": 2, "epoch": 1.0, "max_steps": 4, "log_history": [{"loss": 1.0, "epoch": 1.0, "step": 2}]}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    for name in ("robustq_sweep.json", "robustq_weights.json"):
        (checkpoint.parent / name).write_bytes((run / name).read_bytes())
    return root


@pytest.fixture
def commands(root, monkeypatch):
    """By kind: a file, and a command that reads it. Nothing is measured, trained, drawn or pushed: it is only read."""
    import huggingface_hub

    from hf_robustq.trainer import RobustTrainer

    class Api:
        def create_repo(self, repo, **options):
            return SimpleNamespace(repo_id=repo)

        def model_info(self, repo):
            return SimpleNamespace(tags=["robustq"], siblings=[])

        def create_commit(self, repo, **options):
            return SimpleNamespace(commit_url="there")

    def stop(*args, **options):
        raise SystemExit(0)

    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "")
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr("hf_robustq.cli.sweep.digest", lambda model: "digest")
    monkeypatch.setattr("hf_robustq.cli.analyze.calibration_batches", stop, raising=False)
    monkeypatch.setattr("hf_robustq.trainer.batches.calibration_batches", stop)
    monkeypatch.setattr("hf_robustq.trainer.BitWidthSweepCallback.run", stop)
    monkeypatch.setattr(RobustTrainer, "train", stop)
    run, swept = root / "run", root / "swept" / "rows.json"
    sweep = ["sweep", str(run), *SMALL, "--out", str(swept.parent), "--bits"]
    if not swept.exists():
        rows_of(run, swept, sweep)
    publish = ["publish", str(run), "me/run"]
    train = ["train", str(config(root)), "--model_name_or_path"]
    analyze = ["analyze", str(run), "--out", str(root / "new.json"), *SMALL[2:]]
    fresh = ["sweep", str(run), *SMALL, "--out", str(root / "fresh")]
    out = root / "out" / "with_kure"
    report = ["report", str(run), "--out", str(root / "page")]
    return {
        "report: sweeps": (run / "robustq_sweep.json", report),
        "report: facts": (run / "robustq_run.json", report),
        "report: weights": (run / "robustq_weights.json", report),
        "report: log": (run / "trainer_state.json", report),
        "report: rows": (swept, ["report", str(swept.parent), "--out", str(root / "page")]),
        "report: analysis": (root / "analysis.json", ["report", str(root / "analysis.json"), "--out", report[-1]]),
        "publish: facts": (run / "robustq_run.json", [*publish, "--sweeps", str(swept.parent)]),
        "publish: sweeps": (run / "robustq_sweep.json", [*publish, "--sweeps", str(swept.parent)]),
        "publish: rows": (swept, [*publish, "--sweeps", str(swept.parent)]),
        "publish: config": (run / "config.json", publish),
        "publish: card": (run / "README.md", [*publish, "--license", "mit"]),
        "publish: index": (run / "model.safetensors.index.json", publish),
        "sweep: rows": (swept, [*sweep, "4"]),
        "sweep: config": (run / "config.json", fresh),
        "sweep: index": (run / "model.safetensors.index.json", fresh),
        "analyze: config": (run / "config.json", analyze),
        "analyze: index": (run / "model.safetensors.index.json", analyze),
        "train: recipe": (root / "kure.yaml", [*train, "test_resnet"]),
        "train: config": (run / "config.json", [*train, str(run)]),
        "train: index": (run / "model.safetensors.index.json", [*train, str(run)]),
        "resume: state": (out / "checkpoint-2" / "trainer_state.json", [*train, "test_resnet"]),
        "resume: config": (out / "checkpoint-2" / "config.json", [*train, "test_resnet"]),
        "resume: sweeps": (out / "robustq_sweep.json", [*train, "test_resnet"]),
        "resume: weights": (out / "robustq_weights.json", [*train, "test_resnet"]),
    }


KINDS = (
    *("report: sweeps", "report: facts", "report: weights", "report: log", "report: rows", "report: analysis"),
    *("publish: facts", "publish: sweeps", "publish: rows", "publish: config", "publish: index", "publish: card"),
    *("sweep: rows", "sweep: config", "sweep: index", "analyze: config", "analyze: index"),
    *("train: recipe", "train: config", "train: index", "resume: state", "resume: config", "resume: sweeps"),
    "resume: weights",
)


def config(root):
    file = root / "kure.yaml"
    values = {"recipe": "kure_resnet50", "output_dir": str(root / "out"), "resume": True, "variants": ["with"]}
    values |= {"max_steps": 4, "eval_strategy": "no", "save_strategy": "no", "sweep": ["fp"], "report_to": "none"}
    file.write_text(yaml.safe_dump(values))
    return file


def rows_of(run, file, command):
    """What `robustq sweep` leaves: of float weights and of two settings."""
    import argparse
    import dataclasses

    from hf_robustq import Setting
    from hf_robustq.cli.sweep import IDENTITY, add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(command[1:])
    rows = []
    for name in ("fp", "w4", "w2"):
        setting = Setting.parse(name)
        facts = {"model": str(run), "setting": name, **dataclasses.asdict(setting)}
        facts["method"] = facts.pop("scale")
        facts |= {"accuracy": 0.5, "loss": 1.0, "samples": 32, "subset": "all", "staged": 1.0, "calibration": None}
        rows.append({**facts, "data": None, "split": None, "seed": 0, "seconds": 1.0})
    identity = {key: getattr(args, key) for key in IDENTITY}
    values = {"version": 1, "sweep": identity, "models": {str(run): "digest"}, "rows": rows}
    file.write_text(json.dumps(values, indent=1))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_json_is_one_line(kind, commands, root, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["robustq"])
    file, command = commands[kind]
    assert outcome(command) == "works", capsys.readouterr()
    draw = random.Random(kind)
    found = [damage(file, command, draw) for _ in range(COUNT)]
    capsys.readouterr()
    odd = sorted({one for one in found if one not in ("works", "one line")})
    print(
        f"{kind}: {len(found)} mutations, {found.count('works')} work, {found.count('one line')} in one line, "
        f"{len(found) - found.count('works') - found.count('one line')} others"
    )
    assert not odd, "\n".join(odd[:20])
