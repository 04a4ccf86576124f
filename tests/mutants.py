"""Mutated configs, drawn by a seed, and what becomes of each."""

import copy
import datetime
import math
import random
import re
import warnings
from dataclasses import fields

import torch
from torch import nn

from hf_robustq import RobustQ, RobustQConfig

VALID = [
    {},
    {"regularizers": {"kure": {"strength": 0.5, "target": 2.0, "schedule": "linear", "every": 2}}},
    {"regularizers": [{"method": "sym1", "relative": True}, {"method": "sym2", "options": {"depthwise": True}}]},
    {"weights": {"bits": 4, "method": "lsq", "per_channel": True, "scale": "mse"}, "activations": {"bits": 8}},
    {
        "weights": {"bits": 4, "method": "noise", "c": 0.2, "k": 50.0, "k_relative": True, "schedule": "cosine"},
        "activations": {"bits": 8, "method": "lsq_plus"},
        "weights_only": ["*"],
    },
    {
        "weights": {"bits": 4, "method": "dorefa", "options": {"rescale": True}, "mixed": {"2.*": 3, "*": 5}},
        "activations": {"bits": 4, "method": "dorefa", "clip": 2.0},
        "regularizers": {
            "waveq": {"learn": True, "variant": 1, "beta_strength": 0.1, "rise": 0.1, "fall": 0.9, "smoothness": 0.1}
        },
        "budget": {"bits": 3.5},
    },
    {
        "weights": {"bits": 5, "method": "absmax"},
        "regularizers": {"waveq": {"learn": False, "snap": 10.0, "rise": 1, "fall": 5}, "kure": {}},
        "first_last": 8,
    },
    {
        "weights": {"bits": 3, "method": "lsq", "narrow": True},
        "oscillations": "freeze",
        "freeze_above": 0.02,
        "regularizers": {"damping": {"strength": 0.1, "schedule": "cosine"}},
        "memory": "recompute",
    },
    {"satnl": {"function": "softsign", "d": 2.0, "invert": True}, "weights": {"bits": 4}, "seed": 3},
    {"satnl": {"d": None}, "include": ["*.weight"], "exclude": ["4.*"], "first_last": "same", "calibration_samples": 8},
    {"embeddings": True, "routers": False, "parameters": [], "oscillations": "watch", "weights": {"bits": 2}},
    {
        "weights": {"bits": 6, "method": "absmax"},
        "regularizers": {"waveq": {}},
        "budget": {"bit_operations": 1e5},
        "activations": {"bits": 8, "scale": "percentile", "mixed": {"*": 6}},
    },
]
"""Between them, every key of a config."""

SHARED: list = ["lol"]
for _ in range(40):
    SHARED = [SHARED] * 9

ODD = [
    None, True, False, 0, 1, 2, 3, 8, -1, 16, 17, 0.5, 2.5, 8.0, 1e-5, 1e-30, 1e-40, 5e-324, 1e5, 1e9, 1e30, 1e308,
    -1e308, 2**31, 2**63, 10**400, -(10**400), 10**5000, math.inf, -math.inf, math.nan, "", "4", "1e-5", "lsq", "kure",
    "*", "true", "x" * 100_000, "two\nlines", [], {}, [1], ["*"], [None], {"a": 1}, {1: 2}, {None: {}}, {"kure": {}},
    {"bits": 4}, {"*": 4}, b"x", 2j, object(), datetime.date(2026, 1, 1), (), {1}, SHARED, {"a": SHARED},
    torch.tensor(3.0),
]  # fmt: skip

KEYS = [
    "",
    "x",
    "bit",
    "strenght",
    "options",
    "method",
    "weights",
    "two\nlines",
    "y" * 1000,
    1,
    None,
    True,
    1.5,
    (1, 2),
]

NAMES = "|".join(one.name for one in fields(RobustQConfig))
PATH = re.compile(rf"({NAMES})\b|unknown config key|config key|expected a mapping of config keys")
"""What a refusal of the config itself begins with."""


