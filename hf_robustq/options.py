"""Types and ranges of options: declared once, as the annotation beside each, and checked by one function."""

from __future__ import annotations

import difflib
import functools
import inspect
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec

P = ParamSpec("P")

LARGEST = 3e38
"""Of a number without a range of its own: what float32 holds."""

LONGEST = 80
"""Characters of a value in a message."""


class OptionError(ValueError):
    """One line: the path of a key, and what is wrong with it."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(key, text)
        self.key, self.text = key, text

    def __str__(self) -> str:
        between = "" if not self.key else " " if self.text.startswith(("is ", "must ")) else ": "
        return f"{self.key}{between}{self.text}"


@contextmanager
def under(key: str) -> Iterator[None]:
    """What goes wrong in here concerns what is under this key."""
    try:
        yield
    except OptionError as error:
        dot = "." if error.key and not error.key.startswith("[") else ""
        raise OptionError(f"{key}{dot}{error.key}", error.text) from None
    except ValueError as error:
        raise OptionError(key, " ".join(str(error).split())) from None


class _Short(reprlib.Repr):
    """`repr` that never looks at more of a value than it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, LONGEST, LONGEST

    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002
        return repr(x) if x.bit_length() < 200 else f"a whole number of {x.bit_length()} bits"

    def repr_instance(self, x: Any, level: int) -> str:  # noqa: ARG002
        return repr(x) if x is None or isinstance(x, bool | float) else f"a {type(x).__name__}"


_short = _Short()


def shown(value: Any) -> str:
    """A value in a message: on one line, of at most `LONGEST` characters, made from no more of it than is shown."""
    text = _short.repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


@dataclass(frozen=True)
class Range:
    """In `Annotated[float, Range(0, 10)]`: numbers from `low` to `high`; with `above`, `below` without that end."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if not (self.above or self.below):
            return f"from {self.low:.15g} to {self.high:.15g}"
        low, high = ("above" if self.above else "of at least"), ("below" if self.below else "at most")
        return f"{low} {self.low:.15g} and {high} {self.high:.15g}"


WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type: unions, literals, lists, mappings and ranges included."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        ranges = [one for one in inner[1:] if isinstance(one, Range)]
        return fits(value, inner[0]) and all(one.holds(value) for one in ranges)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is typing.Literal:
        scalar = isinstance(value, str | int | float) and not isinstance(value, bool)
        return scalar and value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(one, inner[0]) for one in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


def words(kind: Any) -> str:
    """An annotated type in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return " ".join([words(inner[0]), *(str(one) for one in inner[1:])])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(words(one) for one in inner)
    if origin is typing.Literal:
        *most, last = (repr(one) for one in inner)
        return f"{', '.join(most)} or {last}" if most else last
    if origin is tuple:
        return f"a list of {'texts' if inner[0] is str else 'mappings'}"
    return WORDS.get(kind, "a mapping")


def check(key: str, value: Any, kind: Any) -> None:
    """Raise `OptionError` for a value that is not of an annotated type, or out of its range.

    Of a mapping it names the key within.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, Mapping) and origin is Mapping:
        for name, one in value.items():
            if not fits(name, inner[0]):
                raise OptionError(key, f"key {shown(name)} must be {words(inner[0])}: put it in quotes")
            check(f"{key}[{shown(name)}]", one, inner[1])
    elif not fits(value, kind):
        raise OptionError(key, f"must be {words(kind)}, got {shown(value)}")


def check_fields(config: Any) -> None:
    """`check` of every field of a frozen dataclass, whose mappings become dicts of its own."""
    for name, kind in _kinds(type(config)).items():
        value = getattr(config, name)
        check(name, value, kind)
        if isinstance(value, Mapping):
            object.__setattr__(config, name, dict(value))


def check_known(keys: Iterable[Any], known: Iterable[str], what: str) -> None:
    """Raise `OptionError` for the first key that is not known, naming the nearest one that is."""
    known = list(known)
    for key in keys:
        if not isinstance(key, str):
            raise OptionError("", f"{what} {shown(key)} must be text: write one of {', '.join(known)}")
        if key not in known:
            near = difflib.get_close_matches(key[:LONGEST], known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise OptionError("", f"unknown {what} {shown(key)}: {hint}")


def check_mapping(key: str, value: Any, what: str = "options") -> Mapping[Any, Any]:
    """The value, where it is a mapping; else an `OptionError`."""
    if not isinstance(value, Mapping):
        raise OptionError(key, f"expected a mapping of {what}, got {shown(value)}")
    return value


NO_OPTIONS = ("self", "grid", "channels", "role", "model", "exclude", "epoch", "epochs")
"""Parameters of a method's constructor, or of a schedule, that are given it."""


def option_names(method: Callable[..., Any]) -> list[str]:
    """The options a method takes, besides what it is given."""
    return [name for name in inspect.signature(method).parameters if name not in NO_OPTIONS]


def check_options(name: str, method: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise `OptionError` for options that a class or function of this name does not take as they are.

    A method whose options depend on each other has a `check_together`.
    """
    check_known(options, option_names(method), f"option of {name}")
    kinds = _kinds(method.__init__ if isinstance(method, type) else method)
    for key, value in options.items():
        check(key, value, kinds[key])
    getattr(method, "check_together", lambda **_: None)(**options)


def checked(name: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorates the constructor of a method of this name: it raises what `check_options` does."""

    def decorate(init: Callable[P, None]) -> Callable[P, None]:
        signature = inspect.signature(init)

        @functools.wraps(init)
        def constructor(*args: P.args, **kwargs: P.kwargs) -> None:
            given = signature.bind(*args, **kwargs).arguments
            options = {key: value for key, value in given.items() if key not in NO_OPTIONS}
            with under(name):
                check_options(name, init, options)
                getattr(given["self"], "check_together", lambda **_: None)(**options)
            init(*args, **kwargs)

        return constructor

    return decorate


@functools.cache
def _kinds(of: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(of, include_extras=True)
    return {name: kind for name, kind in hints.items() if name != "return"}
