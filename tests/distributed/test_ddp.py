"""Two processes (gloo, CPU) against one, through `accelerate launch` and the real Trainer."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def launch(script: Path, *arguments: str, config: str = "multi_cpu") -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file",
        str(ROOT / "accelerate_configs" / f"{config}.yaml"), "--main_process_port", str(port), str(script), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    folders = {}
    for config in ("single_gpu", "multi_cpu"):
        folder = tmp_path_factory.mktemp(config)
        launch(ROOT / "tests" / "distributed" / "train.py", str(folder), config=config)
        folders[config] = torch.load(folder / "end.pt"), json.loads((folder / "end.json").read_text())
    return folders["single_gpu"], folders["multi_cpu"]


def test_gradients_and_weights_equal_one_process(ends):
    (one, _), (two, _) = ends
    for kind in ("gradients", "state"):
        assert one[kind].keys() == two[kind].keys() and one[kind]
        for name, value in one[kind].items():
            torch.testing.assert_close(two[kind][name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_sweep_rows_equal_one_process_with_an_uneven_last_batch_counted_once(ends):
    (_, one), (_, two) = ends
    assert [row["samples"] for row in two["rows"]] == [13] * 4
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a["setting"] == b["setting"] and a["metrics"]["accuracy"] == b["metrics"]["accuracy"]
        assert b["metrics"]["loss"] == pytest.approx(a["metrics"]["loss"], abs=2e-2)  # a mean of batch means
    assert two["logs"] == pytest.approx(one["logs"], rel=1e-5)
