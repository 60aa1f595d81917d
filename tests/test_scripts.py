"""The scripts behind the published results and the self-test, at tiny size.

What trains in processes of its own is marked `ci`; tables, charts, command lines and failures are tested by default.
"""

import argparse
import importlib
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from bitsandbytes.nn import Params4bit

import qlora

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "scripts/results"
sys.path.append(str(ROOT / "scripts"))
import benchmark_many  # noqa: E402
import check_models  # noqa: E402
import memory  # noqa: E402
import proof  # noqa: E402
import selftest  # noqa: E402

ROWS = [{"text": f"### Human: {r['input']}### Assistant: {r['output']}"} for r in tiny.support_rows(22)]
SHORT = ["--lora_r", "4", "--num_train_epochs", "1"]


# ------------------------------------------------------------------------------------
# proof.py
# ------------------------------------------------------------------------------------


@pytest.fixture
def run_proof(models, tmp_path, monkeypatch):
    """`run_proof(part, *words)` -> the JSON it wrote, of `rates` if there are some; its table must exist."""
    base, file = models("llama", tokenizer="byte_bpe", max_position_embeddings=640), tmp_path / "rows.jsonl"
    tiny.rows_to_jsonl(file, ROWS)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(part, *words):
        folders = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
        proof.main([part, str(base), str(file), "--held_out", "6", "--jobs", "2", *folders, *words])
        name = "rates" if "--rates" in words else part
        assert (tmp_path / f"out/{name}.md").is_file()
        return json.loads((tmp_path / f"out/{name}.json").read_text())

    return run


def loss_after(run):
    """Held-out loss after training."""
    return run["eval"][-1]["eval_loss"]


@pytest.mark.ci
def test_precision(run_proof, tmp_path):
    names = ["LoRA, 16 bit", "LoRA, nf4"]
    result = run_proof("precision", "--settings", *names, "--seeds", "3", "4", "--", *SHORT)
    runs = {(run["name"], run["seed"]): run for run in result["runs"]}
    assert set(runs) == {(name, seed) for name in names for seed in (3, 4)}
    assert result["versions"]["torch"] == torch.__version__ and result["device"] and result["command"]
    assert len({json.dumps(run["data"]) for run in runs.values()}) == 1  # the same rows are held out
    for run in runs.values():
        assert len(run["loss"]) == 1 and [entry["step"] for entry in run["eval"]] == [0, 1]
    # 16 rows are one step, and before training only the precision of the weights changes the loss
    assert runs[names[0], 3]["loss"] == pytest.approx(runs[names[0], 4]["loss"], rel=1e-6)
    assert runs[names[0], 3]["loss"] != pytest.approx(runs[names[1], 3]["loss"], rel=1e-5)
    after = {key: run["eval"][1]["eval_loss"] for key, run in runs.items()}
    minus = [after[names[1], seed] - after[names[0], seed] for seed in (3, 4)]
    table = (tmp_path / "out/precision.md").read_text()
    assert f"{statistics.mean(minus):.4f} ± {statistics.stdev(minus):.4f}" in table


@pytest.mark.ci
def test_every_rate_on_both_bases(run_proof):
    """A 16-bit run's own base is the published one; that of a calibrated run is not, and its adapter fits both."""
    names = [proof.REFERENCE, "LoRA, nf4 calibrated"]
    result = run_proof("precision", "--settings", *names, "--rates", "1e-2", "1e-3", "--seeds", "0", "--", *SHORT)
    runs = {(run["name"], run["rate"]): run for run in result["runs"]}
    assert set(runs) == {(name, rate) for name in names for rate in (1e-2, 1e-3)}
    for rate in (1e-2, 1e-3):
        reference, calibrated = (runs[name, rate] for name in names)
        assert loss_after(reference) == pytest.approx(reference["published"], abs=2e-5)
        assert calibrated["published"] != pytest.approx(loss_after(calibrated), abs=2e-5)
        minus = f"{loss_after(calibrated) - loss_after(reference):.4f}"
        line = next(line for line in proof.runs_table(result).splitlines() if f"calibrated, {rate:g} |" in line)
        assert f" | {minus} | {calibrated['published']:.4f} |" in line


