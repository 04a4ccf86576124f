"""The command line: `robustq sweep`, `robustq analyze`, `robustq methods`."""

from hf_robustq.cli.main import main

__all__ = ["main"]
