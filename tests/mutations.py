"""Damaged JSON, drawn by seed, and what a subcommand makes of it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_robustq.cli import main

VALUES = (
    *(None, True, 7, -1, 0, 0.5, float("nan"), float("inf"), 1e308, 10**30, 10**400, "text", "", "\ud800", "w4"),
    *([], {}, [[]], {"a": 1}, [None], "x" * 5000),
)
RAW: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    lambda text, draw: text[: draw.randrange(len(text))],
    lambda text, draw: text[: (at := draw.randrange(len(text)))] + bytes(draw.choices(range(256), k=4)) + text[at:],
    lambda text, draw: b"",
    lambda text, draw: b"[" * 100_000,
    lambda text, draw: b'{"a":' * 400 + b"1" + b"}" * 400,
    lambda text, draw: b"[" * 400 + b"]" * 400,
    lambda text, draw: b"\xff\xfe" + text,
    lambda text, draw: text.replace(b": ", b": 1e999, ", 1),
    lambda text, draw: b"9" * 5000,
    lambda text, draw: json.dumps(draw.choice(VALUES[:-1])).encode(),
)


def places(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all that is inside."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [one for key, value in inner for one in ((*path, key), *places(value, (*path, key)))]


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def mutated(text: bytes, draw: random.Random) -> bytes:
    """One change: of the text, or of a value somewhere inside."""
    if draw.random() < 0.25:
        return draw.choice(RAW)(text, draw)
    try:
        values = json.loads(text)
    except ValueError:  # Markdown, YAML
        return draw.choice(RAW)(text, draw)
    paths = places(values)
    if not paths:
        return b"{"
    # every depth alike: most values are numbers in long lists
    depth = draw.choice(sorted({len(path) for path in paths}))
    *way, key = draw.choice([path for path in paths if len(path) == depth])
    inside = values
    for one in way:
        inside = inside[one]
    kind = draw.random()
    if kind < 0.25:
        del inside[key]
    elif kind < 0.3 and isinstance(inside, dict):
        inside[draw.choice(("other", "", "model", "loss"))] = inside.pop(key)
    elif kind < 0.35:
        inside[key] = nested(300)
    elif kind < 0.4:
        inside[key] = [copy.deepcopy(inside[key])] * 2
    else:
        inside[key] = copy.deepcopy(draw.choice(VALUES))
    return json.dumps(values, indent=draw.choice((None, 1))).encode()


def outcome(argv: list[str], named: Sequence[str] = ("",)) -> str:
    """ "works", "one line", or what is wrong with how the command ended."""
    try:
        main(argv)
    except SystemExit as error:
        said = str(error.code)
        if error.code in (0, None):
            return "works"
        if not said.startswith("error: ") or "\n" in said or "--debug" in said:
            return f"no line of ours: {said[:300]}"
        if not any(name in said for name in named):
            return f"does not name {named[0]}: {said[:300]}"
        return "one line" if len(said) < 700 else f"too long: {said[:300]}"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"[:300]
    return "works"


def damage(file: Path, argv: list[str], draw: random.Random) -> str:
    """Damage a file, run a command, and put the file back; returns the outcome."""
    before = file.read_bytes()
    try:
        if draw.random() < 0.02:
            file.unlink()
            file.mkdir()
        else:
            file.write_bytes(mutated(before, draw))
        named = (
            ("",)
            if file.suffix == ".yaml"
            else (file.name, f"{file.parent} ", f"{file.parent},", f"{file.parent.name} has")
        )  # a wrong flag is named itself
        return outcome(argv, named)
    finally:
        if file.is_dir():
            file.rmdir()
        file.write_bytes(before)