@pytest.mark.ci
def test_a_finished_run_is_not_repeated_on_the_same_rows(run_proof, tmp_path, capsys):
    words = ["--settings", "LoRA, nf4", "--seeds", "0", "--", *SHORT]
    first = run_proof("precision", *words)["runs"]
    assert "held-out loss" in capsys.readouterr().out.splitlines()[0]
    assert run_proof("precision", *words)["runs"] == first
    assert capsys.readouterr().out.startswith("| trained |")
    tiny.rows_to_jsonl(tmp_path / "rows.jsonl", ROWS[1:])
    assert run_proof("precision", *words)["runs"][0]["data"] != first[0]["data"]


@pytest.mark.ci
def test_the_fast_path_has_the_losses_of_the_plain_loop(run_proof):
    result = run_proof("fast_slow", "--steps", "3")
    losses = {run["name"]: run["loss"] for run in result["runs"] if run["seed"] == 0} | {"plain loop": result["plain"]}
    assert set(losses) == {name for pair in proof.PAIRS for name in pair}
    for name, curve in losses.items():
        assert len(curve) == 3 and curve == pytest.approx(losses["plain loop"], rel=1e-5), name
    other_seed = next(run["loss"] for run in result["runs"] if run["seed"] == 1)
    assert other_seed[2] != pytest.approx(losses["stock"][2], rel=1e-6)


