"""Runs that are killed, half of them while they save, and go on: do they end bit-equal to one that was not?

    python -m tests.kills --kills 40 --seed 0

A run is a fork of this process. Each is killed once; then it goes on with `train(resume_from_checkpoint=True)`, or from
the beginning where there is no checkpoint yet.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from hf_robustq import RobustTrainer
from tests.test_trainer import arguments, text
from tests.zoo import bert

RUNS = {
    "KURE": ({"regularizers": {"kure": {"strength": 1.0}}, "weights": {"bits": 4}}, {}),
    "WaveQ, LSQ and EMA": (
        {
            "weights": {"method": "absmax", "bits": 9},
            "activations": {"method": "lsq", "bits": 8},
            "regularizers": {"waveq": {"strength": 1.0, "rise": 4, "fall": 12, "smoothness": 0.5}},
            "budget": {"bits": 5},
        },
        {"ema": {"decay": 0.9}},
    ),
    "SatNL and EMA": (
        {"satnl": {}, "regularizers": {"kure": {}}, "weights": {"method": "lsq", "bits": 4}},
        {"ema": {"decay": 0.9}},
    ),
}
STEPS = 16


class Dying(RobustTrainer):
    """Kills its own process some time after its n-th save has begun."""

    at_save, after, saves = 0, 0.0, 0

    def save_model(self, *args, **kwargs):
        self.saves += 1
        if self.saves == self.at_save:
            threading.Timer(self.after, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        super().save_model(*args, **kwargs)


def train(folder: Path, name: str, at_save: int = 0, after: float = 0.0) -> None:
    """From the last whole checkpoint, or the beginning, to the end; the final state goes to `end.pt`."""
    config, options = RUNS[name]
    torch.manual_seed(0)
    args = arguments(
        folder, max_steps=STEPS, num_train_epochs=8, save_strategy="steps", save_steps=2, save_total_limit=3,
        optim="adamw_torch", learning_rate=1e-3, eval_strategy="steps", eval_steps=4,
    )  # fmt: skip
    trainer = Dying(
        model=bert(), args=args, train_dataset=text(), eval_dataset=text(8), sweep=["w4"],
        robustq={**config, "calibration_samples": 8}, **options,
    )  # fmt: skip
    trainer.at_save, trainer.after = at_save, after
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    trainer.train(resume_from_checkpoint=True if whole else None)
    state = dict(trainer.model.state_dict())
    if trainer.robustq.ema is not None:
        state |= {f"average.{key}": value for key, value in trainer.robustq.ema.state_dict()["averages"].items()}
    torch.save(state, folder / "end.pt")


def fork(folder: Path, *args: object) -> int:
    child = os.fork()
    if child:
        return child
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        train(folder, *args)  # type: ignore[arg-type]
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw, failed = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as root:
        ends, seconds = {}, {}
        for name in RUNS:
            folder = Path(root) / name
            folder.mkdir()
            start = time.monotonic()
            _, status = os.waitpid(fork(folder, name), 0)
            if status:
                sys.exit((folder / "log.txt").read_text())
            seconds[name], ends[name] = time.monotonic() - start, torch.load(folder / "end.pt")
        kills = dict.fromkeys(RUNS, 0)
        for number in range(options.kills):
            name = list(RUNS)[number % len(RUNS)]
            folder = Path(root) / f"{number} {name}"
            folder.mkdir()
            while_saving = number % 2 == 0
            if while_saving:
                child = fork(folder, name, draw.randint(1, STEPS // 2), draw.uniform(0, 0.15))
            else:
                child = fork(folder, name)
                time.sleep(draw.uniform(0.3, 0.9) * seconds[name])
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            killed = os.WIFSIGNALED(status)
            kills[name] += killed
            left = sorted(path.name for path in folder.glob("checkpoint-*"))
            _, status = os.waitpid(fork(folder, name), 0)
            end = torch.load(folder / "end.pt") if not status else {}
            equal = end.keys() == ends[name].keys() and all(torch.equal(end[key], ends[name][key]) for key in end)
            failed += not equal
            how = "while it saved" if while_saving else "at any point"
            print(
                f"{number + 1}: {name}, {how}, killed {killed}, {', '.join(left) or 'no checkpoint'}: equal {equal}",
                flush=True,
            )
            if not equal:
                print((folder / "log.txt").read_text()[-2000:])
    print(f"{sum(kills.values())} kills, {failed} restarts that did not end bit-equal")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
