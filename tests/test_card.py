import dataclasses
import sys

import pytest
from huggingface_hub import ModelCard

from hf_robustq import RobustQConfig, Row, Sweep
from hf_robustq.card import plot, table, title, write_card
from tests.test_sweep import rows


@pytest.fixture
def sweeps():
    first = Sweep(rows=rows(fp=0.9, w4=0.7, w2=0.1, w4a4=0.6), epoch=1.0, step=5, context={"calibration_samples": 64})
    last = Sweep(rows=rows(fp=0.91, w4=0.8, w2=0.2, w4a4=0.7), epoch=2.0, step=10, context={"calibration_samples": 64})
    return [first, last]


def test_table_has_a_column_for_each_setting_and_a_row_for_each_sweep(sweeps):
    lines = table({"without": sweeps[0], "with": sweeps[1]}, "accuracy").splitlines()
    assert lines[0] == "|  | FP | W4 | W2 | W4/A4 |"
    assert lines[2] == "| without | 90.00 | 70.00 | 10.00 | 60.00 |"
    assert lines[3] == "| with | 91.00 | 80.00 | 20.00 | 70.00 |"


def test_titles():
    assert [title(s) for s in ("fp", "trained", "w4", "w4a8", "w3@mse/channel")] == [
        "FP", "trained", "W4", "W4/A8", "W3 mse/channel",
    ]  # fmt: skip


def test_card_holds_the_last_sweep_the_curve_the_config_the_seed_and_the_versions(tmp_path, sweeps):
    config = RobustQConfig.from_dict({"regularizers": {"kure": {"target": 1.9}}})
    path = write_card(tmp_path, config.to_dict(), sweeps, "accuracy", seed=17, base_model="a/b", settings={"epochs": 2})
    text = path.read_text()
    assert "| eval | 91.00 | 80.00 | 20.00 | 70.00 |" in text and "| eval, epoch 1 | 90.00 |" in text
    assert "target: 1.9" in text and "- seed: 17" in text and "- epochs: 2" in text and "- torch: " in text
    assert "64 training samples" in text and "Not measured" in text
    assert (tmp_path / "robustq_curve.png").read_bytes().startswith(b"\x89PNG")
    data = ModelCard.load(path).data
    assert data.base_model == "a/b" and "robustq" in data.tags


def test_card_is_about_the_step_in_the_folder_and_every_evaluation_set(tmp_path, sweeps):
    def renamed(sweep, name):
        return dataclasses.replace(sweep, rows=[dataclasses.replace(row, dataset=name) for row in sweep.rows])

    both = [renamed(sweep, name) for sweep in sweeps for name in ("a", "b")]
    text = write_card(tmp_path, {}, both, "accuracy", seed=0, step=5).read_text()
    before, history = text.split("## During training")
    assert "| a | 90.00 |" in before and "| b | 90.00 |" in before and "91.00" not in before
    assert history.count("epoch 1") == history.count("epoch 2") == 2


def test_a_loss_is_not_a_percentage(tmp_path):
    losses = Sweep(rows=[dataclasses.replace(row, metrics={"loss": 3.5}) for row in rows(fp=0.0, w4=0.0)], step=1)
    text = write_card(tmp_path, {}, [losses], "loss", seed=0).read_text()
    assert "| eval | 3.50 | 3.50 |" in text and "%" not in text.split("## How")[0]


def test_without_matplotlib_there_is_a_card_and_no_plot(tmp_path, sweeps, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = write_card(tmp_path, {}, sweeps, "accuracy", seed=0).read_text()
    assert "png" not in text and "hf_robustq[report]" in caplog.text


def test_plot_without_a_float_row(tmp_path, sweeps):
    only = Sweep(rows=[row for row in sweeps[0].rows if row.setting != "fp"])
    plot({"one": only}, "accuracy", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_the_plot_has_a_line_for_each_kind_of_setting_and_a_star_where_it_was_trained(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *_, **__: drawn.append(self.axes[0]))
    trained = Row(setting="trained", weights=4, activations=4, metrics={"accuracy": 0.75}, samples=1)
    measured = {"fp": 0.9, "w8a4@learned": 0.7, "w3a4@learned": 0.4, "w8a4": 0.6, "w3a4": 0.3}
    plot({"net": Sweep(rows=[trained, *rows(**measured)])}, "accuracy", tmp_path / "plot.png")
    lines = {line.get_label(): line for line in drawn[0].lines}
    assert list(lines) == ["net, A4 learned", "net, A4", "net, trained", "net, float"]
    assert lines["net, A4 learned"].get_xydata().tolist() == [[3, 0.4], [8, 0.7]]
    assert lines["net, trained"].get_marker() == "*" and lines["net, trained"].get_xydata().tolist() == [[4, 0.75]]
    assert list(drawn[0].get_xticks()) == [3, 4, 8]
