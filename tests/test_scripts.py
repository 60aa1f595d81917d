"""The scripts behind the README's results, at tiny size: every part runs, and its numbers are what they are called."""

import argparse
import importlib
import json
import math
import re
import shlex
import statistics
import sys
from pathlib import Path

import pytest
import tiny
import torch

import qlora

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))
import memory  # noqa: E402
import proof  # noqa: E402

ROWS = [{"text": f"### Human: {r['input']}### Assistant: {r['output']}"} for r in tiny.support_rows(22)]


@pytest.fixture
def run_proof(models, tmp_path, monkeypatch):
    """`run_proof(part, *words)` -> what it wrote as JSON; table and chart must be there."""
    base = models("llama", tokenizer="byte_bpe", max_position_embeddings=640)
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", ROWS)

    def run(part, *words):
        where = [str(base), *([] if part == "bits" else [str(file), "--held_out", "6"])]
        where += ["--jobs", "0"] if part in ("precision", "learning", "fast_slow") else []
        proof.main([part, *where, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *words])
        assert (tmp_path / f"out/{part}.md").is_file()
        assert (tmp_path / f"out/{part}.png").is_file() == (part in proof.CHARTS)
        return json.loads((tmp_path / f"out/{part}.json").read_text())

    return run


def test_precision(run_proof, tmp_path):
    names, words = ["LoRA, 16 bit", "LoRA, nf4"], ["--seeds", "3,4", "--epochs", "1"]
    found = run_proof("precision", "--settings", ";".join(names), *words, "--", "--lora_r", "4")
    runs = {(run["name"], run["seed"]): run for run in found["runs"]}
    assert set(runs) == {(name, seed) for name in names for seed in (3, 4)}
    assert found["versions"]["torch"] == torch.__version__ and found["device"] and found["command"]
    assert len({json.dumps(run["data"]) for run in runs.values()}) == 1  # the same rows held out
    for run in runs.values():
        assert len(run["loss"]) == 1 and [entry["step"] for entry in run["eval"]] == [0, 1]
    # 16 rows are one step: before anything is supervised only the weights' precision tells the losses apart
    assert runs[names[0], 3]["loss"] == pytest.approx(runs[names[0], 4]["loss"], rel=1e-6)
    assert runs[names[0], 3]["loss"] != pytest.approx(runs[names[1], 3]["loss"], rel=1e-5)
    after = {key: run["eval"][1]["eval_loss"] for key, run in runs.items()}
    minus = [after[names[1], seed] - after[names[0], seed] for seed in (3, 4)]
    table = (tmp_path / "out/precision.md").read_text()
    assert f"{statistics.mean(minus):.4f} ± {statistics.stdev(minus):.4f}" in table


def test_fast_equals_a_plain_loop_of_the_libraries(run_proof):
    found = run_proof("fast_slow", "--steps", "3")
    losses = proof.curves(found)
    assert set(losses) == {name for pair in proof.PAIRS for name in pair}
    for name, curve in losses.items():
        assert len(curve) == 3 and curve == pytest.approx(losses["plain loop"], rel=1e-5), name
    other = next(run["loss"] for run in found["runs"] if run["seed"] == 1)
    assert other[2] != pytest.approx(losses["stock"][2], rel=1e-6)


def test_learning(run_proof, tmp_path):
    """What qlora.py says before and after equals what plain loops say; one subject has two questions, one has one."""
    (tmp_path / "mmlu").mkdir()
    letters = {"knots": "AD", "fog": "C"}
    rows = [
        {"subject": s, "input": f"About {s}.\n{i}?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", "output": letter}
        for s, given in letters.items()
        for i, letter in enumerate(given)
    ]
    tiny.rows_to_jsonl(tmp_path / "mmlu/zero_shot_mmlu_val.json", rows)
    flags = ["--", "--dataloader_num_workers", "0", "--learning_rate", "0.01"]
    found = run_proof("learning", "--steps", "3", "--mmlu", str(tmp_path / "mmlu"), *flags)
    recipe = next(run for run in found["runs"] if run["name"] == "guanaco")
    assert [entry["step"] for entry in recipe["eval"]] == [0, 1, 2, 3]
    for when, entry in (("before", recipe["eval"][0]), ("after", recipe["eval"][-1])):
        assert found["plain"][when]["eval_loss"] == pytest.approx(entry["eval_loss"], rel=1e-5)
        assert found["plain"][when]["mmlu_eval_accuracy"] == pytest.approx(entry["mmlu_eval_accuracy"])
        assert found["plain"][when]["mmlu_questions"] == 3
        assert found["support"][when] == {"exact": 0, "of": 2}
    assert recipe["eval"][-1]["eval_loss"] < recipe["eval"][0]["eval_loss"]
    assert len(found["prompts"]) == 3
    assert all(row["input"].endswith("### Assistant:") for row in found["prompts"])


