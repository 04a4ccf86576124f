"""The model card: how the model does at each bit-width, and exactly how it came about. Takes data, not models."""

from hf_robustq.card.facts import command_line, training_settings
from hf_robustq.card.tables import escaped, table, table_by_method
from hf_robustq.card.write import rewrite_card, write_card

__all__ = [
    "command_line",
    "escaped",
    "rewrite_card",
    "table",
    "table_by_method",
    "training_settings",
    "write_card",
]
