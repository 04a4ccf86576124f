import ast
import subprocess
import sys
from pathlib import Path

import hf_robustq

PACKAGE = Path(hf_robustq.__file__).parent

# What each room may import of the package. A folder stands for its files.
ALLOWED = {
    "files": set(),
    "shapes": set(),
    "functional": {"functional"},
    "grid": {"options"},
    "options": set(),
    "stage": set(),
    "size": {"calibrate", "products", "quantizers", "sharded", "sites"},
    "macs": {"sites"},
    "products": {"sharded", "sites"},
    "renaming": set(),
    "schedules": {"options"},
    "sharded": set(),
    "reparam": {"functional", "options", "sharded", "sites", "stage"},
    "sites": {"options", "sharded", "sites"},
    "scales": {"functional", "grid", "scales"},
    "quantizers": {"functional", "grid", "options", "quantizers", "scales", "schedules", "sharded", "stage"},
    "regularizers": {"functional", "grid", "options", "regularizers", "schedules", "sharded", "stage"},
    "config": {"config", "grid", "options", "quantizers", "regularizers", "reparam", "scales", "schedules"},
    "calibrate": {
        "functional", "grid", "macs", "products", "quantizers", "reparam", "scales", "sharded", "sites", "stage",
    },
    "telemetry": {"functional", "quantizers", "regularizers", "reparam", "sharded", "sites"},
    "distributed": {"sharded"},
    "optim": {"distributed", "functional", "optim", "options", "quantizers", "sharded"},
    "plugin": {
        "calibrate", "config", "distributed", "functional", "grid", "optim", "options", "plugin", "products",
        "quantizers", "regularizers", "renaming", "reparam", "schedules", "sharded", "sites", "size", "stage",
        "telemetry",
    },
    "hub": {"calibrate", "config", "files", "plugin", "products", "quantizers", "renaming", "sharded"},
    "sweep": {
        "calibrate", "distributed", "files", "functional", "grid", "plugin", "quantizers", "scales", "shapes",
        "sharded", "sites", "sweep",
    },
    "report": {"files", "report", "shapes", "size", "sweep"},
    "card": {"card", "files", "report", "size", "sweep"},
    "data": {"data"},
    "metrics": set(),
    "models": {"files", "models"},
    "parsing": {"files", "metrics", "parsing"},
    "trainer": {
        "calibrate", "card", "config", "distributed", "files", "optim", "options", "plugin", "products", "renaming",
        "report",
        "schedules", "sharded", "sweep", "trainer",
    },
    "cli": {
        "__version__", "analysis", "card", "cli", "config", "data", "files", "hub", "metrics", "models", "optim",
        "parsing", "plugin", "quantizers", "recipe", "regularizers", "reparam", "report", "scales", "sweep", "trainer",
    },
    "analysis": {"analysis", "calibrate", "functional", "plugin", "reparam", "scales", "sharded", "sites", "sweep"},
    "recipe": {
        "card", "config", "data", "files", "metrics", "models", "parsing", "plugin", "recipe", "report", "sweep",
        "trainer",
    },
}  # fmt: skip


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        if isinstance(node, ast.ImportFrom) and node.module == "hf_robustq":
            names = [f"hf_robustq.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from names


def test_imports_go_one_way():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for name in imported(path):
            if name.startswith("hf_robustq."):
                assert name.split(".")[1] in ALLOWED[room], f"{path.name} imports {name}"


def test_only_the_trainer_imports_the_trainer():
    for path in PACKAGE.rglob("*.py"):
        if "trainer" not in path.relative_to(PACKAGE).parts[0]:
            tree = ast.parse(path.read_text())
            names = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
            assert not names & {"Trainer", "TrainerCallback"}, path


OPTIONAL = (
    "conllu",
    "timm",
    "torchvision",
    "sklearn",
    "matplotlib",
    "plotly",
    "datasets",
    "evaluate",
    "deepspeed",
    "onnx",
    "onnxruntime",
    "peft",
)


def run(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_optional():
    run(
        "import sys, hf_robustq, hf_robustq.data, hf_robustq.metrics, hf_robustq.card\n"
        f"found = [name for name in {OPTIONAL!r} if name in sys.modules]\n"
        "assert not found, found\n"
    )


def test_the_trainer_works_without_anything_optional():
    """None in `sys.modules`: an import of it fails, as if it were not installed."""
    run(f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))\nfrom hf_robustq import RobustTrainer\n")


def test_every_public_name_exists_and_has_a_docstring():
    for name in hf_robustq.__all__:
        thing = getattr(hf_robustq, name)
        assert isinstance(thing, dict) or thing.__doc__, name
