import json
import math
import time
from types import MappingProxyType

import pytest
import yaml

from hf_robustq import ASAM, EMA, KURE, DoReFa, Grid, NoiseTempered, RobustQ, RobustQConfig, SatNL, WaveQ
from hf_robustq.options import LONGEST, shown
from hf_robustq.trainer.optimizer import checked_schedule
from tests.mutants import SHARED, network

FULL = {
    "regularizers": {"kure": {"strength": 0.5, "target": 2.0, "schedule": "linear"}},
    "weights": {"bits": 4, "per_channel": True, "scale": "absmax"},
    "activations": {"bits": 8},
    "exclude": ["*.downsample.*"],
    "first_last": 8,
}


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_round_trip_through_dict_and_file(tmp_path, suffix):
    config = RobustQConfig.from_dict(FULL)
    assert config.regularizers[0].options == {"target": 2.0} and config.regularizers[0].strength == 0.5
    assert RobustQConfig.from_dict(config.to_dict()) == config
    path = tmp_path / f"config.{suffix}"
    path.write_text((yaml.safe_dump if suffix == "yaml" else json.dumps)(config.to_dict()))
    assert RobustQConfig.from_file(path) == config
    path.write_text((yaml.safe_dump if suffix == "yaml" else json.dumps)(FULL))
    assert RobustQConfig.from_file(path) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regularisers": {}}, "unknown config key 'regularisers': did you mean 'regularizers'"),
        ({"regularizers": {"kurre": {}}}, "unknown regularizer 'kurre': did you mean 'kure'"),
        ({"regularizers": {"kure": {"strenght": 1}}}, "unknown key of kure 'strenght': did you mean 'strength'"),
        ({"weights": {"bits": 4, "per_chanel": True}}, "did you mean 'per_channel'"),
        ({"weights": {"bits": 1}}, "from 2 to 16"),
        ({"weights": {"bits": 99}}, "from 2 to 16"),
        ({"weights": {"bits": 4, "method": "lsk"}}, "unknown quantizer 'lsk'"),
        ({"weights": {"bits": 4, "scale": "msee"}}, "unknown scale rule 'msee': did you mean 'mse'"),
        ({"weights": {"method": "fixed"}}, "weights.bits is missing"),
        ({"weights": 4}, "weights: expected a mapping"),
        ({"activations": {"bits": 8, "per_channel": True}}, "per tensor"),
        ({"first_last": 4}, "'float', 8 or 'same'"),
        ({"calibration_samples": 0}, "calibration_samples must be a whole number from 1 to"),
        ({"regularizers": {"kure": {"strength": -1}}}, "regularizers.kure.strength must be 0 or a number from"),
        ({"regularizers": [{"method": "kure"}, {"method": "kure"}]}, "listed twice"),
        ({"regularizers": {"kure": {"schedule": "linnear"}}}, "did you mean 'linear'"),
    ],
)
def test_errors_are_one_line_and_name_the_nearest(change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as caught:
        RobustQConfig.from_dict({**FULL, **change})
    assert "\n" not in str(caught.value)


def test_files_that_hold_no_config(tmp_path):
    (tmp_path / "a.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="expected a mapping"):
        RobustQConfig.from_file(tmp_path / "a.yaml")
    with pytest.raises(ValueError, match=r"\.yaml, \.yml or \.json"):
        RobustQConfig.from_file(tmp_path / "a.txt")


WAVEQ = {"weights": {"bits": 4, "method": "absmax"}, "regularizers": {"waveq": {}}}


@pytest.mark.parametrize(
    ("values", "start"),
    [
        ({"regularizers": {"kure": False}}, "regularizers.kure: expected a mapping of options, got False: write {}"),
        ({"regularizers": {"kure": None}}, "regularizers.kure: expected a mapping of options, got None: write {}"),
        ({"regularizers": {"kure": True}}, "regularizers.kure: expected"),
        ({"regularizers": {"kure": ["target"]}}, "regularizers.kure: expected a mapping of options, got ['target']"),
        ({"regularizers": {"kure": {"method": "sym1"}}}, "regularizers.kure.method must be 'kure' or left out"),
        (
            {"regularizers": {"kure": {"target": 2, "options": {"target": 3}}}},
            "regularizers.kure.target is there twice",
        ),
        ({"regularizers": {"kure": {"options": None}}}, "regularizers.kure.options: expected a mapping"),
        ({"regularizers": None}, "regularizers: expected a mapping of names"),
        ({"regularizers": "kure"}, "regularizers: expected a mapping of names"),
        ({"regularizers": ["kure"]}, "regularizers[0]: expected a mapping"),
        ({"regularizers": [{"strength": 1}]}, "regularizers[0].method: regularizer None must be text"),
        ({"weights": ["bits"]}, "weights: expected a mapping of options, got ['bits']"),
        ({"weights": {"bits": 4, "mixed": [3]}}, "weights.mixed must be a mapping, got [3]"),
        ({"weights": {"bits": 4, "mixed": {"a": True}}}, "weights.mixed['a'] must be a whole number from 2 to 16"),
        ({"weights": {"bits": 4, "mixed": {1: 3}}}, "weights.mixed: key 1 must be text: put it in quotes"),
        ({"weights": {"bits": 4, "narrow": "no"}}, "weights.narrow must be true or false or null, got 'no'"),
        ({"weights": {"bits": 4, "scale": True}}, "weights.scale must be text or null, got True"),
        ({"weights": {"bits": 4, "scael": "mse"}}, "weights: unknown key of fixed 'scael': did you mean 'scale'?"),
        (
            {"weights": {"bits": 10**400}},
            "weights.bits must be a whole number from 2 to 16, got a whole number of 1329",
        ),
        ({"satnl": {"d": True}}, "satnl.d must be a number from"),
        ({"satnl": [1]}, "satnl: expected a mapping"),
        ({"budget": [4]}, "budget must be a mapping or null, got [4]"),
        ({"include": {"*": 1}}, "include must be a list of texts"),
        ({"exclude": [1]}, "exclude must be a list of texts, got (1,)"),
        ({"seed": 10**400}, "seed must be a whole number from"),
        ({"seed": None}, "seed must be a whole number"),
        ({"first_last": True}, "first_last must be 'float', 8 or 'same', got True"),
        ({1: 2}, "config key 1 must be text"),
        ({None: 2}, "config key None must be text"),
        ({True: 2}, "config key True must be text"),
        ([], "expected a mapping of config keys, got []"),
        (None, "expected a mapping of config keys, got None"),
        ({"weights": {"bits": 4, "method": "absmax", "narrow": False}}, "weights.narrow: the grid of absmax is symm"),
    ],
)
def test_what_a_config_cannot_mean_is_refused_by_the_path_of_its_key(values, start):
    with pytest.raises(ValueError) as caught:
        RobustQConfig.from_dict(values)
    assert str(caught.value).startswith(start) and "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 1e308, 10**400, True, "1", None, [1.0]], ids=repr)
@pytest.mark.parametrize(
    ("path", "values"),
    [
        (("regularizers", "kure", "strength"), {}),
        (("regularizers", "kure", "target"), {}),
        (("regularizers", "kure", "every"), {}),
        *((("regularizers", "waveq", key), WAVEQ) for key in ("beta_strength", "rise", "fall", "smoothness", "snap")),
        *((("budget", key), WAVEQ) for key in ("bits", "megabytes", "bit_operations")),
        *((("weights", key), {"weights": {"bits": 4, "method": "noise"}}) for key in ("c", "k")),
        (("weights", "clip"), {"weights": {"bits": 4, "method": "dorefa"}}),
        (("freeze_above",), {}),
        (("calibration_samples",), {}),
    ],
)
def test_numbers_that_no_training_survives_are_refused(path, values, number):
    values = json.loads(json.dumps(values))
    inner = values
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    inner[path[-1]] = number
    with pytest.raises(ValueError) as caught:
        RobustQConfig.from_dict(values)
    assert str(caught.value).startswith(".".join(path)) and len(str(caught.value)) < 250


@pytest.mark.parametrize("number", [math.inf, math.nan, -1.0, 1e308, True, "1"], ids=repr)
def test_constructors_and_learning_rates_are_checked_alike(number):
    grid = Grid(bits=4)
    for key, create in (
        ("kure.target", lambda: KURE(target=number)),
        ("waveq.snap", lambda: WaveQ(snap=number)),
        ("noise.k", lambda: NoiseTempered(grid, k=number)),
        ("dorefa.clip", lambda: DoReFa(grid, clip=number)),
        ("satnl.d", lambda: SatNL(d=number)),
        ("asam.rho", lambda: ASAM(network(), rho=number)),
        ("ema.decay", lambda: EMA(network(), decay=number)),
        ("scale_lr", lambda: RobustQ(network(), {}).parameter_groups(0.0, scale_lr=number)),
        ("bits_lr", lambda: RobustQ(network(), {}).parameter_groups(0.0, bits_lr=number)),
        ("lr_schedule.every", lambda: checked_schedule({"name": "step", "every": number})),
        ("lr_schedule.rate", lambda: checked_schedule({"name": "exponential", "rate": number})),
    ):
        with pytest.raises(ValueError) as caught:
            create()
        assert str(caught.value).startswith(f"{key} must be a number ")


def test_values_are_shown_without_being_made_whole():
    for value in (SHARED, {"a": SHARED}, "x" * 10**6, 10**10**5, [[[[[[1]]]]]] * 10**6, "two\nlines", object()):
        began = time.process_time()
        text = shown(value)
        assert len(text) <= LONGEST and "\n" not in text and time.process_time() - began < 1


def test_a_config_keeps_mappings_of_its_own():
    mixed = {"*": 3}
    config = RobustQConfig.from_dict({"weights": MappingProxyType({"bits": 4, "mixed": mixed})})
    mixed["*"] = "nonsense"
    assert config.to_dict()["weights"]["mixed"] == {"*": 3}


def written(folder, name, content):
    path = folder / name
    (path.write_text if isinstance(content, str) else path.write_bytes)(content)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"regularizers": {"kure": {"strength": 1e-5}}}'),
        ("a.yaml", "regularizers: {kure: {strength: 1e-5}}"),
        ("a.yaml", "regularizers: {kure: {strength: 1E-5}}"),
        ("a.yaml", "regularizers: {kure: {strength: .01e-3}}"),
        ("a.yaml", "regularizers:\n  kure:\n    strength: 1.0e-5\n"),
        ("a.yaml", "\ufeffregularizers: {kure: {strength: 1e-5}}"),
    ],
)
def test_numbers_in_files_are_numbers(tmp_path, name, text):
    config = RobustQConfig.from_file(written(tmp_path, name, text))
    assert config.regularizers[0].strength == 1e-5