def places(value, path=()):
    """Every (path, value) of a config, itself included, down to where valid ones end."""
    yield path, value
    if len(path) == 4:
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from places(one, (*path, key))


def mutated(seed):
    """A mixture of valid configs with up to three changes, about a third of them harmless; and what was changed."""
    draw = random.Random(seed)
    config, what = copy.deepcopy(draw.choice(VALID)), []
    for other in draw.sample(VALID, draw.choice([0, 0, 1])):
        config |= copy.deepcopy(other)
    mild = draw.random() < 0.55
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        path, value = draw.choice([*places(config)][1:] or [((), config)])
        change = draw.choice(
            ["scale", "scale", "drop", "other"] if mild else ["replace", "replace", "add", "rename", "list"]
        )
        new = value
        if isinstance(value, bool):
            new = not value
        elif change == "scale" and isinstance(value, int):
            new = value + draw.choice([-3, -1, 1, 3, 1000])
        elif change == "scale" and isinstance(value, float):
            new = value * draw.choice([-1, 0, 1e-6, 1e-3, 0.5, 2, 10, 1e3, 1e6])
        elif change in ("add", "rename", "drop") and isinstance(value, dict):
            old = draw.choice([*value, ""])
            new = {key: one for key, one in value.items() if key != old}
            if change != "drop":
                key = draw.choice([*KEYS, f"{old}s"])
                new = {**value, key: draw.choice(ODD)} if change == "add" else {**new, key: value.get(old)}
        elif change == "list":
            new = [value]
        elif mild:  # what a valid config has in a place of this name
            names = [one for valid in VALID for other, one in places(valid) if other[-1:] == path[-1:]]
            new = copy.deepcopy(draw.choice(names or [value]))
        else:
            new = draw.choice(ODD)
        config = put(config, path, new)
        what.append((change, path))
    return config, what


def put(config, path, new):
    """The config with another value at a path."""
    if not path:
        return new
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return config


def network():
    """Two convolutions and two layers, enough for edges and what lies between; the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.ReLU(),
            nn.Conv2d(3, 4, 2),
            nn.Flatten(),
            nn.Linear(16, 4),
            nn.GELU(),
            nn.Linear(4, 3),
        )


def train(plugin, steps=2):
    """Calibrate, and take optimizer steps; returns the name of the first thing that is not finite."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        x, y = torch.randn(4, 2, 5, 5), torch.tensor([0, 1, 2, 0])
    plugin.calibrate([x], forward=lambda model, batch: model(batch))
    optimizer = torch.optim.Adam(plugin.parameter_groups(0.01), lr=1e-3)
    for i in range(steps):
        plugin.step((i + 1) / (steps + 1), first=True)
        loss = nn.functional.cross_entropy(plugin.model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not math.isfinite(loss):
            return "loss"
    plugin.after_optimizer_step()
    names = [*plugin.model.named_parameters(), *plugin.model.named_buffers()]
    found = [name for name, tensor in names if not torch.isfinite(tensor).all()]
    metrics = [name for name, value in plugin.metrics().items() if not math.isfinite(value)]
    return next(iter([*found, *metrics]), None)


def outcome(config, trained=True):
    """(what became of a config, in a word; the message or exception): "trains", "accepted", "refused", or a fault."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            known = RobustQConfig.from_dict(config)
            if RobustQConfig.from_dict(known.to_dict()) != known:
                return "changed by a round trip", None
            stage = "model"
            plugin = RobustQ(network(), known)
            if not trained:
                return "accepted", None
            broken = train(plugin)
            return ("trains", None) if broken is None else ("not finite", broken)
    except ValueError as error:
        message = str(error)
        stage = "model" if "known" in locals() else "config"
        if "\n" in message or len(message) > 500:
            return "no single line", message[:300]
        named = PATH.match(message) if stage == "config" else re.search(rf"\b({NAMES})\b", message)
        return ("refused" if named else "names no key"), message
    except Exception as error:
        return "bare exception", f"{type(error).__name__}: {str(error)[:300]}"
