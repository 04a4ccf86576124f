"""Files stay whole: under two writers, a kill, a full disk, an interrupt, and an output that nobody reads."""

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pytest

from hf_robustq.cli import main
from hf_robustq.cli.sweep import Records
from hf_robustq.files import locked, read_json, write_json, write_text, written
from hf_robustq.report import read, write_report
from hf_robustq.shapes import check
from hf_robustq.sweep import Setting
from tests.test_report import ROOT, training

IDENTITY = {"seed": 0}
ALL = ["rows.json", "rows.csv", "rows.parquet", "table.md"]


def row(setting, value=0.5, model="m"):
    facts = {"model": model, "setting": setting, "weights": 4, "activations": None, "samples": 8, "subset": "all"}
    return {**facts, "split": None, "accuracy": value, "method": "mse", "seed": 0}


def records(folder, settings=("w4",)):
    return Records(folder, IDENTITY, [Setting.parse(name) for name in settings])


def settings_in(folder):
    """By file, what is in it; all say the same."""
    known = {"rows.json": [one["setting"] for one in json.loads((folder / "rows.json").read_text())["rows"]]}
    cache = {"cache_dir": str(folder.parent / "cache")}
    known["rows.csv"] = datasets.Dataset.from_csv(str(folder / "rows.csv"), **cache)["setting"][:]
    known["rows.parquet"] = datasets.Dataset.from_parquet(str(folder / "rows.parquet"), **cache)["setting"][:]
    assert known["rows.csv"] == known["rows.json"] == known["rows.parquet"]
    head = (folder / "table.md").read_text().splitlines()[0]
    assert all(f" {Setting.parse(name).name.upper()} " in head for name in known["rows.json"])
    return known["rows.json"]


def python(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdin=-1, stdout=-1, stderr=-1, cwd=ROOT, env=environment)


def test_two_commands_on_one_folder_keep_all_rows(tmp_path):
    """Two threads stand for them: they share neither rows nor a lock's file descriptor."""
    folder = tmp_path / "out"
    names = [["w2", "w3", "w4", "fp"], ["w5", "w6", "w7", "w8", "w4"]]
    both = [records(folder) for _ in names]  # each has begun before the other wrote
    begin = threading.Barrier(2)

    def write(own, settings):
        begin.wait()
        for name in settings:
            own.add([row(name)])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, both, names))
    assert sorted(settings_in(folder)) == sorted({name for own in names for name in own})
    assert sorted(path.name for path in folder.iterdir()) == sorted([*ALL, ".rows.lock"])


def test_what_another_command_measured_is_not_measured_again(tmp_path):
    one, other = records(tmp_path / "out"), records(tmp_path / "out")
    one.add([row("w4", 0.25)])
    asked = [Setting.parse(name) for name in ("w4", "w3")]
    assert [setting.name for setting in other.missing("m", asked)] == ["w3"]
    other.add([row("w4", 0.75), row("w3")])  # both had begun: the first counts
    assert [(each["setting"], each["accuracy"]) for each in other.rows] == [("w4", 0.25), ("w3", 0.5)]
    one.models["m"] = "one digest"
    one.write()
    other.models["m"] = "another"
    with pytest.raises(ValueError, match="m is not what it was"):
        other.add([row("w2")])


def test_a_kill_at_any_write_leaves_a_folder_to_go_on_with(tmp_path, monkeypatch):
    """A kill removes nothing: what is renamed is there, what was being written stays as a leftover."""
    for stop in range(4):
        folder = tmp_path / str(stop)
        replace, done = Path.replace, []

        def killed(path, target, done=done, stop=stop):
            if len(done) == stop:
                raise SystemExit("killed")
            done.append(replace(path, target))  # noqa: B023

        monkeypatch.setattr(Path, "replace", killed)
        monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        with pytest.raises(SystemExit):
            records(folder).add([row("w4"), row("w3")])
        monkeypatch.undo()
        assert sum(path.name in ALL for path in folder.iterdir()) == stop
        again = records(folder)
        assert len(again.rows) == (2 if stop else 0)
        again.add([] if stop else [row("w4"), row("w3")])
        assert settings_in(folder) == ["w4", "w3"]
        assert not list(folder.glob(".*.tmp"))


