"""One row a method: `test_methods.py` runs every property of its kind on each."""

import functools

from hf_robustq import KURE, LSQ, DoReFa, Fixed, LSQPlus, NoiseTempered

QUANTIZERS = {
    "fixed": Fixed,
    "dorefa": DoReFa,
    "dorefa rescaled": functools.partial(DoReFa, rescale=True),
    "lsq": LSQ,
    "lsq_plus": LSQPlus,
    "noise": NoiseTempered,
}

REGULARIZERS = {
    "kure": lambda: KURE(),
    "kure at 3": lambda: KURE(target=3.0),
}
