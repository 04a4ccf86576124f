"""`accelerate launch` with the project's own configurations, on CPU processes; one launch makes many runs."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import load_file

from tests.clock import charge, spent

ROOT = Path(__file__).parents[2]
SERVE = Path(__file__).with_name("serve.py")
ON_ONE = ("single_gpu", "multi_cpu")
LONGEST = 300
"""Seconds that a run may take."""


LEAN = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
"""What the launcher says to the ranks where a config has `fsdp_cpu_ram_efficient_loading`."""


class Launch:
    """The processes of `accelerate_configs/<config>.yaml`, with gloo for NCCL, in float32."""

    def __init__(self, folder: Path, config: str) -> None:
        settings = yaml.safe_load((ROOT / "accelerate_configs" / f"{config}.yaml").read_text())
        processes = 1 if config == "single_gpu" else 2
        settings |= {"num_processes": processes, "use_cpu": config in ON_ONE, "mixed_precision": "no"}
        (folder / "accelerate.yaml").write_text(yaml.safe_dump(settings))
        own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        own["MKL_CBWR"] = "COMPATIBLE"  # else sums depend on where a tensor lies, and roundings on sums
        self.log = folder / "launch.log"
        with tempfile.TemporaryDirectory() as place, socket.socket(socket.AF_UNIX) as door, self.log.open("w") as log:
            address = f"{place}/socket"
            door.bind(address)
            door.listen()
            door.settimeout(1)
            command = [
                sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml"),
                "--main_process_port", str(free_port()), str(SERVE), address,
            ]  # fmt: skip
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **own})
            callers = [self._accept(door) for _ in range(processes)]
        ranks = {self._receive(caller): caller for caller in callers}
        self.ranks = [ranks[rank] for rank in range(processes)]
        launcher = psutil.Process(self.process.pid)
        started = [one.cpu_times() for one in (launcher, *launcher.children(recursive=True))]
        charge(sum(times.user + times.system for times in started))

    def _accept(self, door: socket.socket) -> Connection:
        while self.process.poll() is None:
            try:
                return Connection(door.accept()[0].detach())
            except TimeoutError:
                continue
        raise RuntimeError(self.log.read_text())

    def _receive(self, caller: Connection) -> Any:
        try:
            if caller.poll(LONGEST):
                return caller.recv()
        except EOFError:
            pass
        raise RuntimeError(self.log.read_text())

    def run(self, script: str, out: Path, *arguments: str, lean: bool = False) -> None:
        """`main([out, *arguments])` of a module on every rank. A rank that fails ends the others: `RuntimeError`.

        `lean`: with FSDP's `cpu_ram_efficient_loading`.
        """
        out.mkdir(parents=True, exist_ok=True)
        logs, port = [out / f"rank{i}.log" for i in range(len(self.ranks))], free_port()
        for rank, log in zip(self.ranks, logs, strict=True):
            rank.send((script, [str(out), *arguments], str(log), {"MASTER_PORT": str(port), **(LEAN if lean else {})}))
        running, failed = {rank: self._receive(rank) for rank in self.ranks}, False
        end = time.monotonic() + LONGEST
        while running:
            done = wait(list(running), timeout=max(end - time.monotonic(), 0))
            for rank in running.keys() & done:
                status, seconds = self._receive(rank)
                charge(seconds)
                del running[rank]
                failed |= status != 0
            if failed or not done:
                failed, end = True, time.monotonic() + LONGEST
                for child in running.values():
                    with suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
        if failed:
            raise RuntimeError("\n".join(log.read_text() for log in logs))


def close(launches: Sequence[Launch]) -> None:
    """End all of them."""
    for rank in (rank for one in launches for rank in one.ranks):
        rank.send(None)
    before = spent()
    for one in launches:
        one.process.wait(LONGEST)
    charge(before - spent())  # what they took was charged when they spent it


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


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
