"""Several processes, as torchrun starts them, on a CPU with gloo: the same run as one process makes.

Runs are started all at once where they do not depend on each other: importing the libraries takes most of their time.
"""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT, _to_argv
from safetensors.torch import load_file

import qlora

ROWS = 23  # 19 to train: windows of 8, 8 and 3 rows, and 4 to evaluate: 2 batches of 3 and 1
# What two processes run instead of qlora.py where a machine without GPUs is to shard as GPUs do: accelerate is told
# that its CPU processes are GPUs.
AS_GPUS = """
import sys, accelerate.state as state
plain = state.PartialState.__init__
def init(self, *args, **options):
    plain(self, *args, **options)
    if self.distributed_type == state.DistributedType.MULTI_CPU:
        self.distributed_type = state.DistributedType.MULTI_GPU
state.PartialState.__init__ = init
sys.path.insert(0, {root!r})
import qlora
sys.exit(qlora.main())
"""

# What says after a run how many groups of gloo have threads left, which may abort a process as Python ends: the group
# in which all wait for the last has none, torch's own may be held by modules that libraries import late.
LEFT = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import qlora
code = qlora.main()
names = [Path(thread, "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
print(f"rank {{os.environ['RANK']}} has {{names.count('gloo_tcp_loop')}} of 2 groups", file=sys.stderr, flush=True)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def start(models, tmp_path_factory):
    """`start(processes, folder, **flags)` -> Popen of one machine's torchrun (of plain python for one process)."""
    here = tmp_path_factory.mktemp("processes")
    data = tiny.rows_to_jsonl(here / "rows.jsonl", tiny.support_rows(ROWS))
    as_gpus = here / "as_gpus.py"
    as_gpus.write_text(AS_GPUS.format(root=str(ROOT)))
    base = {
        "model_name_or_path": models("llama"), "dataset": data, "max_steps": 6, "source_max_len": 32,
        "target_max_len": 32, "lora_r": 4, "logging_steps": 1, "save_steps": 2, "disable_tqdm": True,
        "learning_rate": 1e-3, "gradient_accumulation_steps": 4, "lora_dropout": 0.0, "do_eval": True,
        "eval_dataset_size": 4, "per_device_eval_batch_size": 3,
    }  # fmt: skip
    started = []

    def begin(processes, folder, *, launcher=("--standalone",), program=ROOT / "qlora.py", command=(), **flags):
        torchrun = ["-m", "torch.distributed.run", *launcher, "--nproc_per_node", str(processes)]
        program = as_gpus if program == "as_gpus" else program
        argv = [sys.executable, *(torchrun if processes > 1 or launcher != ("--standalone",) else []), str(program)]
        argv = [*(command or argv), *_to_argv({**base, "output_dir": folder, **flags})]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        pipe = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(argv, env=env, cwd=ROOT, **pipe))
        return started[-1]

    begin.folder = here
    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()


def finish(process, code=0):
    """Its standard error."""
    _, text = process.communicate(timeout=300)
    print(text)
    assert (process.returncode == 0) == (code == 0), text
    return text


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def same(found, wanted, evaluated=True):
    """Losses, adapter and evaluation, in float32."""
    assert losses(found) == pytest.approx(losses(wanted), abs=2e-5)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (found, wanted))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] - theirs[name]).abs().max() < 1e-5 for name in ours)
    if evaluated:
        both = [json.loads((folder / "eval_results.json").read_text())["eval_loss"] for folder in (found, wanted)]
        assert both[0] == pytest.approx(both[1], abs=1e-5)


