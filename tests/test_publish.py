"""Pushes to a Hub on this machine, and loads from it: in processes of their own, as `HF_ENDPOINT` is read at import."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_robustq.trainer.secret import Secret
from tests.loopback_hub import LoopbackHub

ROOT = Path(__file__).parents[1]

TRAIN = """
import sys
from tests.test_trainer import arguments, pictures
from tests.zoo import resnet
from hf_robustq import RobustTrainer
from hf_robustq.metrics import compute_accuracy
folder = sys.argv[1]
config = {"weights": {"method": "lsq", "bits": 4}, "activations": {"method": "lsq", "bits": 8},
          "regularizers": {"kure": {}}, "calibration_samples": 8}
more = {"push_to_hub": True, "hub_model_id": "me/pushed", "hub_token": "hf_secret"} if "push" in sys.argv else {}
args = arguments(folder, eval_strategy="epoch", save_strategy="epoch", report_to=["tensorboard"], **more)
trainer = RobustTrainer(
    model=resnet(), args=args, train_dataset=pictures(), eval_dataset=pictures(8).evaluation(), robustq=config,
    sweep=["fp", "trained", "w4", "w3", "w4a4", "w4@mse/x0.9", "w4@mse/x1.1"], compute_metrics=compute_accuracy,
)
trainer.train()
trainer.save_model()
if more:
    trainer.push_to_hub(license="mit", dataset="pictures", finetuned_from="other/base")
else:
    trainer.create_model_card()
print(repr(trainer.args.hub_token), trainer.args)
"""

LOAD = """
import sys, torch
from transformers import AutoModelForImageClassification
from hf_robustq import from_pretrained
from tests.zoo import images
folder, repo = sys.argv[1:]
for options in ({"bits": None}, {"bits": "trained"}, {"bits": 4}, {"bits": 3, "activation_bits": 8}):
    one, two = (from_pretrained(AutoModelForImageClassification, path, **options).eval() for path in (folder, repo))
    with torch.no_grad():
        pixels = images()["pixel_values"]
        assert torch.equal(one(pixels).logits, two(pixels).logits), options
one, two = (AutoModelForImageClassification.from_pretrained(path).eval() for path in (folder, repo))
with torch.no_grad():
    assert torch.equal(one(pixels).logits, two(pixels).logits)
print("same logits")
"""

PUBLISH = "import sys; from hf_robustq.cli import main; main(['publish', *sys.argv[1:]])"

SEVERAL = """
import os, sys
from hf_robustq.cli import main
for case in sys.argv[2:]:
    os.environ["HF_TOKEN"], *words = case.split(" ")
    try:
        main(["publish", sys.argv[1], *words])
    except SystemExit as error:
        print(error)
"""

SCRIPT = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture
def hub():
    with LoopbackHub() as found:
        yield found


def python(hub, home, script, *arguments, token="hf_secret", **environment):
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    own |= {"HF_TOKEN": token} if token else {}
    kept = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**kept, **own, **environment})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained run with its card and a checkpoint; no Hub involved."""
    path = tmp_path_factory.mktemp("runs") / "kure"
    with LoopbackHub() as unused:
        done = python(unused, path.parent / "home", TRAIN, path)
    assert done.returncode == 0, done.stderr
    return path


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def error_of(done):
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def token_is_nowhere(hub, *done):
    """But in the headers that authenticate."""
    for _, path, _, body in hub.requests:
        assert b"hf_secret" not in body and "hf_secret" not in path
    assert not any(b"hf_secret" in data for files in hub.repos.values() for data in files.values())
    assert not any("hf_secret" in text for one in done for text in (one.stdout, one.stderr))


