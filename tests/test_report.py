"""The report: read as data, and opened in a browser."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_robustq import Row, Sweep
from hf_robustq.report import Lines, read, save_png, write_report
from hf_robustq.report.chart import figure
from hf_robustq.report.charts import by_bits, short, step_ratios, transfer
from hf_robustq.sweep import save_sweeps
from tests.test_card import HOSTILE
from tests.test_sweep import rows

ROOT = Path(__file__).parents[1]

MEASURED = {"fp": 0.9, "w8": 0.85, "w4": 0.7, "w2": 0.1, "w8a8": 0.84, "w4a4": 0.6}
STEPS = {"w4@mse/x0.9": 0.6, "w4@mse/x1.1": 0.65, "w4": 0.7}


def training(folder, names=("net.a.weight", "net.b.weight"), dataset="eval", shift=0.0):
    """The files that a training with a sweep leaves."""
    folder.mkdir(parents=True)
    measured = [{**MEASURED, **STEPS}, {name: value + shift for name, value in {**MEASURED, **STEPS}.items()}]
    layers = {name: {"kurtosis": 2.5 + i, "bits": 4.0 + i, "error": 0.1} for i, name in enumerate(names)}
    sweeps = [
        Sweep(
            rows=[dataclasses.replace(row, dataset=dataset) for row in rows(**values)],
            epoch=float(epoch), step=epoch * 10, layers=layers,
        )
        for epoch, values in enumerate(measured, 1)
    ]  # fmt: skip
    save_sweeps(sweeps, folder / "robustq_sweep.json")
    own = {n: {"kurtosis": 3.0 + i, "largest": 2.0, "counts": [1.0, 2.0, 4.0, 2.0, 1.0]} for i, n in enumerate(names)}
    weights = {"before": own, "after": own}
    (folder / "robustq_weights.json").write_text(json.dumps(weights))
    log = [{"loss": 2.0 - i, "kurtosis": 3.0 - i, "epoch": i, "step": i} for i in (0.5, 1.0)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    bits = [{"name": name, "weights": 10, "bits": 2 + i, "activation_bits": 8, "steps": 1, "macs": 1.0, "grid": "lsq"}
            for i, name in enumerate(names)]  # fmt: skip
    size = {"bits": 2.5, "others": 0, "layers": bits}
    facts = {"version": 1, "metric": "accuracy", "step": 20, "size": size, "settings": {"bf16": True}, "seed": 3}
    (folder / "robustq_run.json").write_text(json.dumps(facts))
    return folder


def analysis(path, names=("net.a.weight", "net.b.weight")):
    """A file of `robustq analyze`."""
    one = {"kurtosis": 3.0, "edges": [-2.0, -1.0, 0.0, 1.0, 2.0], "counts": [1, 2, 2, 1]}
    layers = {"": {"only": {"accuracy": 0.9, "loss": 1}, "without": {"accuracy": 0.6, "loss": 2}}}
    layers |= {n: {"only": {"accuracy": 0.8, "loss": 1}, "without": {"accuracy": 0.75, "loss": 2}} for n in names}
    settings = {"w4": {"sensitivity": layers}}
    path.write_text(json.dumps({"model": "m", "statistics": dict.fromkeys(names, one), "settings": settings}))
    return path


def charts_of(folder):
    text = (folder / "index.html").read_text()
    found = json.loads(re.search(r'id="charts">(.*?)</script>', text, re.DOTALL)[1])
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    return {html.unescape(title): charts for title, charts in zip(titles, found, strict=True)}


@pytest.fixture
def chromium():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine")
    return found


def opened(chromium, page, tmp_path, *more):
    """(the page as the browser has it after its scripts, what it wrote to its console)."""
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--hide-scrollbars",
             "--virtual-time-budget=30000", f"--user-data-dir={tmp_path / 'profile'}")  # fmt: skip
    command = [chromium, *flags, *more, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_page_has_the_numbers_of_the_files(tmp_path):
    run, out = training(tmp_path / "kure"), tmp_path / "out"
    written = write_report(read([run]), out)
    found = charts_of(out)
    bits, steps = found["Robustness on eval"]
    lines = {line["name"]: dict(zip(line["x"], line["y"], strict=True)) for line in bits["data"]}
    assert lines["kure"] == {8: 0.85, 4: 0.7, 2: 0.1} and lines["kure, A=W"] == {8: 0.84, 4: 0.6}
    assert lines["kure, float"] == {2: 0.9, 8: 0.9}
    (line,) = steps["data"]
    assert dict(zip(line["x"], line["y"], strict=True)) == {0.9: 0.6, 1.0: 0.7, 1.1: 0.65}
    page = (out / "index.html").read_text()
    assert [float(v) for v in re.findall(r'data-value="(.*?)"', page)] == [*{**MEASURED, **STEPS}.values()]
    assert found["Bits of layers"][0]["data"][0]["x"] == [2, 3] and found["Bits of layers"][0]["data"][0]["y"] == [
        "a",
        "b",
    ]
    assert found["Layers while training"][0]["data"][0]["z"] == [[2.5, 2.5], [3.5, 3.5]]
    density = found["Histograms of weights: kure"][0]["data"][0]
    area = sum(density["y"]) * (density["x"][1] - density["x"][0])
    assert area == pytest.approx(1) and density["x"] == pytest.approx([-1.6, -0.8, 0, 0.8, 1.6])
    telemetry = {tuple(chart["data"][0]["y"]) for chart in found["Telemetry"]}
    assert telemetry == {(1.5, 1.0), (2.5, 2.0)}
    assert written[0] == out / "index.html" and len(written) > 8
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])


def test_runs_side_by_side_and_an_analysis(tmp_path):
    training(tmp_path / "all" / "without")
    training(tmp_path / "all" / "with", shift=0.05)
    runs = read([tmp_path / "all", analysis(tmp_path / "w4.json")])
    assert [run.name for run in runs] == ["without", "with", "m"]
    write_report(runs, tmp_path / "out")
    found = charts_of(tmp_path / "out")
    matrix = found["Robustness on eval"][2]["data"][0]
    assert matrix["x"] == ["without", "with"] and matrix["y"] == ["FP", "W8", "W4", "W2", "W8/A8", "W4/A4"]
    assert matrix["z"][2] == [0.7, pytest.approx(0.75)]
    alone, others = found["Sensitivity of layers"][0]["data"]
    assert alone["x"] == pytest.approx([0.1, 0.1]) and others["x"] == pytest.approx([0.15, 0.15])


def test_two_runs_of_one_name_are_told_apart(tmp_path):
    runs = read([training(tmp_path / "a" / "with"), training(tmp_path / "b" / "with"), training(tmp_path / "other")])
    assert [run.name for run in runs] == ["a/with", "b/with", "other"]


def test_an_analysis_of_a_run_joins_it(tmp_path):
    run, file = training(tmp_path / "kure"), analysis(tmp_path / "kure.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "model": str(run)}))
    (one,) = read([file, run])
    write_report([one], tmp_path / "out")
    found = charts_of(tmp_path / "out")
    assert len(found["Sensitivity of layers"]) == 1 and len(found["Histograms of weights: kure"][0]["data"]) == 2


def test_a_sweep_of_the_command_line(tmp_path):
    row = {"model": "m/net", "setting": "w4", "weights": 4, "activations": None, "samples": 9, "subset": "all",
           "split": "test", "accuracy": 0.5, "loss": None, "seed": 0, "ratio": 1.0, "method": "mse"}  # fmt: skip
    other = {**row, "setting": "w2", "weights": 2, "accuracy": 0.25}
    values = {"sweep": {"seed": 0}, "models": {"m/net": "digest"}, "rows": [row, other]}
    (tmp_path / "rows.json").write_text(json.dumps(values))
    (run,) = read([tmp_path])
    assert run.name == "net" and run.sweeps[0].rows[0] == Row(
        setting="w4", weights=4, activations=None, metrics={"accuracy": 0.5}, samples=9, dataset="test"
    )
    write_report([run], tmp_path / "out")
    (line,) = charts_of(tmp_path / "out")["Robustness on test"][0]["data"]
    assert line["y"] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is no run: it has neither"),
        ({"robustq_sweep.json": "[1"}, "is damaged, or no JSON"),
        ({"robustq_sweep.json": "[]"}, "is empty: evaluate the model once"),
        ({"robustq_sweep.json": '[{"rows": [{"w": 4}]}]'}, "holds no sweeps as this version writes them"),
        ({"robustq_sweep.json": '{"version": 99, "sweeps": []}'}, "later version of hf_robustq: update it"),
        ({"rows.json": '{"rows": []}'}, "holds no rows as this version writes them"),
    ],
)
def test_folders_that_are_no_run_are_refused_in_one_line(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read([tmp_path])
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_other_paths_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is no analysis"):
        read([tmp_path / "config.json"])
    with pytest.raises(ValueError, match="is not there"):
        read([tmp_path / "nowhere"])


def test_sweeps_of_before_their_files_had_a_version_are_read(tmp_path):
    folder = training(tmp_path / "run")
    now = json.loads((folder / "robustq_sweep.json").read_text())
    old = [{key: value for key, value in one.items() if key != "layers"} for one in now["sweeps"]]
    (folder / "robustq_sweep.json").write_text(json.dumps(old))
    (run,) = read([folder])
    assert [one.rows for one in run.sweeps] == [Sweep.from_dict(one).rows for one in now["sweeps"]]
    assert run.sweeps[0].layers == {}


def test_without_matplotlib_there_is_a_page_and_no_picture(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert len(write_report(read([training(tmp_path / "run")]), tmp_path / "out")) == 1
    assert "hf_robustq[report]" in caplog.text


def test_no_name_gets_out_of_its_place(tmp_path):
    run = training(
        tmp_path / "<b>run", names=(HOSTILE, f"b</script><script>alert(1)</script>{HOSTILE}"), dataset=HOSTILE
    )
    out = tmp_path / "out"
    write_report(read([run]), out)
    text = (out / "index.html").read_text()
    before = text[: text.index("plotly.js v")]
    assert "<img" not in before and "<b>" not in before and before.count("<script") == 2


def test_a_browser_draws_every_chart_without_a_complaint(chromium, tmp_path):
    training(tmp_path / "all" / "<b>without", names=(HOSTILE, "b</script><script>alert(1)</script>"), dataset=HOSTILE)
    training(tmp_path / "all" / "with")
    out = tmp_path / "out"
    write_report(read([tmp_path / "all", analysis(tmp_path / "w4.json", names=(HOSTILE, "b"))]), out)
    text = (out / "index.html").read_text()
    chosen = """<script>
      const menu = document.querySelector("select");
      menu.value = "1";
      menu.dispatchEvent(new Event("change"));
    </script></body>"""
    (out / "index.html").write_text(text.replace("</body>", chosen))
    size = "--window-size=1300,20000"
    page, console = opened(chromium, out / "index.html", tmp_path, size, "--dump-dom")
    assert console == []
    places = len(re.findall(r'class="chart[ "]', page))
    assert places > 12 and page.count("main-svg") >= 2 * places  # each is drawn in two layers or three
    assert "<img src=x" not in page and "&lt;img src=x" in page
    chosen = page[page.index("<select") :]
    caption = html.unescape(re.search(r"<figcaption>(.*?)</figcaption>", chosen, re.DOTALL)[1])
    assert caption == html.unescape(re.findall(r"<option.*?>(.*?)</option>", chosen, re.DOTALL)[1])
    assert "kurtosis 4.00" in chosen[: chosen.index("</section>")]
    picture = tmp_path / "phone.png"
    _, console = opened(chromium, out / "index.html", tmp_path, "--window-size=500,6000", f"--screenshot={picture}")
    assert console == [] and picture.stat().st_size > 50_000


def test_names_of_weights_lose_what_all_have():
    assert short(["m.a.0.weight", "m.b.0.weight"]) == ["a", "b"]
    assert short(["m.a.weight", "m.b.bias"]) == ["a.weight", "b.bias"]
    assert short(["weight", "a.weight"]) == ["weight", "a.weight"] and short(["m.weight"]) == ["m.weight"]


def test_pictures_and_curves_of_few_rows(tmp_path):
    only = {"one": Sweep(rows=rows(w4=0.7, w2=0.1))}
    save_png(by_bits(only, "accuracy"), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert step_ratios(only, "accuracy") is None and transfer(only, "accuracy") is None
    assert by_bits({"one": Sweep(rows=rows(fp=0.9, w4=0.7))}, "accuracy") is None


def test_the_picture_has_a_line_for_each_kind_of_setting_and_a_star_where_it_was_trained():
    trained = Row(setting="trained", weights=4, activations=4, metrics={"accuracy": 0.75}, samples=1)
    measured = {"fp": 0.9, "w8a4@learned": 0.7, "w3a4@learned": 0.4, "w8a4": 0.6, "w3a4": 0.3, "w8@mse/x0.9": 0.2}
    chart = by_bits({"net": Sweep(rows=[trained, *rows(**measured)])}, "accuracy")
    axes = figure(chart).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["net, A4 learned", "net, A4", "net, trained", "net, float"]
    assert lines["net, A4 learned"].get_xydata().tolist() == [[3, 0.4], [8, 0.7]]
    assert lines["net, trained"].get_marker() == "*" and lines["net, trained"].get_xydata().tolist() == [[4, 0.75]]
    assert list(axes.get_xticks()) == [3, 4, 8]
    assert isinstance(chart, Lines) and chart.percent


def test_trackers_get_the_sweeps_scalars_and_figures(tmp_path, monkeypatch):
    """Read back from TensorBoard's and trackio's own files, and from the offline run of Weights & Biases."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    script = f"""
from tests.test_trainer import KURE, arguments, bert, text
from hf_robustq import RobustTrainer
from hf_robustq.metrics import compute_accuracy
args = arguments({str(tmp_path / "run")!r}, eval_strategy="epoch", report_to=["tensorboard", "wandb", "trackio"])
trainer = RobustTrainer(
    model=bert(), args=args, train_dataset=text(), eval_dataset=text(10), robustq=KURE, sweep=["fp", "w4", "w2"],
    compute_metrics=compute_accuracy,
)
trainer.train()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tmp_path / "run").rglob("events.out.*")
    board = EventAccumulator(str(events)).Reload()
    (sweep,) = json.loads((tmp_path / "run" / "robustq_sweep.json").read_text())["sweeps"]
    for row in sweep["rows"]:
        (point,) = board.Scalars(f"eval/{row['setting']}_accuracy")
        assert point.value == pytest.approx(row["metrics"]["accuracy"])
    assert set(board.Tags()["images"]) == {"eval/figures/bits", "eval/figures/kurtosis"}
    assert list(tmp_path.rglob("media/images/eval/figures/bits*.png"))
    assert list((tmp_path / "trackio").rglob("*.png"))
