"""One row a method: `test_methods.py` runs every property of its kind on each."""

from hf_robustq import KURE, Fixed

QUANTIZERS = {
    "fixed": Fixed,
}

REGULARIZERS = {
    "kure": lambda: KURE(),
    "kure at 3": lambda: KURE(target=3.0),
}
