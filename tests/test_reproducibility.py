"""Two runs of one command are one run; run.json repeats it and says what differs."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import qlora

ROOT = Path(__file__).resolve().parent.parent


def same_adapters(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def repeat(record: Path, *words: str, output_dir: Path | None) -> tuple[int, Path | None]:
    folder = [] if output_dir is None else ["--output_dir", str(output_dir)]
    return qlora.main([str(record), *folder, *words]), output_dir


def what_differs(stderr: str) -> list[str]:
    """The lines below the sentence that says so."""
    (after,) = stderr.split("what differs from it:\n")[1:]
    lines = after.splitlines()
    return [line.strip() for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("  "))]]


# Each has flags that a rule between flags would refuse beside the defaults of others, had they all been given.
RUNS = {
    "4 bit, dropout, grouped": {"lora_dropout": 0.1, "learning_rate": 5e-3, "eval_strategy": "steps", "eval_steps": 2},
    "8-bit states, packing": {"adam8bit": True, "lora_r": 64, "packing": True, "source_max_len": 100, "bits": 8},
    "one limit, epochs": {
        "max_steps": None, "num_train_epochs": 0.25, "model_max_len": 120, "skip_excess_length": False,
        "source_max_len": None, "target_max_len": None, "seed": 3, "lr_scheduler_type": "cosine", "bits": 16,
        "lr_scheduler_kwargs": {"num_cycles": 0.4}, "warmup_ratio": 0.1, "double_quant": False, "do_eval": True,
        "report_to": "none", "eval_dataset_size": 5,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_repeated_run_gives_the_same_adapter(run_qlora, tmp_path, capsys, name):
    old = run_qlora(**RUNS[name])
    assert old.code == 0
    torch.manual_seed(99)
    capsys.readouterr()
    assert repeat(old.output_dir / "run.json", output_dir=tmp_path / "new") == (0, tmp_path / "new")
    assert same_adapters(old.output_dir, tmp_path / "new")
    assert what_differs(capsys.readouterr().err) == ["nothing"]
    one, other = old.json("run.json"), json.loads((tmp_path / "new/run.json").read_text())
    folders = {"output_dir": None}
    assert one["flags"] | folders == other["flags"] | folders and one["derived"] == other["derived"]
    assert one["data"] == other["data"] and one["data"]["train"]["fingerprint"]


def test_differences_from_the_repeated_run_are_printed(run_qlora, tmp_path, capsys):
    """Another torch, another GPU, a row more, a flag on the command line, a default of another version."""
    data = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", tiny.support_rows(8))
    old = run_qlora(dataset=data, max_steps=2)
    record = old.json("run.json")
    record["versions"]["torch"] = "1.0"
    record["device"]["name"] = "Abacus"
    record["flags"]["weight_decay"] = 0.125  # not given: the default that this run had
    record["flags"]["use_cpu"] = False  # of a machine with a GPU
    (tmp_path / "run.json").write_text(json.dumps(record))
    tiny.rows_to_jsonl(data, tiny.support_rows(9))
    capsys.readouterr()
    code, new = repeat(tmp_path / "run.json", "--learning_rate", "1e-3", output_dir=tmp_path / "new")
    lines = what_differs(capsys.readouterr().err)
    assert code == 0
    assert f"versions torch was 1.0, is {version('torch')}" in lines
    assert f"device name was Abacus, is {qlora.device_name()}" in lines
    assert "flags learning_rate was 0.0002, is 0.001" in lines
    assert any(line.startswith("data train fingerprint was ") for line in lines)
    assert not any(line.startswith(("flags weight_decay", "flags use_cpu", "flags output_dir")) for line in lines)
    assert json.loads((new / "run.json").read_text())["flags"]["weight_decay"] == 0.125


def test_a_repetition_needs_a_folder_of_its_own_and_leaves_the_old_ones_alone(run_qlora, tmp_path, capsys):
    folders = {"working_dir": tmp_path / "work", "final_output_dir": tmp_path / "final"}
    old = run_qlora(max_steps=1, **folders, merged_output_dir=tmp_path / "merged", merge_base="dequantized")
    record = tmp_path / "work/run.json"
    assert old.code == 0 and record.exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert repeat(record, output_dir=None)[0] == 2
    assert "--output_dir" in capsys.readouterr().err
    assert repeat(record, output_dir=tmp_path / "new")[0] == 0
    assert same_adapters(tmp_path / "final", tmp_path / "new")
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == before


def test_a_file_of_flags_is_no_record(tmp_path):
    """Whatever its name, also with a flag that is called as one of a record's parts is."""
    (tmp_path / "run.json").write_text('{"bits": 8, "device": "x"}')
    with pytest.raises(qlora.ConfigError, match="--device: unknown flag"):
        qlora.parse_config([str(tmp_path / "run.json")])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": 5}, "run.json: --bits: invalid choice: '5' (choose from 4, 8, 16, 32)"),
        ({"bits": "five"}, "run.json: --bits: invalid choice: 'five' (choose from 4, 8, 16, 32)"),
        ({"max_steps": "many"}, "run.json: --max_steps: invalid int value: 'many'"),
        ({"lora_bias": "some"}, "run.json: --lora_bias: invalid choice: 'some'"),
        ({"seed": "x"}, "--seed"),
    ],
)
def test_record_edited_by_hand_is_checked(tmp_path, change, said):
    record = {part: {} for part in ("derived", "versions", "data", "device")} | {"flags": {"dataset": "a", **change}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(qlora.ConfigError, match=re.escape(said)):
        qlora.parse_config([str(tmp_path / "run.json"), "--output_dir", "x"])
    (tmp_path / "run.json").write_text(json.dumps(record | {"flags": [1]}))
    with pytest.raises(qlora.ConfigError, match=r"run.json: --\w+: unknown flag"):
        qlora.parse_config([str(tmp_path / "run.json"), "--output_dir", "x"])


@pytest.mark.ci
def test_adapter_does_not_depend_on_the_hash_seed(run_qlora, models, data_dir, tmp_path):
    """The order of sets of text changes with Python's hash seed, from process to process."""
    here = run_qlora(max_steps=2, lora_dropout=0.1, learning_rate=1e-2, lora_modules="attn,mlp")
    record, new = here.output_dir / "run.json", tmp_path / "new"
    command = [sys.executable, str(ROOT / "qlora.py"), str(record), "--output_dir", str(new)]
    environment = {"PYTHONHASHSEED": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert same_adapters(here.output_dir, new)
