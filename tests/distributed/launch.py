"""`accelerate launch` with the project's own configurations, on CPU processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "distributed" / "train.py"
ON_ONE = ("single_gpu", "multi_cpu")


def launch(
    out: Path, config: str, *arguments: str, processes: int | None = None, lean: bool = False, script: Path = SCRIPT
) -> None:
    """Run `train.py`, or another script, as `accelerate_configs/<config>.yaml` says, with gloo for NCCL, in float32.

    `lean`: with FSDP's `cpu_ram_efficient_loading`.
    """
    settings = yaml.safe_load((ROOT / "accelerate_configs" / f"{config}.yaml").read_text())
    processes = processes or (1 if config == "single_gpu" else 2)
    settings |= {"num_processes": processes, "use_cpu": config in ON_ONE, "mixed_precision": "no"}
    if lean:
        settings["fsdp_config"]["fsdp_cpu_ram_efficient_loading"] = True
    out.mkdir(parents=True, exist_ok=True)
    (out / "accelerate.yaml").write_text(yaml.safe_dump(settings))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(out / "accelerate.yaml"),
        "--main_process_port", str(port), str(script), str(out), *arguments,
    ]  # fmt: skip
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **own}, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr)


class Run:
    """What a run left: weights and stages, logits before and after, and each rank's own figures."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.state = load_file(out / "final" / "model.safetensors")
        self.logits = torch.load(out / "logits.pt")
        self.ranks = [json.loads(path.read_text()) for path in sorted(out.glob("rank*.json"))]

    @property
    def checkpoint(self) -> Path:
        return self.out / "run" / "checkpoint-2"
