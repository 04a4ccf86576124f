"""A token that is written nowhere."""

from __future__ import annotations

from typing import Any


class Secret(str):
    """A string to those who send it; its repr hides it, and it pickles as None.

    The Trainer pickles its arguments, `hub_token` among them, into `training_args.bin`, and pushes that.
    """

    def __repr__(self) -> str:
        return "<hidden>"

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: Any) -> Secret:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
