"""What a JSON file must hold: a shape that reads like the file.

    check({"name": "a", "sizes": [1, 2]}, {"name": str, "sizes": [int, ...], "note?": (str, None)}, "")

float, int, str, bool, None, dict         a value of this kind (an int is a float too, a bool is neither)
{"key": shape, "key?": shape}             a mapping with this key; `?`: which may lack it. Other keys are free
{str: shape}                              a mapping with any keys
[shape], [shape, ...]                     a list; `...`: of at least one
(shape, shape)                            one or the other
"""

from __future__ import annotations

from typing import Any

KINDS = {float: "a number", int: "a whole number", str: "text", bool: "true or false", dict: "a mapping"}
LARGEST = 2**63


def check(value: Any, shape: Any, where: str = "") -> None:
    """Raise `ValueError`, with the place inside, for what has another shape."""
    if isinstance(shape, tuple):
        _check_any(value, shape, where)
    elif isinstance(shape, list):
        if not isinstance(value, list) or (len(shape) > 1 and not value):
            raise _wrong(value, "a list that is not empty" if len(shape) > 1 else "a list", where)
        for index, one in enumerate(value):
            check(one, shape[0], f"{where}/{index}")
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            raise _wrong(value, "a mapping", where)
        for key, inner in shape.items():
            if key is str:
                for name, one in value.items():
                    check(one, inner, f"{where}/{name[:80]}")
            elif (name := key.removesuffix("?")) in value:
                check(value[name], inner, f"{where}/{name}")
            elif name == key:
                raise ValueError(f"{where}/{key} is missing")
    elif not _is(value, shape):
        raise _wrong(value, "nothing" if shape is None else KINDS[shape], where)


def _is(value: Any, kind: Any) -> bool:
    if kind is None or value is None:
        return value is kind
    if isinstance(value, int) and not isinstance(value, bool):
        return kind in (int, float) and -LARGEST <= value < LARGEST
    return type(value) is kind


def _check_any(value: Any, shapes: tuple[Any, ...], where: str) -> None:
    found = None
    for shape in shapes:
        try:
            return check(value, shape, where)
        except ValueError as error:
            found = found or error
    assert found is not None
    raise found


def _wrong(value: Any, what: str, where: str) -> ValueError:
    return ValueError(f"{where or 'it'} must be {what}, got {str(value)[:80]!r}")
