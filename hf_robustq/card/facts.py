"""How a model came about: command, settings, versions."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("hf_robustq", "torch", "transformers", "accelerate", "timm", "datasets")


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command_line(argv: Sequence[str] | None = None) -> str | None:
    """What this process was started with, without secrets; None where that is no script (a notebook, a test)."""
    argv = list(sys.argv if argv is None else argv)
    name = Path(argv[0]).name if argv else ""
    if name in ("ipykernel_launcher.py", "__main__.py") or not name.endswith(("robustq", ".py")):
        return None
    shown, secret = [name if name == "robustq" else shlex.quote(argv[0])], False
    for word in argv[1:]:
        flag, sign, _ = word.partition("=")
        hidden = flag.startswith("-") and re.search(r"token|key|password|secret", flag, re.IGNORECASE)
        shown.append("<hidden>" if secret else f"{flag}=<hidden>" if hidden and sign else shlex.quote(word))
        secret = bool(hidden and not sign)
    return " ".join(shown)


def training_settings(
    args: Any,
    lr_schedule: Mapping[str, Any] | None,
    steps: float | None,
    bits: float | None,
    **options: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The training arguments that a reader needs to repeat the run; `steps`, `bits`: learning rates of their own."""
    names = ("learning_rate", "weight_decay", "num_train_epochs", "per_device_train_batch_size",
             "gradient_accumulation_steps", "world_size", "max_grad_norm", "bf16", "fp16")  # fmt: skip
    settings = {name: getattr(args, name) for name in names}
    schedule = dict(lr_schedule) if lr_schedule else _plain(args.lr_scheduler_type)
    settings |= {f"learning_rate of {k}": v for k, v in (("steps", steps), ("bits", bits)) if v is not None}
    settings |= {name: str(dict(values)) for name, values in options.items() if values is not None}
    optimizer = f"{_plain(args.optim)} {args.optim_args or ''}".strip()
    return {"optimizer": optimizer, **settings, "lr_schedule": str(schedule)}


def _plain(choice: Any) -> str:
    """The value of an enumeration's member."""
    return str(getattr(choice, "value", choice))
