"""Several processes with DDP: the same run as one process makes, on a CPU with gloo."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import ROOT
from ranks import (
    ALL_STAGES,
    AS_GPUS,
    Start,
    assert_same_run,
    assert_same_training,
    error_of,
    finish,
    launch_command,
    losses,
    until,
)

import qlora

PIPES = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}


@pytest.fixture(scope="module")
def start(fork_server, models, tmp_path_factory):
    return Start(fork_server, tmp_path_factory.mktemp("ddp"), models("llama"))


@pytest.fixture(scope="module")
def runs(start):
    """`one` and `two` processes to the end; `fewer`: `two` as it was after 4 of 6 steps, finished by one process."""
    here = start.folder
    running = [start(number, here / name, **ALL_STAGES) for number, name in ((1, "one"), (2, "two"))]
    for processes in running:
        finish(processes)
    shutil.copytree(here / "two" / "checkpoint-4", here / "fewer" / "checkpoint-4")
    (here / "fewer.txt").write_text(finish(start(1, here / "fewer", gradient_accumulation_steps=4, **ALL_STAGES)))
    return here


def test_two_processes_repeat_the_run_of_one(runs):
    """They share the rows of every step, also the three of an epoch's last, and gather what they evaluate."""
    assert_same_run(runs / "two", runs / "one")
    one, two = (json.loads((runs / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert two["train_tokens"] == one["train_tokens"] > 0
    assert sorted(p.name for p in (runs / "one").iterdir()) == sorted(p.name for p in (runs / "two").iterdir())


def test_one_process_resumes_the_run_of_two(runs):
    """With the flags of two, the effective batch is still the checkpoint's 8 rows."""
    assert_same_run(runs / "fewer", runs / "one")
    log = (runs / "fewer.txt").read_text()
    assert "resuming from" in log and "8 rows, as in the checkpoint" in log


def test_fsdp_shards_a_4_bit_base(start, runs):
    log = finish(start(2, runs / "fsdp", before=AS_GPUS, fsdp=[], **ALL_STAGES))
    assert_same_run(runs / "fsdp", runs / "one")
    assert "fused LoRA, padding-free rows" in log, "tried once the weights are sharded"


# Each process saves its own trained values beside the folder of the run.
SAVE_TRAINED = """
import os, torch
from transformers import Trainer
train = Trainer.train
def train_and_save(self, *args, **options):
    output = train(self, *args, **options)
    trained = {{name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}}
    torch.save(trained, f"{folder}/trained." + os.environ["RANK"])
    return output
Trainer.train = train_and_save
"""


def test_three_processes_that_divide_nothing(start, tmp_path):
    """19 rows in steps of 9: in the last, of one row, two processes have none. 4 rows are evaluated in 2 batches.

    The trained values of the processes are the same, bit for bit.
    """
    before = SAVE_TRAINED.format(folder=tmp_path)
    flags = {"bits": 16, "optim": "adamw_torch", **ALL_STAGES}
    running = [
        start(3, tmp_path / "three", gradient_accumulation_steps=3, before=before, **flags),
        start(1, tmp_path / "one", gradient_accumulation_steps=9, **flags),
    ]
    for processes in running:
        finish(processes)
    assert_same_run(tmp_path / "three", tmp_path / "one")
    first, *others = (torch.load(tmp_path / f"trained.{rank}") for rank in range(3))
    assert len(first) == 28 and any(tensor.any() for name, tensor in first.items() if "lora_B" in name)
    for other in others:
        assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)


# ------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------

# Rank 1 gets another learning rate.
OTHER_FLAG = """
import os, qlora
parse = qlora.parse_config
other = ["--learning_rate", "2e-3"] if os.environ["RANK"] == "1" else []
qlora.parse_config = lambda argv: parse([*argv, *other])
"""
# Rank 1 finds other data under the same relative path, as on another machine.
OTHER_FOLDER = "import os; os.chdir(os.path.join({folder!r}, os.environ['RANK']))"


def test_errors_that_all_processes_meet_end_all(start, tmp_path):
    bad = tiny.rows_to_jsonl(tmp_path / "bad.jsonl", [{"input": "a"}, {"input": "b", "output": None}])
    for rank in range(2):
        rows = tiny.support_rows(23)
        rows[20] |= {"output": "Well. " * rank + rows[20]["output"]}
        (tmp_path / str(rank)).mkdir()
        tiny.rows_to_jsonl(tmp_path / str(rank) / "rows.jsonl", rows)
    other_folder = OTHER_FOLDER.format(folder=str(tmp_path))
    cases = {
        "bad row": (start(2, tmp_path / "a", dataset=bad), "field 'output' is missing"),
        "flags": (start(2, tmp_path / "b", before=OTHER_FLAG), "learning_rate is 0.002, on rank 0 0.001"),
        "data": (start(2, tmp_path / "c", before=other_folder, dataset="rows.jsonl"), "the encoded train rows is"),
    }
    for name, (processes, expected) in cases.items():
        assert expected in error_of(finish(processes, 2)), name
    assert not list(tmp_path.glob("*/checkpoint-*"))


# Something that happens to rank 1 alone in its first micro-batch.
ON_RANK_1 = """
import os, torch, qlora
loss, step = qlora.summed_loss, qlora.QLoRATrainer._micro_batch_losses
def first_step(*args):
    qlora.QLoRATrainer._micro_batch_losses = step
    qlora.summed_loss = first_loss if os.environ["RANK"] == "1" else loss
    return step(*args)
def first_loss(*args):
    qlora.summed_loss = loss
    return alone(*args)
qlora.QLoRATrainer._micro_batch_losses = first_step
"""
OUT_OF_MEMORY = f"""{ON_RANK_1}
def alone(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")
"""
SKIP_MLP = f"""{ON_RANK_1}
def alone(model, *rest):
    mlp = model.get_base_model().model.layers[1].mlp
    forward, mlp.forward = mlp.forward, lambda x: x
    value = loss(model, *rest)
    mlp.forward = forward
    return value
"""
NAN = f"""{ON_RANK_1}
def alone(model, *rest):
    return loss(model, *rest) * float("nan")
"""


def test_what_happens_to_one_process_leaves_none_waiting(start, tmp_path):
    """Out of memory: smaller micro-batches. A layer without gradient, as an expert without tokens: training continues.

    A loss that is not finite: the run stops.
    """
    flags = {"bits": 16, "optim": "adamw_torch", "recompute_layers": "none"}
    running = {
        "one": start(1, tmp_path / "one", **flags),
        "memory": start(2, tmp_path / "memory", before=OUT_OF_MEMORY, **flags),
        "skip": start(2, tmp_path / "skip", before=SKIP_MLP, **flags),
        "nan": start(2, tmp_path / "nan", before=NAN, **flags),
    }
    for name in "one", "memory", "skip":
        finish(running[name])
    assert_same_training(tmp_path / "memory", tmp_path / "one")
    message = error_of(finish(running["nan"], 2))
    assert re.match(r"step 1: the loss is not finite, on rows \S+rows.jsonl:\d+", message)
    assert not list((tmp_path / "nan").glob("checkpoint-*"))


def test_a_killed_process_ends_the_others(start, tmp_path):
    ranks = start(2, tmp_path / "out", max_steps=4000, save_steps=20, do_eval=False)
    until((tmp_path / "out" / "checkpoint-20").is_dir)
    ranks[1].kill(signal.SIGKILL)
    assert ranks[0].wait(60) == 2
    *_, last = (line for line in ranks[0].text().splitlines() if not line.startswith("{"))  # the Trainer's metrics
    assert last == "another rank of this run has exited; the same command goes on from what is saved"


# ------------------------------------------------------------------------------------
# torchrun
# ------------------------------------------------------------------------------------

# A file that torchrun starts instead of qlora.py: rank 1 fails at the first loss.
FAILS_ON_RANK_1 = """
import os, sys
sys.path.insert(0, {root!r})
import qlora
if os.environ["RANK"] == "1":
    def fail(*_, **__):
        raise qlora.ConfigError("the disk of this machine is gone")
    qlora.summed_loss = fail
sys.exit(qlora.main())
"""


@pytest.mark.ci
def test_torchrun_saves_at_sigterm_and_ends_with_the_first_error(start, tmp_path):
    """SIGTERM to torchrun, and to one of two processes without it; in both cases the rerun is exact.

    torchrun itself exits with 1 then, as the README says. One process continues what two began: the effective batch
    stays, and so do the losses.
    """
    flags = {"max_steps": 40, "save_steps": 5, "save_total_limit": 2, "do_eval": False, "bits": 16}
    flags |= {"optim": "adamw_torch", "gradient_accumulation_steps": 4}
    program = tmp_path / "fails.py"
    program.write_text(FAILS_ON_RANK_1.format(root=str(ROOT)))
    launcher = subprocess.Popen([*launch_command(2), *start.argv(2, tmp_path / "launcher", **flags)], **PIPES)
    failing = launch_command(2, str(program))
    failing = subprocess.Popen([*failing, *start.argv(2, tmp_path / "failing", **flags)], **PIPES)
    try:
        until((tmp_path / "launcher" / "checkpoint-5").is_dir)
        launcher.terminate()
        ranks = start(2, tmp_path / "rank", **flags)
        until((tmp_path / "rank" / "checkpoint-5").is_dir)
        ranks[1].kill(signal.SIGTERM)
        logs = {"launcher": launcher.communicate(timeout=120)[1], "rank": finish(ranks, 143)}
        failed = failing.communicate(timeout=120)[1]
    finally:
        launcher.kill()
        failing.kill()
    assert launcher.returncode == 1
    assert failing.returncode == 1 and "error: rank 1: the disk of this machine is gone" in re.sub(
        "rank 1: error:", "error: rank 1:", failed
    )
    for name, log in logs.items():
        (step,) = re.findall(
            r"stopped by SIGTERM at step (\d+), saved; the same command goes on from what is saved", log
        )
        newest = qlora.find_last_checkpoint(tmp_path / name)
        assert qlora.checkpoint_step(newest) == int(step) < 40 and "error:" not in log
        assert {path.name for path in newest.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
        assert not (tmp_path / name / "completed").exists()
    running = [start(2, tmp_path / "rank", **flags), start(1, tmp_path / "launcher", **flags)]
    running += [start(1, tmp_path / "whole", **flags | {"gradient_accumulation_steps": 8})]
    for processes in running:
        finish(processes)
    for name in logs:
        assert_same_training(tmp_path / name, tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 40


def test_ctrl_c_ends_multinode_while_it_waits_for_other_machines(tmp_path):
    """torchrun handles it itself only during training, and bash makes background commands ignore it."""
    waiting = tmp_path / "torchrun"
    waiting.write_text(f"#!{sys.executable}\nimport time\nprint('waiting', flush=True)\ntime.sleep(60)\n")
    waiting.chmod(0o755)
    command, env = ["bash", ROOT / "scripts/multinode.sh"], os.environ | {"HEAD": "10.0.0.1", "PYTHON": str(waiting)}
    flags = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "start_new_session": True}
    # a test suite that runs in the background itself ignores it
    flags["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, env=env, **flags) as process:
        try:
            assert process.stdout.readline() == "waiting\n"
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(30) == -signal.SIGINT
        finally:
            process.terminate()


# ------------------------------------------------------------------------------------
# In one process
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_every_row_of_a_step_goes_to_one_process(monkeypatch, processes):
    lengths = [3, 50, 7, 7, 41, 9, 12, 30, 2, 8, 8]
    options = {"train_sampling_strategy": "sequential", "dataloader_drop_last": False, "seed": 0, "data_seed": None}
    shares, args, state = [], SimpleNamespace(**options), SimpleNamespace(global_step=0)
    for rank in range(processes):
        monkeypatch.setattr(qlora, "rank_and_world_size", lambda rank=rank: (rank, processes))
        shares.append(list(qlora.DistributedWindowSampler(lengths, 8, args, lambda: state)))
    assert [sorted(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == [list(range(8)), [8, 9, 10]]
    if processes == 2:
        tokens = [sum(lengths[row] for row in share[0]) for share in shares]
        assert abs(tokens[0] - tokens[1]) <= 9 + 3, "shares differ by no more than the longest row"


@pytest.mark.parametrize(("count", "size", "processes"), [(4, 3, 2), (1, 8, 4), (17, 2, 3), (6, 2, 3)])
def test_evaluation_batches_are_dealt_evenly_and_gathered_once(monkeypatch, count, size, processes):
    cut = [list(range(i, min(i + size, count))) for i in range(0, count, size)]
    parts: list[dict[int, list[int]]] = []  # what each rank brings
    monkeypatch.setattr(qlora, "all_gather_object", lambda mine: parts.append(mine) or parts)
    trainer = SimpleNamespace(
        unwrapped=torch.nn.Identity(),
        compute_loss_context_manager=contextlib.nullcontext,
        args=SimpleNamespace(per_device_eval_batch_size=size),
        accelerator=SimpleNamespace(is_main_process=False),
    )
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(qlora, "rank_and_world_size", lambda rank=rank: (rank, processes))
        shares.append([])
        gathered = qlora.run_batches(trainer, count, lambda numbers: shares[-1].append(numbers) or numbers, "Dealing")
    assert len({len(batches) for batches in shares}) == 1
    assert all(batch in cut for batches in shares for batch in batches)
    assert gathered == cut


def test_a_share_of_no_rows_is_one_token_that_nobody_learns():
    batch = qlora.collate_step([])
    step = batch["step"]
    assert step.supervised == 0 and step.lengths.tolist() == [1] and step.rows == []


def test_the_effective_batch_is_the_checkpoints_only_with_the_same_flags(tmp_path):
    folder = Path(tmp_path, "checkpoint-1")
    folder.mkdir()
    before = {"rows": 8, "flags": [1, 4]}
    (folder / qlora.MANIFEST).write_text(json.dumps({"run": {"effective batch": before}, "files": {}}))
    args = type("Args", (), {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "world_size": 1})
    assert qlora.effective_batch(folder, args) == before
    args.gradient_accumulation_steps = 2
    assert qlora.effective_batch(folder, args) == {"rows": 2, "flags": [1, 2]}
    assert qlora.effective_batch(None, args) == {"rows": 2, "flags": [1, 2]}
    args.world_size = 4
    assert qlora.effective_batch(folder, args) == {"rows": 8, "flags": [1, 2]}
