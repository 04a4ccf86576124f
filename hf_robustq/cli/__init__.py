"""The command line: `robustq train`, `sweep`, `analyze`, `report`, `publish`, `methods`."""

from hf_robustq.cli.main import main

__all__ = ["main"]
