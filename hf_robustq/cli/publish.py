"""`robustq publish`: a run's folder with its card to the Hub.

    robustq publish outputs/kure_digits/with_kure me/kure-digits --license apache-2.0
    robustq publish outputs/kure me/kure --private --base_model timm/resnet50.a1_in1k --sweeps sweeps/kure

Pushes the model, its card and figures, its sweeps, in one commit: what breaks before that leaves the Hub as it was, and
the same command may be repeated. Not pushed: checkpoints, optimizers, logs of trackers, `training_args.bin`. The folder
stays as it is: the card is changed on its way. The token is that of `hf auth login`, or of HF_TOKEN.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

IGNORED = (
    *("checkpoint-*", "runs", "wandb", ".*", "_*", "report", "events.out.*", "*.tmp"),
    *("training_args.bin", "optimizer.*", "scheduler.*", "rng_state*", "robustq_state.safetensors"),
)
"""Names of files and folders that stay at home."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder of a model with its card")
    add("repo", metavar="REPO", help="owner/name, or a name of your own")
    add("--private", action="store_true", help="where the repo is made now")
    add("--message", default="Upload a model with its card", help="of the commit")
    add("--license", help="as the Hub has it: apache-2.0")
    add("--base_model", help="Hub id of what was fine-tuned")
    add("--datasets", nargs="+", help="Hub ids of the data")
    add("--tags", nargs="+", help="besides those of the card")
    add("--sweeps", nargs="+", type=Path, default=[], help="folders of `robustq sweep` that measured DIR too")
    add("--force", action="store_true", help="replace a model that is not of this package")


def run(args: argparse.Namespace) -> None:
    options = {key: getattr(args, key) for key in ("license", "base_model", "datasets", "tags")}
    facts = {key: value for key, value in options.items() if value}
    publish(args.folder, args.repo, args.sweeps, facts, args.private, args.message, args.force)


