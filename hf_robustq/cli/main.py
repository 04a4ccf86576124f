"""`robustq COMMAND ...`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hf_robustq import __version__
from hf_robustq.cli import analyze, methods, sweep


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. What a user got wrong ends it with one line and exit status 1; `--debug` shows where."""
    parser = argparse.ArgumentParser(prog="robustq", description="Networks that survive quantization.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (sweep, analyze, methods):
        command = module.add_parser(commands)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if args.debug:
            raise
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SystemExit(f"error: {first}") from None