def test_a_lock_of_a_process_that_was_killed_blocks_nobody(tmp_path):
    holder = python(
        f"from hf_robustq.files import locked\nwith locked({str(tmp_path / 'rows')!r}):\n  print('in', flush=True)\n"
        "  input()"
    )
    assert holder.stdout.readline() == "in\n"
    with pytest.raises(ValueError, match="another command writes .*rows: wait for it"), locked(tmp_path / "rows", 0):
        pass
    holder.kill()
    holder.communicate()
    with locked(tmp_path / "rows", 5):
        pass


def test_two_writers_of_one_file_never_mix(tmp_path):
    texts = [letter * 300_000 for letter in "abcd"]
    threads = [threading.Thread(target=lambda t=t: [write_text(t, tmp_path / "f") for _ in range(20)]) for t in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "f").exists():
            assert (tmp_path / "f").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "no space left on device: free some space"),
        (errno.EDQUOT, "disk quota exceeded: free some space"),
        (errno.EROFS, "read-only file system: name a folder that you may write to"),
        (errno.EACCES, "permission denied: name a folder that you may write to"),
    ],
)
def test_a_full_or_closed_disk_is_one_line_and_leaves_what_was_there(code, remedy, tmp_path, monkeypatch):
    """Of every file of a report, of a sweep and of a run: a write fails after its first bytes."""
    run = training(tmp_path / "run")
    records(tmp_path / "swept").add([row("w4")])
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("old")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write = Path.write_text

    def full(path, text, *args, **options):
        write(path, text[:3], *args, **options)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_text", full)
    for action, folder, name in (
        (lambda: write_report(read([run]), tmp_path / "page"), tmp_path / "page", "index.html"),
        (lambda: records(tmp_path / "swept").add([row("w3")]), tmp_path / "swept", "rows.json"),
        (lambda: write_json({}, run / "robustq_run.json"), run, "robustq_run.json"),
    ):
        with pytest.raises(OSError) as caught:
            action()
        assert str(caught.value) == f"cannot write {name} into {folder}: {remedy}"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "page" / "index.html").unlink()
    with pytest.raises(SystemExit) as end:
        main(["report", str(run), "--out", str(tmp_path / "page")])
    assert str(end.value) == f"error: cannot write index.html into {tmp_path / 'page'}: {remedy}"


