import dataclasses
import re
import sys

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_robustq import RobustQConfig, Sweep
from hf_robustq.card import command_line, escaped, rewrite_card, table, table_by_method, write_card
from hf_robustq.report.charts import title
from hf_robustq.size import LayerSize, Size
from hf_robustq.sweep import load_sweeps, save_sweeps
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
    assert [title(s) for s in ("fp", "trained", "w4", "w4a8", "a8@mse/asym", "w3@mse/channel")] == [
        "FP", "trained", "W4", "W4/A8", "A8 mse/asym", "W3 mse/channel",
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


def test_a_table_by_method_has_a_row_for_each_way_and_a_column_for_each_width():
    measured = {"fp": 0.9, "w4": 0.7, "w4a8": 0.6, "w4@aciq": 0.65, "w3@aciq": 0.5, "w4@mse/bc/x0.9": 0.4}
    lines = table_by_method({"net": Sweep(rows=rows(**measured))}, "accuracy").splitlines()
    assert lines[0] == "|  | FP | W4 | W4/A8 | W3 |"
    assert lines[2:] == [
        "| net | 90.00 | 70.00 | 60.00 |  |",
        "| net, aciq |  | 65.00 |  | 50.00 |",
        "| net, mse/bc/x0.9 |  | 40.00 |  |  |",
    ]


def test_every_figure_of_the_card_is_a_row_of_the_sweep(tmp_path, sweeps):
    """The tables are read back from the Markdown and the index from its metadata, and compared with the rows."""
    path = write_card(tmp_path, {}, sweeps, "accuracy", seed=0, task="image-classification", dataset="pictures")
    card = ModelCard.load(path)
    found = {
        result.metric_args["setting"]: result.metric_value
        for result in card.data.eval_results
        if result.metric_type == "accuracy"
    }
    assert found == {row.setting: row.metrics["accuracy"] for row in sweeps[-1].rows}
    assert {result.task_type for result in card.data.eval_results} == {"image-classification"}
    tables = [block.splitlines() for block in card.text.split("\n\n") if block.startswith("|")]
    shown = {}
    for head, _, *lines in tables:
        columns = [cell.strip() for cell in head.strip("|").split("|")][1:]
        for line in lines:
            label, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            shown |= {(label, column): cell for column, cell in zip(columns, cells, strict=True)}
    expected = {}
    for sweep in sweeps:
        for row in sweep.rows:
            value = f"{100 * row.metrics['accuracy']:.2f}"
            expected["eval, epoch 1" if sweep is sweeps[0] else "eval, epoch 2", title(row.setting)] = value
            if sweep is sweeps[-1]:
                expected["eval", title(row.setting)] = value
    assert shown == expected


HOSTILE = "<img src=x onerror=alert(1)>|[a](javascript:alert(1))`*\n---\n# no"


def test_hostile_names_are_shown_as_they_are(tmp_path, sweeps):
    """Rendered by an independent Markdown reader, no tag, link, heading or cell comes of them."""
    markdown_it = pytest.importorskip("markdown_it")
    odd = [dataclasses.replace(row, dataset=HOSTILE) for row in sweeps[-1].rows]
    layer = {"weights": 10, "activation_bits": 8, "steps": 1, "macs": 1.0, "grid": "lsq, 15 levels"}
    size = Size(layers=(LayerSize(name=HOSTILE, bits=4, **layer), LayerSize(name="b", bits=2, **layer)), others=0)
    path = write_card(
        tmp_path, {"exclude": [f"```{HOSTILE}"]}, [dataclasses.replace(sweeps[-1], rows=odd)], "accuracy", seed=0,
        name=HOSTILE, dataset=HOSTILE, settings={HOSTILE: HOSTILE}, size=size, command=HOSTILE,
    )  # fmt: skip
    _, head, body = re.split(r"^---$", path.read_text(), maxsplit=2, flags=re.MULTILINE)
    assert yaml.safe_load(head)["model-index"][0]["name"] == HOSTILE
    shown = markdown_it.MarkdownIt("commonmark").enable("table").render(body)
    assert "<img src=x" not in shown and "href=" not in shown and shown.count("<h1>") == 1
    assert len(set(re.findall(r"<t[hd]>", shown))) == 2 and "<hr" not in shown
    first = shown[shown.index("<tbody>") : shown.index("</tbody>")]
    assert first.count("<td>") == 5 and "&lt;img src=x onerror=alert(1)&gt;|[a](javascript:alert(1))`*" in first


def test_escaped_text_is_one_line():
    assert escaped("a\n|b") == "a \\|b" and escaped("layer1.conv_2.weight") == "layer1.conv_2.weight"
    assert escaped("__init__ ~~x~~") == r"\_\_init\_\_ \~\~x\~\~"


def test_the_command_is_said_without_its_secrets():
    argv = ["recipes/kure.py", "--hub_token", "hf_abc", "--hub_token=hf_abc", "--name", "two words", "--bf16"]
    said = command_line(argv)
    assert said == "recipes/kure.py --hub_token <hidden> --hub_token=<hidden> --name 'two words' --bf16"
    assert command_line(["/env/bin/robustq", "train", "a.yaml"]) == "robustq train a.yaml"
    assert command_line(["/env/ipykernel_launcher.py", "-f", "x"]) is None and command_line(["-c"]) is None


def test_a_card_is_written_again_with_what_was_measured_since(tmp_path, sweeps):
    save_sweeps(sweeps, tmp_path / "robustq_sweep.json")
    layer = {"weights": 10, "activation_bits": 8, "steps": 1, "macs": 1.0, "grid": "lsq, 15 levels"}
    size = Size(layers=(LayerSize(name="a", bits=4, **layer), LayerSize(name="b", bits=2, **layer)), others=3)
    first = write_card(tmp_path, {"seed": 1}, sweeps, "accuracy", seed=1, command="train.py", size=size).read_text()
    again = rewrite_card(tmp_path, load_sweeps(tmp_path / "robustq_sweep.json"), {}).read_text()
    assert again == first
    more = Sweep(rows=rows(**{"w4@aciq": 0.5, "w4@aciq/x0.9": 0.4, "w4@aciq/x1.1": 0.45}))
    text = rewrite_card(tmp_path, sweeps, {"pictures": more}, license="mit", base_model="a/b").read_text()
    assert "## Measured afterwards: pictures" in text and "| pictures, aciq/x1.1 | 45.00 |" in text
    assert "license: mit" in text and "steps other than those" not in text and "steps other than those" in first
    assert (tmp_path / "robustq_measured_steps_0.png").exists() and (tmp_path / "robustq_bits.png").exists()
    with pytest.raises(ValueError, match="create_model_card"):
        rewrite_card(tmp_path / "nowhere", sweeps, {})