def test_bits_are_counted_from_the_bytes(run_proof):
    """A layer has four matrices of 64 x 64 and three of 64 x 128, 64 and 128 scales of 8 bits.

    Each of the seven also keeps the mean of its scales and, as they are at most 256, one scale for them: two floats.
    """
    found = run_proof("bits")
    own = 4 * 64 * 64 + 3 * 64 * 128
    expected = 4 + 8 / 64 + 7 * 2 * 32 / own
    stored = found["storage"]["nf4 + double quant"]
    assert stored["model"]["bits"] == pytest.approx(expected)
    assert stored["4096 x 4096"]["bits"] == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-5)
    assert found["storage"]["nf4"]["model"]["bits"] == 4.5
    assert found["parameters"] == 2 * own
    # of normal values: nf4 is made for them, fp4 and int4 are not
    errors = {kind: of["relative_rms"] for kind, of in found["errors"]["normal"].items()}
    assert 0.08 < errors["nf4"] < errors["int4"] < errors["fp4"] < 0.14


def test_noise(run_proof):
    """Noise has the size of the error in every block, and no other shape of it."""
    losses = run_proof("noise", "--first", "2")["eval_loss"]
    assert len(losses) == 9 == len(set(losses.values()))
    weight = torch.randn(8, 128)
    error, drawn = proof.rounded(weight, "nf4") - weight, proof.blurred(weight, "nf4", 0) - weight
    assert float(drawn.square().mean()) == pytest.approx(float(error.square().mean()), rel=0.2)
    assert abs(float((drawn * error).mean() / error.square().mean())) < 0.2


def test_int4_by_hand():
    """The largest of 64 values is 7 steps; halves go to the even neighbour."""
    row = torch.zeros(1, 64)
    row[0, :4] = torch.tensor([-14.0, 1.9, 3.1, 0.9])
    assert proof.rounded(row, "int4")[0, :4].tolist() == pytest.approx([-14, 2, 4, 0])
    eight = proof.rounded(row, "int8")[0, :2].tolist()
    assert eight == pytest.approx([-14, 14 / 127 * 17])


def test_the_quick_starts_flags():
    script = (ROOT / "scripts/quickstart.sh").read_text()
    said = shlex.split(script.replace("\\\n", " ").replace("(", " ").replace(")", " "), comments=True)
    flags = [*proof.SUPPORT[2:-4], *proof.SUPPORT_TRAIN]
    for name, value in zip(flags, [*flags[1:], "--"], strict=True):
        if name.startswith("--"):
            assert name in said
            assert value.startswith("--") or said[said.index(name) + 1] == value, name


def test_memory(tmp_path, capsys):
    memory.main(["--shapes", "tiny,tiny@48", "--tokens", "32", "--steps", "2", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "memory.json").read_text())
    free, capped = found["results"]
    assert (free["cap"], capped["cap"]) == (None, 48)
    for run in found["results"]:
        assert len(run["losses"]) == 2 and all(math.isfinite(value) for value in run["losses"] + run["grad_norms"])
        # 2 layers of 4 x 64 x 64 (two of them half as wide) and 3 x 64 x 128, and embedding and head of 256 x 64
        assert 0 < run["predicted_gib"] < 0.2 and run["peak_gib"] > 0
    assert "| tiny | 48.0 |" in (tmp_path / "memory.md").read_text() and (tmp_path / "memory.png").is_file()


RESULTS = [(ROOT / folder / "README.md").read_text(encoding="utf-8") for folder in ("", "scripts/results")]
COMMANDS = re.findall(r"python (scripts/\w+)\.py([^`\n]*)", "".join(RESULTS))
MEASURE = [(Path(script).name, words) for script, words in COMMANDS if re.search("proof|memory|benchmark", script)]


def test_the_commands_of_the_results_are_found():
    assert {"proof", "memory", "benchmark", "benchmark_many"} == {script for script, _ in MEASURE}


class Parsed(Exception):
    """A command line was understood."""


@pytest.mark.parametrize(("script", "words"), MEASURE)
def test_a_command_of_the_results_parses(script, words, monkeypatch):
    """Up to where it would measure; what follows -- are flags of qlora.py."""

    def parse(*given, read=argparse.ArgumentParser.parse_args):
        read(*given)
        raise Parsed

    argv = shlex.split(words)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    with pytest.raises(Parsed):
        importlib.import_module(script).main()
    monkeypatch.undo()
    qlora.parse_config(["--model_name_or_path", "m", *(argv[argv.index("--") + 1 :] if "--" in argv else [])])
