"""The model card: how the model does at each bit-width, and exactly how it came about. Takes data, not models."""

from hf_robustq.card.facts import command_line, training_settings
from hf_robustq.card.tables import escaped, sweep_table, table, table_by_method
from hf_robustq.card.write import TAG, rewrite_card, write_card

__all__ = [
    "TAG",
    "command_line",
    "escaped",
    "rewrite_card",
    "sweep_table",
    "table",
    "table_by_method",
    "training_settings",
    "write_card",
]