@pytest.fixture(scope="module")
def runs(start):
    """One process and two, to the end; and two that are stopped half way and go on as one."""
    here = start.folder
    questions = [
        {"subject": f"topic{i % 3}", "input": f"{i} is?\nA. 0\nB. {i}\nC. 7\nD. 9\nAnswer:", "output": "ABCD"[i % 4]}
        for i in range(7)
    ]
    (here / "mmlu").mkdir()
    tiny.rows_to_jsonl(here / "mmlu" / "zero_shot_mmlu_val.json", questions)
    after = {
        "do_predict": True, "predict_with_generate": True, "max_new_tokens": 4, "do_mmlu_eval": True,
        "mmlu_dataset": "mmlu-zs", "mmlu_dir": here / "mmlu",
    }  # fmt: skip
    left = here / "left.py"
    left.write_text(LEFT.format(root=str(ROOT)))
    one = start(1, here / "one", gradient_accumulation_steps=8, **after)
    two = start(2, here / "two", program=left, **after)
    finish(one)
    assert sorted(re.findall(r"rank (\d) has [01] of 2 groups", finish(two))) == ["0", "1"]
    subprocess.run(["mkdir", here / "fewer"], check=True)
    subprocess.run(["cp", "-r", here / "two" / "checkpoint-4", here / "fewer"], check=True)
    return here, finish(start(1, here / "fewer"))  # the run of two as it was after 4 of its 6 steps, with its flags