def publish(
    folder: Path,
    repo: str,
    sweeps: Sequence[Path] = (),
    facts: dict[str, Any] | None = None,
    private: bool = False,
    message: str = "Upload a model with its card",
    force: bool = False,
) -> str:
    """Push a folder as the command does; returns the commit's address. `facts`: of the card's metadata.

    Raises `ValueError`, `OSError` or `RuntimeError`, in one line, with the remedy.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HFValidationError

    from hf_robustq.card import TAG

    files = check(folder)
    if get_token() is None:
        raise ValueError("no token to push with: `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    with tempfile.TemporaryDirectory() as place:
        files |= card_files(folder, Path(place), sweeps, facts or {})
        operations = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
        try:
            target = str(api.create_repo(repo, private=private or None, exist_ok=True).repo_id)
            there = api.model_info(target)
            strange = TAG not in (there.tags or ()) and any(s.rfilename == "config.json" for s in there.siblings or ())
            if not strange or force:
                done = api.create_commit(target, operations=operations, commit_message=message)
        except HFValidationError as error:
            raise ValueError(str(error)) from None
        except Exception as error:
            raise RuntimeError(_said(repo, error)) from error
    if strange and not force:
        raise ValueError(f"{target} holds a model that is not of this package: name another, or --force it")
    print(f"{len(operations)} files: {done.commit_url}")
    return str(done.commit_url)


def check(folder: Path) -> dict[str, Path]:
    """The files to push, by name. Raises `ValueError` for a folder that is no whole model with a card."""
    from hf_robustq.hub import check_folder

    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name the one that save_model or save_pretrained wrote")
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if not (folder / "config.json").is_file() and inner:
        raise ValueError(f"{folder} has no config.json, but {', '.join(inner)} in it do: publish one of these")
    check_folder(folder)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no weights (*.safetensors): save the model there")
    if not (folder / "README.md").is_file():
        raise ValueError(f"{folder} has no card: trainer.create_model_card() writes one")
    found = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(fnmatch(part, pattern) for part in parts for pattern in IGNORED):
            found["/".join(parts)] = path
    return found


def card_files(folder: Path, place: Path, sweeps: Sequence[Path], facts: dict[str, Any]) -> dict[str, Path]:
    """What is pushed instead of the folder's own card, written in `place`, by name.

    Without sweeps the card's text stays, and `facts` join its metadata; with them it is written anew, figures too.
    """
    import yaml
    from huggingface_hub import ModelCard

    from hf_robustq.card import TAG, rewrite_card
    from hf_robustq.files import written
    from hf_robustq.report import RUN_FILE, SWEEP_FILE
    from hf_robustq.sweep import load_measured, load_sweeps

    try:
        card = ModelCard.load(folder / "README.md")
    except yaml.YAMLError as error:
        raise ValueError(f"{folder / 'README.md'}: its metadata is no YAML: {' '.join(str(error).split())}") from None
    except Exception as error:  # of a card that the Hub's client cannot read
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder / 'README.md'} is damaged, or no card: {why}") from None
    tags = getattr(card.data, "tags", None) or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"{folder / 'README.md'}: tags must be a list of texts, got {str(tags)[:80]!r}")
    if not sweeps and not facts and TAG in tags:
        return {}
    facts = {**facts, "tags": [*dict.fromkeys((*tags, TAG, *facts.get("tags", ())))]}
    if not sweeps:
        for key, value in facts.items():
            setattr(card.data, key, value)
        with written(place / "README.md") as draft:
            card.save(draft)
        return {"README.md": place / "README.md"}
    if not (folder / RUN_FILE).is_file() or not (folder / SWEEP_FILE).is_file():
        raise ValueError(f"{folder} has no {RUN_FILE}, which a card with sweeps needs: train with RobustTrainer")
    measured = {}
    for path in sweeps:
        found = load_measured(path / "rows.json")
        own = [sweep for model, sweep in found.items() if Path(model).resolve() == folder.resolve()]
        if not own:
            raise ValueError(f"{path} measured {', '.join(found)}, not {folder}")
        if path.name in measured:
            raise ValueError(f"two sweeps are called {path.name}: rename the folder of one")
        measured[path.name] = own[0]
    shutil.copy(folder / RUN_FILE, place / RUN_FILE)
    rewrite_card(place, load_sweeps(folder / SWEEP_FILE), measured, **facts)
    return {path.name: path for path in place.iterdir()}


def _said(repo: str, error: BaseException) -> str:
    """What went wrong on the way to the Hub, in a line, without headers."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    if any(isinstance(one, OfflineModeIsEnabled) for one in causes):
        return f"HF_HUB_OFFLINE is set: unset it to push to {repo}"
    refused = next((one for one in causes if isinstance(one, HfHubHTTPError)), None)
    status = getattr(getattr(refused, "response", None), "status_code", None)
    if status == 401 and error is refused:  # by the Hub itself, not by where it keeps large files
        return f"the Hub does not know the token: `hf auth login` again, or set HF_TOKEN, to push to {repo}"
    if status in (403, 404) and error is refused:
        said = str(getattr(refused, "server_message", None) or "the Hub does not say why").splitlines()[0]
        return f"no write access to {repo} ({said}): name a repo of your own, or use a token that may write"
    if type(error) is ValueError:  # the client's own: the card's metadata, the message
        return f"{repo}: {' '.join(str(error).split())}"
    why = f"status {status}" if status else f"{type(causes[-1]).__name__}: {causes[-1]}".splitlines()[0]
    asked = str(getattr(getattr(error, "request", None), "url", ""))
    if (not status or status >= 500) and asked.endswith("/commit/main"):
        why += ") while it was committed, which may have succeeded (the repo's page shows it"
        return f"the push to {repo} broke ({why}); the same command may be repeated, and pushes nothing twice"
    return f"the push to {repo} broke ({why}); nothing was committed, and the same command may be repeated"
