"""--streaming: rows that are read while training, a block at a time, and a resume that goes on from the very place."""

import itertools
import json
from collections import Counter

import datasets
import pytest
import tiny
from safetensors.torch import load_file

import qlora

ROWS = tiny.support_rows(24)
FLAGS = {"streaming": True, "stream_buffer": 10, "max_steps": 9, "save_steps": 3, "lora_dropout": 0.1}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """`hub(rows_by_split)`: what `load_dataset("some/set", streaming=True)` gives, from three JSON files a split.

    Only the look-up by the set's name is replaced: files are read by the library's own streaming code, as the hub's are.
    """
    real = datasets.load_dataset

    def publish(**splits):
        files = {}
        for split, rows in splits.items():
            third = -(-len(rows) // 3)
            files[split] = [
                str(tiny.rows_to_jsonl(tmp_path / f"{split}-{n}.jsonl", rows[n * third : (n + 1) * third]))
                for n in range(3)
            ]

        def load_dataset(path, **options):
            assert path == "some/set" and options.pop("streaming") is True
            return real("json", data_files=files, streaming=True, cache_dir=options["cache_dir"])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return "some/set"

    return publish


def losses(run):
    return {e["step"]: e["loss"] for e in run.json("trainer_state.json")["log_history"] if "loss" in e}


def weights(run):
    return load_file(run.output_dir / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"packing": True, "train_sampling_strategy": "random"},
        {"train_sampling_strategy": "sequential", "stream_buffer": 7},
    ],
    ids=["grouped", "packed", "in order"],
)
@pytest.mark.parametrize("where", ["file", "hub"])
def test_a_resumed_stream_equals_an_uninterrupted_one(run_qlora, data_dir, tmp_path, hub, flags, where):
    """Over more than a pass (24 rows, 9 x 2 and 9 x 4 of them), stopped in the middle of a block."""
    dataset = data_dir / "support.jsonl" if where == "file" else hub(train=ROWS)
    flags = FLAGS | {"dataset": dataset, "gradient_accumulation_steps": 2} | flags
    whole = run_qlora(**flags, output_dir=tmp_path / "whole")
    first = run_qlora(**flags | {"max_steps": 5}, output_dir=tmp_path / "parts")
    assert whole.code == first.code == 0
    for name in ("completed", "adapter_model.safetensors"):  # what a kill after step 5 would not have left
        (first.output_dir / name).unlink()
    place = json.loads((tmp_path / "parts" / "checkpoint-5" / "stream.json").read_text())
    assert place["windows"] == 5 and place["taken"] > 0
    second = run_qlora(**flags, output_dir=tmp_path / "parts")
    assert second.code == 0 and "resuming from" in second.stderr
    assert losses(second) == losses(whole) and len(losses(whole)) == 9
    assert same(weights(second), weights(whole))
    epochs = [[e["epoch"] for e in run.json("trainer_state.json")["log_history"]][5:] for run in (second, whole)]
    assert epochs[0] == epochs[1]
