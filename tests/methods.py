"""One row a method: `test_methods.py` runs every property of its kind on each."""

import functools

import torch

from hf_robustq import KURE, LSQ, Absmax, Damping, DoReFa, Fixed, Grid, LSQPlus, NoiseTempered, SymReg, SymReg2, WaveQ

QUANTIZERS = {
    "absmax": Absmax,
    "fixed": Fixed,
    "dorefa": DoReFa,
    "dorefa rescaled": functools.partial(DoReFa, rescale=True),
    "lsq": LSQ,
    "lsq_plus": LSQPlus,
    "noise": NoiseTempered,
}


def damping():
    """With the quantizer of the same weight, at 3 bits and a step of 0.4."""
    stage, quantizer = Damping(), LSQ(Grid(bits=3))
    quantizer.scale.data.fill_(0.4)
    object.__setattr__(stage, "quantizer", quantizer)
    return stage


def waveq(method="absmax", beta=3.3, **options):
    """Bound to a quantizer, at a beta that need not be whole."""
    kind = {"absmax": Absmax, "dorefa": DoReFa}[method]
    quantizer = kind(Grid(bits=8, narrow=kind.narrow))
    stage = WaveQ(**options)
    stage.bind(quantizer)
    with torch.no_grad():
        stage.beta.fill_(beta)
        quantizer.follow(torch.tensor(beta))
    return stage


REGULARIZERS = {
    "damping": damping,
    "kure": lambda: KURE(),
    "kure at 3": lambda: KURE(target=3.0),
    "sym1": lambda: SymReg(),
    "sym2": lambda: SymReg2(),
    "waveq": waveq,
    "waveq on dorefa": functools.partial(waveq, "dorefa"),
}
