"""One row a method: `test_methods.py` runs every property of its kind on each."""

from hf_robustq import KURE, LSQ, Fixed, NoiseTempered

QUANTIZERS = {
    "fixed": Fixed,
    "lsq": LSQ,
    "noise": NoiseTempered,
}

REGULARIZERS = {
    "kure": lambda: KURE(),
    "kure at 3": lambda: KURE(target=3.0),
}
