import json

import pytest
import yaml

from hf_robustq import RobustQConfig

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
        ({"weights": {"method": "fixed"}}, "weights: bits is missing"),
        ({"weights": 4}, "weights: expected a mapping"),
        ({"activations": {"bits": 8, "per_channel": True}}, "per tensor"),
        ({"first_last": 4}, "'float', 8 or 'same'"),
        ({"calibration_samples": 0}, "at least 1"),
        ({"regularizers": {"kure": {"strength": -1}}}, "0 or more"),
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