def test_the_trainer_pushes_a_model_that_loads_alike(hub, tmp_path):
    trained = python(hub, tmp_path / "home", TRAIN, tmp_path / "run", "push")
    assert trained.returncode == 0, trained.stderr
    assert "\n<hidden> " in trained.stdout
    files = hub.repos["me/pushed"]
    assert files["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert card == (tmp_path / "run" / "README.md").read_text()
    for text in ("# pushed", "license: mit", "base_model: other/base", "| eval |", "| eval, mse/x0.9 |", "model-index"):
        assert text in card, text
    assert {"robustq_curve.png", "robustq_steps.png", "robustq_sweep.json", "robustq_run.json"} <= files.keys()
    loaded = python(hub, tmp_path / "home", LOAD, tmp_path / "run", "me/pushed")
    assert loaded.returncode == 0 and loaded.stdout.endswith("same logits\n"), loaded.stderr
    token_is_nowhere(hub, trained, loaded)
    assert not any(b"hf_secret" in data for data in content(tmp_path / "run").values())


def test_publish_pushes_the_folder_and_leaves_it_as_it_is(hub, folder, tmp_path):
    before = content(folder)
    rows = [{"model": str(folder), "setting": f"w{b}@aciq", "weights": b, "activations": None, "samples": 8,
             "subset": "all", "split": "test", "accuracy": 0.25 * b / 4} for b in (3, 4)]  # fmt: skip
    (tmp_path / "swept").mkdir()
    values = {"sweep": {"seed": 0}, "models": {str(folder): "digest"}, "rows": rows}
    (tmp_path / "swept" / "rows.json").write_text(json.dumps(values))
    options = ["--license", "apache-2.0", "--datasets", "cifar10", "--tags", "vision", "--sweeps", tmp_path / "swept"]
    done = python(hub, tmp_path / "home", PUBLISH, folder, "kure", *options)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/me/kure/commit/" in done.stdout and "%|" not in done.stderr
    files = hub.repos["me/kure"]
    assert content(folder) == before and hub.commits["me/kure"] == ["Upload a model with its card"]
    card = files["README.md"].decode()
    for text in (
        "license: apache-2.0",
        "- cifar10",
        "- vision",
        "- robustq",
        "Measured afterwards: swept",
        "| 25.00 |",
    ):
        assert text in card, text
    changed = {"README.md", "robustq_run.json", "robustq_curve.png", "robustq_steps.png"}
    same = files.keys() & before.keys() - changed
    assert all(files[name] == before[name] for name in same) and "model.safetensors" in same
    assert not [name for name in files if name.startswith(("checkpoint", "runs", "training_args"))]
    assert any(name.startswith("checkpoint-") for name in before) and any(name.startswith("runs/") for name in before)
    loaded = python(hub, tmp_path / "home", LOAD, folder, "me/kure")
    assert loaded.returncode == 0, loaded.stderr
    token_is_nowhere(hub, done, loaded)


def test_variants_of_a_recipe_go_to_repos_of_their_own(hub, tmp_path):
    out = tmp_path / "digits"
    words = ["--preset", "digits", "--model_name_or_path", "test_resnet", "--max_steps", "2", "--sweep", "fp", "w4"]
    words += ["--eval_strategy", "no", "--push_to_hub", "--hub_token", "hf_secret", "--output_dir", out]
    recipe = ROOT / "recipes" / "kure_resnet50.py"
    done = python(hub, tmp_path / "home", SCRIPT, recipe, *words, token=None)
    assert done.returncode == 0, done.stderr
    assert (out / "float" / "model.safetensors").is_file()  # what they share is not pushed
    assert hub.commits == {f"me/digits-{name}": ["End of training"] for name in ("with_kure", "without_kure")}
    for name in ("with_kure", "without_kure"):
        files = hub.repos[f"me/digits-{name}"]
        assert files["model.safetensors"] == (out / name / "model.safetensors").read_bytes()
        assert "handwritten digits" in files["README.md"].decode()
        assert "--hub_token <hidden>" in json.loads(files["robustq_run.json"])["command"]
    token_is_nowhere(hub, done)
    assert not any(b"hf_secret" in data for data in content(out).values())


def metadata(card):
    return yaml.safe_load(card.split("---")[1])


def test_a_card_of_ones_own_keeps_its_text(hub, folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own", ignore=shutil.ignore_patterns("checkpoint-*", "robustq_*"))
    (own / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\nmore: [1]\n---\nAll *my* words\n")
    again = "hf_secret me/own --tags b mine --datasets d/e"
    done = python(hub, tmp_path / "home", SEVERAL, own, "hf_secret me/own --private --tags a", again)
    assert "error" not in done.stdout and len(hub.commits["me/own"]) == 2, done.stdout + done.stderr
    card = hub.repos["me/own"]["README.md"].decode()
    expected = {"license": "mit", "tags": ["mine", "robustq", "b"], "datasets": ["d/e"], "more": [1]}
    assert metadata(card) == expected and card.endswith("---\nAll *my* words\n")
    created = [json.loads(body) for _, path, _, body in hub.requests if path == "/api/repos/create"]
    assert [one.get("visibility") for one in created] == ["private", None]  # as the organization has it
    token_is_nowhere(hub, done)


def test_a_network_that_dies_leaves_all_as_it_was_and_the_push_is_repeated(hub, folder, tmp_path):
    before = content(folder)
    hub.broken["PUT"] = 1000
    broken = python(hub, tmp_path / "home", PUBLISH, folder, "me/kure", "--license", "mit")
    message = error_of(broken)
    assert "the push to me/kure broke (" in message and "nothing was committed" in message
    assert hub.repos["me/kure"] == {} and content(folder) == before
    hub.broken, hub.lost = {"PUT": 0, "POST": 1}, 1  # nobody but the Hub can tell these two apart
    lost = python(hub, tmp_path / "home", SEVERAL, folder, *["hf_secret me/kure"] * 2)
    assert lost.stdout.count("while it was committed, which may have succeeded") == 2, lost.stdout + lost.stderr
    assert len(hub.commits["me/kure"]) == 1 and hub.objects
    puts = sum(method == "PUT" for method, *_ in hub.requests)
    done = python(hub, tmp_path / "home", PUBLISH, folder, "me/kure")
    assert done.returncode == 0 and len(hub.commits["me/kure"]) == 1, done.stderr  # nothing is committed twice
    assert sum(method == "PUT" for method, *_ in hub.requests) == puts  # what had arrived is not sent again
    assert hub.repos["me/kure"]["model.safetensors"] == before["model.safetensors"]
    assert hub.repos["me/kure"]["README.md"] == before["README.md"]
    token_is_nowhere(hub, broken, lost, done)


def test_what_the_hub_refuses_is_one_line(hub, folder, tmp_path):
    hub.repos["you/theirs"], hub.commits["you/theirs"] = {}, []
    hub.repos["me/other"], hub.commits["me/other"] = {"config.json": b"{}"}, []
    home = tmp_path / "home"
    cases = {
        "hf_secret you/theirs": "no write access to you/theirs (you don't have the rights",
        "hf_secret me/other": "me/other holds a model that is not of this package: name another, or --force it",
        " me/new": "no token to push with: `hf auth login`, or set HF_TOKEN",
        "hf_wrong me/new": "the Hub does not know the token",
        "hf_secret a/b/c": "Repo id must be in the form",
        "hf_secret me/empty --license my-own": 'me/empty: Invalid metadata in README.md. - "license" must be one of',
    }
    done = python(hub, home, SEVERAL, folder, *cases)
    lines = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    for message, line in zip(cases.values(), lines, strict=True):
        assert message in line and "hf_" not in line
    assert hub.repos.pop("me/empty") == {}
    offline = python(hub, home, PUBLISH, folder, "me/new", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set: unset it to push to me/new" in error_of(offline)
    assert hub.repos.keys() == {"you/theirs", "me/other"} and hub.repos["me/other"] == {"config.json": b"{}"}
    hub.full = True
    full = error_of(python(hub, home, PUBLISH, folder, "me/other", "--force"))
    assert "no write access to me/other (Storage limit reached)" in full
    hub.full = False
    forced = python(hub, home, PUBLISH, folder, "me/other", "--force")
    assert forced.returncode == 0 and len(hub.repos["me/other"]) > 5, forced.stderr


def test_folders_that_cannot_be_published_are_one_line(folder, tmp_path, monkeypatch):
    from hf_robustq.cli import main

    def fails(path, message, *more):
        with pytest.raises(SystemExit, match=message) as caught:
            main(["publish", str(path), "me/x", *more])
        assert str(caught.value).startswith("error: ") and "\n" not in str(caught.value)

    fails(tmp_path / "nowhere", "is no folder")
    fails(folder.parent, "has no config.json, but .*kure in it do: publish one of these")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "is no checkpoint: it has no config.json")
    shutil.copy(folder / "config.json", tmp_path / "empty")
    fails(tmp_path / "empty", "has no weights")
    shutil.copy(folder / "model.safetensors", tmp_path / "empty")
    fails(tmp_path / "empty", r"has no card: trainer.create_model_card\(\) writes one")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "empty" / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(tmp_path / "empty", "has no model-2.safetensors, which model.safetensors.index.json names")
    (tmp_path / "empty" / "model.safetensors.index.json").unlink()
    (tmp_path / "empty" / "README.md").write_text("---\ntags: [a\n---\n")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fails(tmp_path / "empty", "README.md: its metadata is no YAML: ")


def test_a_secret_is_sent_and_not_shown(tmp_path):
    import copy
    import pickle

    secret = Secret("hf_secret")
    assert f"Bearer {secret}" == "Bearer hf_secret" and repr([secret]) == "[<hidden>]"
    assert pickle.loads(pickle.dumps(secret)) is None and b"hf_secret" not in pickle.dumps({"a": secret})
    assert copy.deepcopy([secret])[0] == copy.copy(secret) == "hf_secret"