def test_a_limit_of_the_system_itself(tmp_path):
    """RLIMIT_FSIZE: the report's page, which is megabytes, does not fit."""
    run = training(tmp_path / "run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(SystemExit) as end:
            main(["report", str(run), "--out", str(tmp_path / "page")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    place = tmp_path / "page"
    remedy = "raise the limit on the size of files"
    assert str(end.value) == f"error: cannot write index.html into {place}: file too large: {remedy}"
    assert list(place.iterdir()) == []


def test_an_interrupt_removes_the_unfinished_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), written(tmp_path / "f") as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_one_line(tmp_path, monkeypatch, capsys):
    run = training(tmp_path / "run")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("old")

    def slow(path, text, **options):
        path.write_bytes(b"half")
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    monkeypatch.setattr(Path, "write_text", slow)
    try:
        with pytest.raises(SystemExit) as end:
            main(["report", str(run), "--out", str(tmp_path / "page")])
    finally:
        signal.signal(signal.SIGINT, before)
    assert (end.value.code, capsys.readouterr().err) == (130, "interrupted\n")
    assert [path.read_text() for path in (tmp_path / "page").iterdir()] == ["old"]


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("command", [["methods"], ["--help"], ["report", "RUN", "--out", "OUT"]])
def test_an_output_that_nobody_reads_is_no_error(command, through, tmp_path, monkeypatch, capsys):
    """`through`: as PYTHONUNBUFFERED has it, where nothing is left to flush."""
    names = {"RUN": str(training(tmp_path / "run")), "OUT": str(tmp_path / "out")}
    reader, writer = os.pipe()
    os.close(reader)
    raw = open(writer, "wb", buffering=0 if through else -1)  # noqa: SIM115
    with io.TextIOWrapper(raw, write_through=through) as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as end:
            main([names.get(word, word) for word in command])
        monkeypatch.undo()
    assert capsys.readouterr().err == ""
    assert end.value.code == 141 or (command == ["--help"] and end.value.code == 0)  # argparse says nothing
    if command[0] == "report":
        assert (tmp_path / "out" / "index.html").exists()


def test_head_as_a_user_calls_it():
    piped = python("print('first', flush=True); input(); from hf_robustq.cli import main; main(['methods'])")
    assert piped.stdout.readline() == "first\n"
    piped.stdout.close()
    piped.stdin.write("go\n")
    piped.stdin.close()
    with piped.stderr as said:
        assert said.read() == "" and piped.wait() == 141


def test_a_broken_pipe_of_something_else_is_said(monkeypatch):
    def broken(args):
        raise BrokenPipeError(errno.EPIPE, "a worker is gone")

    monkeypatch.setattr("hf_robustq.cli.methods.run", broken)
    with pytest.raises(SystemExit, match="error: .*a worker is gone"):
        main(["methods"])


def test_a_fault_of_the_program_is_one_line_that_shows_the_way_to_its_traceback(monkeypatch):
    def faulty(args):
        raise TypeError("no\nsuch thing")

    monkeypatch.setattr("hf_robustq.cli.methods.run", faulty)
    with pytest.raises(SystemExit) as end:
        main(["methods"])
    assert str(end.value) == "error: TypeError: no (--debug shows where)"
    with pytest.raises(TypeError):
        main(["methods", "--debug"])


def test_shapes():
    shape = {"name": str, "sizes": [int, ...], "note?": (str, None), "each?": {str: float}}
    check({"name": "a", "sizes": [1], "note": None, "each": {"x": 1, "y": float("nan")}, "more": []}, shape)
    for wrong, message in (
        ({"sizes": [1]}, "/name is missing"),
        ({"name": "a", "sizes": []}, "/sizes must be a list that is not empty, got '[]'"),
        ({"name": "a", "sizes": [1, "x" * 200]}, f"/sizes/1 must be a whole number, got '{'x' * 80}'"),
        ({"name": "a", "sizes": [True]}, "/sizes/0 must be a whole number, got 'True'"),
        ({"name": "a", "sizes": [2**63]}, "/sizes/0 must be a whole number"),
        ({"name": "a", "sizes": [1], "note": 3}, "/note must be text, got '3'"),
        ({"name": "a", "sizes": [1], "each": {"x": None}}, "/each/x must be a number, got 'None'"),
        ([], "it must be a mapping, got '[]'"),
    ):
        with pytest.raises(ValueError) as caught:
            check(wrong, shape)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is damaged, or no JSON: Expecting value"),
        (b"\xff", "is damaged, or no JSON: 'utf-8' codec"),
        (b"[" * 100_000, "is damaged, or no JSON: too many brackets"),
        (b"[" * 200 + b"]" * 200, "is damaged, or no JSON: too many brackets"),
        (b'"\\ud800"', "is damaged, or no JSON: 'utf-8' codec"),
        (b"9" * 5000, "is damaged, or no JSON: Exceeds the limit"),
        (None, "cannot be read: is a directory"),
    ],
)
def test_damaged_json_is_named(data, message, tmp_path):
    file = tmp_path / "f.json"
    file.mkdir() if data is None else file.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(file)
    assert str(caught.value).startswith(f"{file} ") and "\n" not in str(caught.value)
