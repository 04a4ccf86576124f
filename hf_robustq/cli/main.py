"""`robustq COMMAND ...`."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from hf_robustq import __version__

COMMANDS = {
    "train": "run a recipe from its YAML file",
    "sweep": "measure saved models at any bit-width",
    "analyze": "sensitivity, distributions and sharpness of a saved model",
    "report": "runs as an interactive page",
    "publish": "push a run with its card to the Hub",
    "methods": "list every method with its paper",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. What a user got wrong ends it with one line and exit status 1; `--debug` shows where.

    Exit status 2: the command line itself could not be read; 130: interrupted; 141: nobody reads its output.
    """
    args = argparse.Namespace(debug=False)
    try:
        args = _parsed(list(sys.argv[1:] if argv is None else argv))
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        with suppress(BrokenPipeError):
            print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _closed():
            raise SystemExit(141) from None
        if args.debug:
            raise
        raise SystemExit(f"error: {_line(error)}") from None
    finally:
        _closed()


def _line(error: Exception) -> str:
    """The first line of an error; of one that is no user's, its kind and the way to its traceback."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, (ValueError, OSError, RuntimeError, ImportError, FloatingPointError)):
        return first[:600] or type(error).__name__
    return f"{type(error).__name__}: {first[:300]} (--debug shows where)"


def _closed() -> bool:
    """Whether nobody reads the output any more (`robustq methods | head -1`), which then goes nowhere."""
    found = False
    for stream in (sys.stdout, sys.stderr):
        if _broken(stream):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            found = True
    return found


def _broken(stream: Any) -> bool:
    try:
        stream.flush()
        watched = select.poll()
        watched.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in watched.poll(0))
    except BrokenPipeError:
        return True
    except (AttributeError, OSError, ValueError):  # Windows has no poll, and not every stream is a file
        return False


def _parsed(argv: list[str]) -> argparse.Namespace:
    """The arguments, with `run`, the command's."""
    parser = argparse.ArgumentParser(prog="robustq", description="Networks that survive quantization.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        if name == next((word for word in argv if not word.startswith("-")), None):
            _add(commands, name)
        else:
            commands.add_parser(name, help=text)
    try:
        args = parser.parse_args(argv)
    except SystemExit:
        sys.stdout.flush()  # the help
        raise
    from hf_robustq.recipe import no_bars_without_a_terminal  # slow to import: not before --help

    no_bars_without_a_terminal()
    return args


def _add(commands: Any, name: str) -> None:
    module = importlib.import_module(f"hf_robustq.cli.{name}")  # only the one that is asked for
    head, _, rest = str(module.__doc__).partition("\n")
    plain = argparse.RawDescriptionHelpFormatter
    about = {"help": COMMANDS[name], "description": head, "epilog": f"examples:\n{rest}"}
    command = commands.add_parser(name, formatter_class=plain, **about)
    module.add_arguments(command)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=module.run)