def test_a_written_config_is_read_again(tmp_path):
    config = RobustQConfig.from_dict({"regularizers": {"kure": {"strength": 1e-5, "target": 3}}})
    for name, text in (("a.json", json.dumps(config.to_dict())), ("a.yaml", yaml.safe_dump(config.to_dict()))):
        assert RobustQConfig.from_file(written(tmp_path, name, text)) == config


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "seed: 1\nseed: 2\n", "is no YAML: key 'seed' is there twice: remove one, in line 2"),
        ("a.yaml", "weights:\n  bits: 4\n  bits: 5\n", "key 'bits' is there twice: remove one, in line 3"),
        ("a.json", '{"seed": 1, "seed": 2}', "is no JSON: key 'seed' is there twice"),
        ("a.json", '{"seed": 1,}', "is no JSON: .*, in line 1"),
        ("a.json", "", "is no JSON: .*, in line 1"),
        ("a.yaml", "seed: 1\nweights: {bits: 4\n", "is no YAML: while parsing a flow mapping, .*, in line 3"),
        ("a.yaml", "seed: !!python/object:os.system x", "is no YAML: could not determine a constructor"),
        ("a.yaml", "seed: !!int x", "is no YAML: "),
        ("a.yaml", "seed: !!bool x", "is no YAML: "),
        ("a.yaml", "seed: 2026-13-45", "is no YAML: "),
        ("a.yaml", "seed: 1\n---\nseed: 2", "is no YAML: "),
        ("a.yaml", "seed: \x01", "is no YAML: "),
        ("a.yaml", LAUGHS, "is no YAML: its aliases stand for more than 100000 values"),
        ("a.yaml", "weights: &a {bits: *a}", "is no YAML: an alias stands for what it is in"),
        ("a.yaml", "[" * 5000, "is no YAML: it is nested too deeply"),
        ("a.json", "[" * 100_000, "is no JSON: it is nested too deeply"),
        ("a.json", '{"seed": ' + "1" * 5000 + "}", "is no JSON: "),
        ("a.yaml", "", "it holds none"),
        ("a.yaml", "# nothing", "it holds none"),
        ("a.yaml", "text", "holds no keys"),
        ("a.json", "[1]", "holds no keys"),
        ("a.yaml", b"seed: \xff", "is not UTF-8, at byte 6"),
        ("a.yaml", "1: 2", ": config key 1 must be text"),
        ("a.yaml", "null: 2", ": config key None must be text"),
        ("a.yaml", "on: 2", ": config key True must be text"),
        ("a.yaml", "regularizers: {kure: {strength: .inf}}", r": regularizers\.kure\.strength must be"),
        ("a.json", '{"regularizers": {"kure": {"strength": NaN}}}', r": regularizers\.kure\.strength must be"),
    ],
)
def test_broken_files_are_one_line_with_their_name(tmp_path, name, content, message):
    path = written(tmp_path, name, content)
    with pytest.raises(ValueError, match=message) as caught:
        RobustQConfig.from_file(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    for path, message in ((tmp_path / "folder.yaml", "is a folder"), (tmp_path / "none.json", "is not there")):
        with pytest.raises(ValueError, match=message):
            RobustQConfig.from_file(path)


def test_yaml_may_repeat_itself(tmp_path):
    text = "weights: &q {bits: 4, method: lsq}\nactivations:\n  <<: *q\n  bits: 8\n"
    config = RobustQConfig.from_file(written(tmp_path, "a.yaml", text))
    assert config.activations is not None and (config.activations.bits, config.activations.method) == (8, "lsq")
