"""What every config is checked for: known keys, types, a method's own options."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any


def check_known(keys: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise `ValueError` for the first key that is not known, naming the nearest one that is."""
    known = list(known)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"unknown {what} {key!r}: {hint}")


KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list of texts"}


def check_type(name: str, value: Any, default: Any) -> None:
    """Raise `ValueError` for a value of another type than the default's, where that says which."""
    kind = type(default)
    wrong = not isinstance(value, (int, float) if kind is float else kind) or (kind is not bool and value is True)
    if kind in KINDS and wrong:
        raise ValueError(f"{name} must be {KINDS[kind]}, got {value!r}")


def check_types(config: Any) -> None:
    """`check_type` of every field."""
    for one in fields(config):
        value = getattr(config, one.name)
        if one.name != "first_last":
            check_type(one.name, value, one.default)
        if type(one.default) is tuple and one.name != "regularizers" and not all(isinstance(x, str) for x in value):
            raise ValueError(f"{one.name} must be {KINDS[tuple]}, got {value!r}")


def option_names(method: type) -> list[str]:
    """The options a method's constructor takes, besides the grid it is given."""
    return [name for name in inspect.signature(method).parameters if name not in ("grid", "channels", "role")]


def check_options(name: str, method: type, options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for an option that a method does not take, or not of this type."""
    check_known(options, option_names(method), f"option of {name}")
    for key, value in options.items():
        check_type(f"{name}: {key}", value, inspect.signature(method).parameters[key].default)