TABLES = {
    "precision": proof.runs_table, "rates": proof.runs_table, "recipe": proof.runs_table,
    "fast_slow": proof.fast_slow_table, "memory": memory.memory_table,
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_published_tables_are_those_of_the_published_numbers(name):
    content = json.loads((RESULTS / f"{name}.json").read_text())
    assert TABLES[name](content) + "\n" == (RESULTS / f"{name}.md").read_text()


def test_a_run_that_fails_leaves_its_reason(tmp_path):
    script = tmp_path / "qlora.py"
    script.write_text("import sys\nprint('error: --bits 5')\nprint('the last line')\nsys.exit(2)\n")
    with pytest.raises(RuntimeError, match=r"exit status 2: error: --bits 5$"):
        proof.start([str(script)], tmp_path / "log")
    runs = [{"name": "LoRA, nf4", "seed": 0, "failed": "exit status 2"}]
    for make_table in (proof.runs_table, proof.fast_slow_table):
        assert "LoRA, nf4, seed 0: exit status 2" in make_table({"runs": runs, "plain": []})


@pytest.mark.parametrize("words", [["--settings", "LoRA, nf5"], ["--rates", "fast"], ["--held_out", "6"]])
def test_a_wrong_word_ends_in_one_line(words, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        proof.main(["precision", str(tmp_path / "none"), "rows.jsonl", "--work", str(tmp_path), *words])
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_rows_are_split_once_and_for_all(tmp_path):
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", ROWS)
    parts = []
    for name in ("a", "b"):
        folder = proof.split_rows(argparse.Namespace(rows=file, work=tmp_path / name, held_out=6))
        parts.append([(folder / f"{split}.jsonl").read_text().splitlines() for split in ("eval", "train")])
    assert parts[0] == parts[1] and len(parts[0][0]) == 6
    assert sorted(parts[0][0] + parts[0][1]) == sorted(file.read_text().splitlines())


# ------------------------------------------------------------------------------------
# memory.py, benchmark_many.py
# ------------------------------------------------------------------------------------


def test_memory(tmp_path):
    words = ["--shapes", "tiny,tiny@48,tiny-moe", "--tokens", "32", "--out", str(tmp_path), "--", "--max_steps", "2"]
    memory.main(words)
    runs = json.loads((tmp_path / "memory.json").read_text())["results"]
    assert [(run["shape"], run["cap"]) for run in runs] == [("tiny", None), ("tiny", 48), ("tiny-moe", None)]
    for run in runs:
        assert len(run["losses"]) == 2 and all(map(math.isfinite, run["losses"]))
        # 2 layers of 4 x 64 x 64 (two of them half as wide) and 3 x 64 x 128, and embedding and head of 256 x 64
        assert 0 < run["predicted_gib"] < 0.2 and run["peak_gib"] == 0  # measured on GPUs only
    assert "| tiny | 48.0 |" in (tmp_path / "memory.md").read_text()


@pytest.mark.parametrize(
    ("owner", "name", "reason"),
    [(memory.RandomWeight, "__getitem__", "CUDA out of memory"), (Params4bit, "_quantize", "issues")],
    ids=["drawn", "quantised"],
)
def test_a_shape_that_does_not_fit_is_reported_and_the_others_go_on(owner, name, reason, tmp_path, monkeypatch):
    def out_of_memory_once(*args):
        monkeypatch.undo()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(owner, name, out_of_memory_once)
    memory.main(["--shapes", "tiny@1,tiny", "--tokens", "32", "--out", str(tmp_path), "--", "--max_steps", "1"])
    failed, trained = json.loads((tmp_path / "memory.json").read_text())["results"]
    assert reason in failed["failed"] and failed["predicted_gib"] > 0 and len(trained["losses"]) == 1
    assert f"| failed: {failed['failed']} |" in (tmp_path / "memory.md").read_text()


@pytest.mark.ci
def test_benchmark_many(models, data_dir, tmp_path, capsys):
    """Two processes against one on the CPU."""
    words = ["--model", models("llama"), "--dataset", data_dir / "support.jsonl", "--out", tmp_path, "--steps", "3"]
    words += ["--batch", "4", "--only", "ddp,device_map", "--", "--lora_r", "4", "--source_max_len", "32"]
    assert benchmark_many.main([str(word) for word in words]) == 0
    one, ddp, spread = json.loads((tmp_path / "benchmark_many.json").read_text())["runs"]
    assert [run["name"] for run in (one, ddp, spread)] == ["one GPU", "ddp", "device_map"]
    assert len(one["loss"]) == 3 and ddp["loss"] == pytest.approx(one["loss"], abs=1e-3)
    assert "--gradient_accumulation_steps 2" in " ".join(ddp["flags"])
    speeds = [run["metrics"]["train_tokens_per_second"] for run in (one, ddp)]
    table = capsys.readouterr().out
    assert f"| one GPU | {speeds[0]:.0f} | 1.000 | 0.0 | 0.00000 |" in table
    assert f"| ddp | {speeds[1]:.0f} | {speeds[1] / speeds[0]:.3f} | 0.0 | 0.000" in table


def test_benchmark_many_reports_a_strategy_that_fails_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(proof, "ROOT", tmp_path)
    (tmp_path / "qlora.py").write_text("import sys\nprint('error: no such model')\nsys.exit(2)\n")
    words = ["--model", "m", "--dataset", "d", "--only", "device_map", "--out", str(tmp_path / "out")]
    assert benchmark_many.main(words) == 1
    table = capsys.readouterr().out
    for name in "one GPU", "device_map":
        assert f"| {name} | failed: exit status 2: error: no such model |" in table


# ------------------------------------------------------------------------------------
# selftest.py
# ------------------------------------------------------------------------------------


@pytest.mark.ci
def test_the_self_test_passes_without_a_network():
    """One ticked line for each check."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(ROOT / "scripts/selftest.py"), "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    # DeepSpeed prints a greeting where it is installed
    first, *lines, last = (line for line in done.stdout.splitlines() if "real_accelerator" not in line)
    assert torch.__version__ in first and last == "all checks passed"
    for line, name in zip(lines, selftest.CHECKS, strict=True):
        assert line.startswith(f"✓ {name}")


def test_the_self_test_fails_if_nothing_is_quantised(monkeypatch, capsys):
    load_model = qlora.load_model

    def unquantised(config, model_config, folder):
        flags = ["--model_name_or_path", folder, "--bits", "32"]
        return load_model(qlora.parse_config(flags), model_config, folder)

    monkeypatch.setattr(qlora, "load_model", unquantised)
    check = "4 bit against 32 bit"
    monkeypatch.setattr(selftest, "CHECKS", {check: selftest.CHECKS[check]})
    assert selftest.check_all() == 1
    *_, line, last = capsys.readouterr().out.splitlines()
    assert line.startswith(f"✗ {check}") and "differ by 0.0e+00, expected more" in line and last == "some checks failed"


@pytest.mark.parametrize("error", [1.1, 1.0], ids=["wrong", "stock"])
def test_the_self_test_fails_if_gradients_are_wrong_or_the_fast_path_is_off(monkeypatch, tmp_path, error):
    """In place of the two runs: the stock path's gradient, and `error` times it."""
    monkeypatch.setattr(
        selftest, "run", lambda *_, fast_path=True, **flags: (error if fast_path else 1) * torch.ones(4)
    )
    with pytest.raises(AssertionError, match=r"gradients differ by (1.0e-01|0.0e\+00), expected more than 0"):
        selftest.CHECKS["fast path against stock"](tmp_path)


# ------------------------------------------------------------------------------------
# check_models.py
# ------------------------------------------------------------------------------------


def fail_to_be_made(path, model_type, masked):
    if model_type == "slow":
        time.sleep(60)
    if model_type == "fatal":
        os._exit(9)
    raise ValueError("sizes that do not fit")


def test_a_class_that_hangs_dies_or_raises_is_a_row_of_the_table(monkeypatch, tmp_path):
    monkeypatch.setattr(check_models.tiny_classes, "write_class", fail_to_be_made)
    rows = [check_models.check_in_child(3.0, False, name, 32) for name in ("slow", "fatal", "masked/odd")]
    assert [check_models.verdict(row) for row in rows] == ["hangs", "dies", "not made"]
    same = {"name": "llama", "bits": 32, "path": "fused LoRA", "note": "", "names": []}
    rows += [same | {"loss": 1e-8, "norm": 1e-7, "adapter": error} for error in (1e-6, 1e-3)]
    check_models.write_table(rows, tmp_path / "models.md")
    table = (tmp_path / "models.md").read_text()
    assert "32 bits: 1 dies, 1 same, 1 differs, 1 hangs, 1 not made" in table and "sizes that do not fit" in table


# ------------------------------------------------------------------------------------
# The command lines in the documentation
# ------------------------------------------------------------------------------------
PAGES = [(folder / "README.md").read_text(encoding="utf-8") for folder in (ROOT, RESULTS)]
COMMANDS = [
    (Path(script).name, words)
    for script, words in re.findall(r"python (scripts/\w+)\.py([^`\n]*)", "".join(PAGES))
    if re.search("proof|memory|benchmark", script)
]


def test_the_commands_of_the_results_are_found():
    assert {"proof", "memory", "benchmark", "benchmark_many"} == {script for script, _ in COMMANDS}


class Parsed(Exception):
    """Raised in place of measuring, once a command line has been parsed."""


@pytest.mark.parametrize(("script", "words"), COMMANDS)
def test_a_command_of_the_results_parses(script, words, monkeypatch):
    """Also the flags of qlora.py after --."""

    def parse(*args, parse_args=argparse.ArgumentParser.parse_args):
        parse_args(*args)
        raise Parsed

    argv = shlex.split(words)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    with pytest.raises(Parsed):
        importlib.import_module(script).main()
    monkeypatch.undo()
    qlora.parse_config(["--model_name_or_path", "m", *(argv[argv.index("--") + 1 :] if "--" in argv else [])])
