"""`robustq COMMAND ...`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
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

    Exit status 2: the command line itself could not be read; 130: interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="robustq", description="Networks that survive quantization.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        if name == next((word for word in argv if not word.startswith("-")), None):
            _add(commands, name)
        else:
            commands.add_parser(name, help=text)
    args = parser.parse_args(argv)
    from hf_robustq.recipe import no_bars_without_a_terminal  # slow to import: not before --help

    no_bars_without_a_terminal()
    try:
        args.run(args)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError) as error:
        if args.debug:
            raise
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SystemExit(f"error: {first}") from None


def _add(commands: Any, name: str) -> None:
    module = importlib.import_module(f"hf_robustq.cli.{name}")  # only the one that is asked for
    head, _, rest = str(module.__doc__).partition("\n")
    plain = argparse.RawDescriptionHelpFormatter
    about = {"help": COMMANDS[name], "description": head, "epilog": f"examples:\n{rest}"}
    command = commands.add_parser(name, formatter_class=plain, **about)
    module.add_arguments(command)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=module.run)
