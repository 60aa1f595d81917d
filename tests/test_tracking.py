"""--report_to: read back what a tracker has written, with its own reader, and compare it with the run's own record."""

import json
import sqlite3

import pytest
from conftest import extra

import qlora

STEPS = {"max_steps": 3, "learning_rate": 1e-3, "do_eval": True, "eval_strategy": "steps", "eval_steps": 3}
RATES = [1e-3, 1e-3, 1e-3]  # the default schedule is constant


def losses(run):
    """Training losses, and the one evaluation loss, at the last step, from the run's own record."""
    history = run.json("trainer_state.json")["log_history"]
    return [e["loss"] for e in history if "loss" in e], [run.json("metrics.json").get("eval_loss")]


def test_tensorboard(run_qlora, tmp_path, monkeypatch):
    extra("tensorboard")
    events = extra("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    run = run_qlora(report_to="tensorboard", **STEPS)
    assert run.code == 0
    (folder,) = (run.output_dir / "runs").iterdir()
    written = events.EventAccumulator(str(folder)).Reload()
    trained, evaluated = losses(run)
    assert len(trained) == 3
    assert [event.value for event in written.Scalars("train/loss")] == pytest.approx(trained)
    assert [event.step for event in written.Scalars("train/loss")] == [1, 2, 3]
    assert [event.value for event in written.Scalars("train/learning_rate")] == pytest.approx(RATES)
    assert [event.value for event in written.Scalars("eval/loss")] == pytest.approx(evaluated)
    assert [event.step for event in written.Scalars("eval/loss")] == [3]


def test_tensorboard_writes_to_logging_dir(run_qlora, tmp_path, monkeypatch):
    extra("tensorboard")
    run = run_qlora(report_to="tensorboard", max_steps=1, logging_dir=tmp_path / "board")
    assert run.code == 0 and not (run.output_dir / "runs").exists()
    assert [path.name.split(".")[0] for path in (tmp_path / "board").iterdir()] == ["events"]


def wandb_records(data):
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes.

    Blocks of 32 KiB hold fragments of records, each preceded by 4 bytes checksum, 2 bytes length and 1 byte type: 1 is
    a whole record, 2 the first fragment, 3 a middle one, 4 the last. A rest of a block under 7 bytes is padding.
    """
    assert data[:4] == b":W&B"
    at, record = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Wandb without a network; `read()` -> (project, name, [{metric: value}]) of the one run it wrote."""
    wandb = extra("wandb")
    records = extra("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_PROJECT", "lighthouse")
    monkeypatch.setenv("WANDB_NAME", "from the environment")

    def read():
        wandb.finish()
        wandb.teardown()  # waits for the process that writes the file
        (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
        project, name, history = None, None, []
        for data in wandb_records(file.read_bytes()):
            record = records.Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                project, name = record.run.project, record.run.display_name
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        return project, name, history

    yield read
    wandb.teardown()


def values(history, name):
    return [entry[name] for entry in history if name in entry]


def test_wandb(run_qlora, offline):
    run = run_qlora(report_to="wandb", **STEPS)
    assert run.code == 0
    project, name, history = offline()
    assert (project, name) == ("lighthouse", "from the environment")
    trained, evaluated = losses(run)
    assert values(history, "train/loss") == pytest.approx(trained) and len(trained) == 3
    assert values(history, "train/learning_rate") == pytest.approx(RATES)
    assert values(history, "eval/loss") == pytest.approx(evaluated)
    assert sorted(set(values(history, "train/global_step"))) == [1, 2, 3]


def test_two_trackers_and_a_run_name(run_qlora, offline):
    extra("tensorboard")
    run = run_qlora(report_to=["tensorboard", "wandb"], max_steps=1, run_name="lamp")
    assert run.code == 0 and list(run.output_dir.glob("runs/*/events*"))
    project, name, history = offline()
    assert (project, name) == ("lighthouse", "lamp")  # the flag overrides the environment
    assert values(history, "train/loss") == pytest.approx(losses(run)[0])


def test_trackio(run_qlora, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at the first import
    extra("trackio")
    run = run_qlora(report_to="trackio", project="lighthouse", run_name="lamp", **STEPS)
    assert run.code == 0
    with sqlite3.connect(tmp_path / "trackio" / "lighthouse.db") as base:
        rows = base.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, *_ in rows} == {"lamp"}
    history = [json.loads(metrics) for *_, metrics in rows]
    trained, evaluated = losses(run)
    assert values(history, "train/loss") == pytest.approx(trained) and len(trained) == 3
    assert values(history, "train/learning_rate") == pytest.approx(RATES)
    assert values(history, "eval/loss")[:1] == pytest.approx(evaluated[:1])  # the second may not have been written yet


@pytest.mark.parametrize("tracker", ["mlflow", "neptune", "lighthouse", "tensorbord", ["mlflow", "tensorbord"]])
def test_a_missing_tracker_is_one_line_before_the_model_is_read(run_qlora, monkeypatch, tracker):
    """No test environment has the packages of the first two; the others are no trackers."""
    monkeypatch.setattr(qlora, "load_model_config", None)  # the first thing a run reads of a model
    run = run_qlora(report_to=tracker)
    (line,) = run.stderr.splitlines()
    name = tracker if isinstance(tracker, str) else tracker[-1]
    assert run.code == 2 and line.startswith("error: --report_to ") and name in line
    assert not run.output_dir.exists()


def test_a_tracker_that_fails_is_one_line(run_qlora, tmp_path, monkeypatch):
    """wandb fails without a login."""
    wandb = extra("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    run = run_qlora(report_to="wandb", max_steps=1)
    wandb.teardown()
    last = run.stderr.splitlines()[-1]
    assert run.code == 2 and last.startswith("error: --report_to wandb: ") and "wandb login" in last