def test_two_processes_make_the_run_of_one(runs):
    """Every window's rows are shared out, none doubled in the epoch's last one, which has three."""
    here, _ = runs
    same(here / "two", here / "one")
    one, two = (json.loads((here / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert two["train_tokens"] == one["train_tokens"] > 0


def test_what_is_evaluated_and_predicted_is_gathered_whole(runs):
    here, _ = runs
    one, two = ((here / name / "predictions.jsonl").read_text().splitlines() for name in ("one", "two"))
    assert one == two and len(one) == 4
    metrics = [json.loads((here / name / "metrics.json").read_text()) for name in ("one", "two")]
    accuracies = [{k: v for k, v in m.items() if "mmlu_eval_accuracy" in k} for m in metrics]
    assert accuracies[0] == accuracies[1] and len(accuracies[0]) == 4
    assert metrics[0]["mmlu_loss"] == pytest.approx(metrics[1]["mmlu_loss"], abs=1e-5)


def test_files_are_written_once(runs):
    here, _ = runs
    assert sorted(p.name for p in (here / "one").iterdir()) == sorted(p.name for p in (here / "two").iterdir())


def test_a_run_goes_on_with_fewer_processes(runs):
    """The effective batch of 8 rows is the checkpoint's."""
    here, log = runs
    same(here / "fewer", here / "one")
    assert "resuming from" in log and "8 rows, as in the checkpoint" in log


def test_fsdp_shards_a_base_of_4_bits(start, runs):
    here, _ = runs
    flags = {"program": "as_gpus", "fsdp": []}
    log = finish(start(2, here / "fsdp", **flags))
    same(here / "fsdp", here / "one")
    assert "FSDP or DeepSpeed holds the weights" in log
    # tried on the weights as they are spread
    assert re.search(r"rows end to end +yes", log) and re.search(r"logits in chunks +yes", log)


def test_errors_are_said_once_and_end_all(start, tmp_path):
    rows = tiny.rows_to_jsonl(tmp_path / "bad.jsonl", [{"input": "a"}, {"input": "b", "output": None}])
    differing = tmp_path / "differing.py"
    differing.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport qlora\n"
        "sys.exit(qlora.main([*sys.argv[1:], '--learning_rate', '1e-3' if os.environ['RANK'] == '0' else '2e-3']))\n"
    )
    first = start(2, tmp_path / "a", dataset=rows)
    second = start(2, tmp_path / "b", program=differing, learning_rate=None)
    for process, wanted in (first, "field 'output' is missing"), (second, "learning_rate is 0.002, on rank 0 0.001"):
        lines = [line for line in finish(process, 2).splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and wanted in lines[0], lines


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("lost", ["second", "first"])
def test_a_machine_that_is_lost_is_named_with_the_way_on(start, tmp_path, lost):
    """Two torchrun agents, as scripts/multinode.sh starts them on two machines; one is killed, and its process.

    The first machine keeps the store where the processes would leave word: it is named by its address.
    """
    output = tmp_path / "out"
    meet = ("--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}",
            "--local_addr", "127.0.0.1")  # fmt: skip
    flags = {"max_steps": 4000, "save_steps": 20, "do_eval": False}
    pair = [start(1, output, launcher=(*meet, "--rdzv_conf", f"is_host={host}"), **flags) for host in (1, 0)]
    until((output / "checkpoint-20").is_dir)
    killed, stays = pair if lost == "first" else pair[::-1]
    for number in (killed.pid, *children(killed)):
        os.kill(number, signal.SIGKILL)
    began = time.monotonic()
    log = finish(stays, 2)
    assert time.monotonic() - began < 60
    (line,) = [line for line in log.splitlines() if line.startswith("error:")]
    said = r"rank \d of 2 was lost" if lost == "second" else r"rank (\d of 2 lost 127.0.0.1|\d of 2 was lost)"
    assert re.match(rf"error: {said}.*\. The same command goes on from .*checkpoint-\d+, on as many", line), line


def children(process):
    return [*map(int, subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split())]


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def test_ctrl_c_ends_multinode_while_it_waits_for_other_machines(tmp_path):
    """torchrun handles it itself only while it trains; bash would have what it starts in the background ignore it."""
    waiting = tmp_path / "torchrun"
    waiting.write_text(f"#!{sys.executable}\nimport time\nprint('waiting', flush=True)\ntime.sleep(60)\n")
    waiting.chmod(0o755)
    command, env = ["bash", ROOT / "scripts/multinode.sh"], os.environ | {"HEAD": "10.0.0.1", "PYTHON": str(waiting)}
    flags = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "start_new_session": True}
    flags["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a suite in the background ignores it
    with subprocess.Popen(command, env=env, **flags) as process:
        try:
            assert process.stdout.readline() == "waiting\n"
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(30) == -signal.SIGINT
        finally:
            process.terminate()


@pytest.mark.slow
def test_a_machine_that_falls_silent_is_given_up_within_a_minute(start, tmp_path):
    """Two machines as two network namespaces; the cable between them is pulled: no connection ends by itself."""
    pair = []
    for number in (1, 2):
        done = subprocess.run(["ip", "netns", "add", f"qlora{number}"], capture_output=True)
        if done.returncode:
            pytest.skip("network namespaces need root")
    try:
        for number in (1, 2):
            inside = f"ip -n qlora{number}"
            words = [f"{inside} link set lo up", f"{inside} addr add 10.77.0.{number}/24 dev qveth{number}",
                     f"{inside} link set qveth{number} up"]  # fmt: skip
            words[:0] = ["ip link add qveth1 netns qlora1 type veth peer name qveth2 netns qlora2"] * (number == 1)
            for line in words:
                subprocess.run(line.split(), check=True)
        for number in (1, 2):
            place = (f"GLOO_SOCKET_IFNAME=qveth{number}", f"LOCAL_ADDR=10.77.0.{number}", "HEAD=10.77.0.1", "GPUS=1",
                     f"PYTHON={sys.executable}")  # fmt: skip
            command = ("ip", "netns", "exec", f"qlora{number}", "env", *place, "bash", ROOT / "scripts/multinode.sh")
            flags = {"max_steps": 40000, "save_steps": 20, "save_total_limit": 2, "do_eval": False}
            pair.append(start(1, tmp_path / "out", command=command, **flags))
        until((tmp_path / "out" / "checkpoint-20").is_dir)
        subprocess.run(["ip", "-n", "qlora2", "link", "set", "qveth2", "down"], check=True)
        pulled = time.monotonic()
        for process, said in zip(pair, ("rank 1 of 2 was lost", "rank 1 of 2 lost 10.77.0.1, where"), strict=True):
            line = next(line for line in process.stderr if line.startswith("error:"))
            assert said in line and "The same command goes on from" in line
        codes = [process.wait(60 - (time.monotonic() - pulled)) for process in pair]
        assert codes == [1, -signal.SIGKILL], "torchrun on the second machine waits for the first without end"
    finally:
        for name in ("qlora1", "qlora2"):
            left = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            subprocess.run(["kill", "-KILL", *left], stderr=subprocess.DEVNULL)
            subprocess.run(["ip", "netns", "del", name])


# ------------------------------------------------------------------------------------
# In one process
# ------------------------------------------------------------------------------------


SIGNAL = "interrupted by SIGTERM"
WORDS = {  # what one rank hears of the others when a signal ends it, and whether it speaks
    "the first has ended, and torchrun ends the second": (1, {0: "no such file"}, False),
    "the second has, and it ends the first": (0, {1: "no such file"}, False),
    "the first lost the third, which says why": (0, {1: "", 2: "no such file"}, False),
    "somebody stops all": (0, {1: SIGNAL}, True),
    "somebody stops all, and the first speaks": (1, {0: SIGNAL}, False),
}


@pytest.mark.parametrize(("rank", "heard", "speaks"), WORDS.values(), ids=WORDS)
def test_of_a_signal_nobody_speaks_who_has_heard_why(monkeypatch, rank, heard, speaks):
    store = torch.distributed.HashStore()
    for other, message in heard.items():
        store.set(f"qlora/{other}", message)
    monkeypatch.setattr(qlora, "rank_and_world_size", lambda: (rank, len(heard) + 1))
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert qlora.said_once(SIGNAL, lost=False, stopped=True) == (SIGNAL if speaks else None)
    assert store.get(f"qlora/{rank}").decode() == SIGNAL
    assert qlora.said_once("no memory", lost=False) == (f"rank {rank}: no memory" if rank else "no memory")


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_a_window_is_shared_out_whole(monkeypatch, processes):
    lengths = [3, 50, 7, 7, 41, 9, 12, 30, 2, 8, 8]
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(qlora, "rank_and_world_size", lambda rank=rank: (rank, processes))
        shares.append(list(qlora.DistributedWindowSampler(torch_order(11), 8, lengths, drop_last=False)))
    assert [sorted(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == [list(range(8)), [8, 9, 10]]
    if processes == 2:
        tokens = [sum(lengths[row] for row in share[0]) for share in shares]
        assert abs(tokens[0] - tokens[1]) <= 9 + 3, "no more than the longest differ from each other"


def torch_order(rows):
    return torch.utils.data.SequentialSampler(range(rows))


@pytest.mark.parametrize(("count", "size", "processes"), [(4, 3, 2), (1, 8, 4), (17, 2, 3), (6, 2, 3)])
def test_batches_are_dealt_evenly_and_gathered_once(monkeypatch, count, size, processes):
    dealt = []
    for rank in range(processes):
        monkeypatch.setattr(qlora, "rank_and_world_size", lambda rank=rank: (rank, processes))
        dealt.append(qlora.rank_batches(count, size))
    assert len({len(batches) for batches in dealt}) == 1
    cut = [list(range(i, min(i + size, count))) for i in range(0, count, size)]
    assert all(batch in cut for batches in dealt for batch in batches)
    parts = [{number: f"row {number}" for batch in batches for number in batch} for batches in dealt]
    monkeypatch.setattr(qlora, "all_gather_object", lambda mine: parts)
    assert qlora.gather_results({}) == [f"row {number}" for number in range(count)]


def test_a_share_of_no_rows_is_one_token_that_nobody_learns():
    batch = qlora.collate_step([])
    step = batch["step"]
    assert step.supervised == 0 and step.lengths.tolist() == [1] and step.rows == []


def test_an_effective_batch_is_kept_only_with_the_same_flags(tmp_path):
    folder = Path(tmp_path, "checkpoint-1")
    folder.mkdir()
    before = {"rows": 8, "flags": [1, 4]}
    (folder / qlora.MANIFEST).write_text(json.dumps({"run": {"effective batch": before}, "files": {}}))
    args = type("Args", (), {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "world_size": 1})
    assert qlora.effective_batch(folder, args) == before
    args.gradient_accumulation_steps = 2
    assert qlora.effective_batch(folder, args) == {"rows": 2, "flags": [1, 2]}
    assert qlora.effective_batch(None, args) == {"rows": 2, "flags": [1, 2]}
