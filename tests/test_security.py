"""Safe by default: no network, no pickles, no secrets in files, nothing written elsewhere."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
import torch
from conftest import extra
from huggingface_hub import constants
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
UP = "../../evil"
EVIL_ROWS = [
    *(
        {"input": f"Order {n}?", "output": "It is on its way.", "id": UP, "category": UP, "source": UP}
        for n in range(9)
    ),
    {"input": "Order 10?", "output": "", "id": UP, "category": UP, "source": UP},  # goes to rejected.jsonl
]


def flags(**given) -> list[str]:
    """Of a short run, as words."""
    small = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "source_max_len": 32,
        "target_max_len": 32,
        "lora_r": 4,
        "learning_rate": 1e-2,
        "save_steps": 1,
    }
    return [str(word) for name, value in (small | given).items() for word in (f"--{name}", value)]


# ------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------

WATCHED = """
import json, os, sys
assert "HF_HUB_OFFLINE" not in os.environ
seen = []
loopback = ("127.0.0.1", "::1", "localhost")

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"):
        place = args[0] if event == "socket.getaddrinfo" else args[-1]
        host = place[0] if isinstance(place, tuple) else place
        if host not in (*loopback, None):
            seen.append([event, str(place)])

sys.addaudithook(watch)
sys.path[:0] = [{root!r}, {root!r} + "/examples"]
import qlora
codes = [qlora.main(argv) for argv in json.loads(sys.argv[1])]
{more}
during = len(seen)
from huggingface_hub import HfApi
try:
    HfApi().model_info("some/model", timeout=3)
except Exception:
    pass
print("RESULT " + json.dumps([codes, seen[:during], len(seen) - during]))
"""


def watched(tmp_path: Path, runs: list[list[str]], more: str = "", cut: bool = True) -> tuple[list[int], list, int]:
    """Exit codes of runs, the addresses they asked for, and how many a call of the hub asked for afterwards.

    In a process of its own, without HF_HUB_OFFLINE and, if `cut` and where the system allows it, without a network.
    """
    home = {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "home/hf"), "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | home
    command = [sys.executable, "-c", WATCHED.format(root=str(ROOT), more=textwrap.dedent(more)), json.dumps(runs)]
    alone = ["unshare", "--map-root-user", "--net"]
    if cut and shutil.which(alone[0]) and subprocess.run([*alone, "true"], check=False).returncode == 0:
        command = [*alone, *command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert "RESULT " in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("RESULT ")[2])


def test_local_run_uses_no_network_and_writes_only_to_its_folders(models, tmp_path):
    """Everything that a run can do: train, evaluate, ask, predict, merge; and from a .gguf file."""
    rows = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", EVIL_ROWS)
    question = {"subject": UP, "input": "1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", "output": "B"}
    (tmp_path / "mmlu").mkdir()
    tiny.rows_to_jsonl(tmp_path / "mmlu/five_shot_mmlu_val.json", [question])
    told = tmp_path / "a/b/out", tmp_path / "a/b/merged", tmp_path / "a/b/gguf", tmp_path / "home"
    before = set(tmp_path.rglob("*"))
    use = {"do_eval": True, "do_predict": True, "predict_with_generate": True, "max_new_tokens": 3}
    use |= {"do_mmlu_eval": True, "mmlu_dir": tmp_path / "mmlu", "on_bad_rows": "skip", "dataset": rows}
    whole = flags(model_name_or_path=models("llama"), output_dir=told[0], merged_output_dir=told[1], **use)
    gguf = flags(model_name_or_path=models("gguf"), output_dir=told[2], dataset=rows, on_bad_rows="skip")
    codes, seen, control = watched(tmp_path, [whole, gguf])
    assert codes == [0, 0]
    assert seen == []
    assert control > 0, "the watch itself sees nothing"
    rejected = [json.loads(line) for line in (told[0] / "rejected.jsonl").read_text().splitlines()]
    assert [row["row"]["id"] for row in rejected] == [UP]
    parents = set(itertools.chain(*(place.parents for place in told)))
    new = set(tmp_path.rglob("*")) - before - parents - set(told)
    assert [path for path in new if not set(told) & set(path.parents)] == []
    assert not list(tmp_path.parent.rglob("evil*"))


@pytest.mark.ci
def test_chat_page_uses_no_network(models, tmp_path):
    extra("gradio")
    more = f"""
    import threading, gradio, chat_gradio
    gradio.ChatInterface.launch, launch = (
        lambda page, **options: launch(page, **options, prevent_thread_lock=True), gradio.ChatInterface.launch)
    chat_gradio.main([{str(models("llama"))!r}])
    import time; time.sleep(2)  # what it does in other threads
    """
    codes, seen, control = watched(tmp_path, [], more, cut=False)  # the page is served to this machine
    assert (codes, seen) == ([], []) and control > 0


def test_a_model_in_the_hubs_cache_needs_no_network(run_qlora, models):
    """HF_HUB_OFFLINE is set for all tests; this one names a hub id."""
    repo, commit = Path(constants.HF_HUB_CACHE, "models--some--llama"), "0" * 40
    shutil.copytree(models("llama"), repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    run = run_qlora(model_name_or_path="some/llama", max_steps=1, do_eval=True, merged_output_dir="merged-of-cache")
    shutil.rmtree("merged-of-cache", ignore_errors=True)
    assert run.code == 0, run.stderr
    assert run.json("adapter_config.json")["base_model_name_or_path"] == "some/llama"


# ------------------------------------------------------------------------------------
# Pickles
# ------------------------------------------------------------------------------------


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def payload(tmp_path):
    """`payload(path, **tensors)`: a file of torch.save that runs code; `payload.ran()` whether it did."""

    def write(path: Path, **content) -> None:
        marker.unlink(missing_ok=True)
        torch.save({**content, "code": Payload(marker)}, path)
        torch.load(path, weights_only=False)
        assert marker.exists(), "the payload works"
        marker.unlink()

    marker = tmp_path / "payload-ran"
    write.ran = marker.exists
    return write


@pytest.fixture
def refused(payload):
    """`refused(run, *words)`: exit 2, one line with these words, and no code ran."""

    def check(run, *words: str) -> None:
        assert not payload.ran()
        error = run.stderr.splitlines()[-1]
        assert run.code == 2 and error.startswith("error: ") and "Traceback" not in run.stderr, run.stderr
        assert all(word in error for word in words), error
        assert "weights_only" not in error  # torch's advice is to load it all the same

    return check


STATE = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]


@pytest.mark.parametrize("name", STATE)
def test_code_in_a_checkpoints_state_does_not_run(run_qlora, payload, refused, tmp_path, name):
    first = run_qlora(max_steps=2, output_dir=tmp_path / "first")
    checkpoint = first.output_dir / "checkpoint-2"
    for manifest in checkpoint.glob("checkpoint.json"):  # as another program's, which has none
        manifest.unlink()
    payload(checkpoint / name, **torch.load(checkpoint / name, weights_only=False))
    refused(run_qlora(max_steps=4, resume_from_checkpoint=checkpoint), str(checkpoint))


def test_scaler_state_is_read_as_tensors(run_qlora, payload, refused, tmp_path, monkeypatch):
    """Only a GPU has one; here the Trainer is made to believe that it does."""
    import qlora

    first = run_qlora(max_steps=2, output_dir=tmp_path / "first")
    checkpoint = first.output_dir / "checkpoint-2"
    for manifest in checkpoint.glob("checkpoint.json"):
        manifest.unlink()
    payload(checkpoint / "scaler.pt")
    load = qlora.QLoRATrainer._load_scaler

    def with_scaler(self, folder):
        monkeypatch.setattr(self.accelerator, "scaler", torch.amp.GradScaler("cpu"))
        load(self, folder)

    monkeypatch.setattr(qlora.QLoRATrainer, "_load_scaler", with_scaler)
    refused(run_qlora(max_steps=4, resume_from_checkpoint=checkpoint), str(checkpoint))


def test_resume_reads_every_pickle_as_tensors(run_qlora, tmp_path, monkeypatch):
    ways, load = [], torch.load

    def spy(*args, **options):
        ways.append(options.get("weights_only"))
        return load(*args, **options)

    run_qlora(max_steps=2)
    (tmp_path / "out/completed").unlink()
    monkeypatch.setattr(torch, "load", spy)
    assert run_qlora(max_steps=4).code == 0
    assert len(ways) >= len(STATE) and set(ways) == {True}


def to_pickle(folder: Path, name: str, pickled: str) -> dict[str, torch.Tensor]:
    """Replace a safetensors file by what torch.save makes of its weights."""
    weights = load_file(folder / name)
    (folder / name).unlink()
    torch.save(weights, folder / pickled)
    return weights


def test_a_base_in_a_pickle_is_read_as_tensors(run_qlora, models, payload, refused, tmp_path):
    base = shutil.copytree(models("llama"), tmp_path / "bin")
    weights = to_pickle(base, "model.safetensors", "pytorch_model.bin")
    run = run_qlora(model_name_or_path=base, max_steps=1)
    plain = run_qlora(max_steps=1, output_dir=tmp_path / "plain")
    assert run.code == 0
    one, other = (load_file(run.output_dir / "adapter_model.safetensors") for run in (run, plain))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    payload(base / "pytorch_model.bin", **weights)
    refused(
        run_qlora(model_name_or_path=base, max_steps=1, output_dir=tmp_path / "evil"), str(base), "more than tensors"
    )


def test_safetensors_are_taken_where_both_lie(run_qlora, models, payload, tmp_path):
    shutil.copytree(models("llama"), tmp_path / "both")
    payload(tmp_path / "both/pytorch_model.bin")
    assert run_qlora(model_name_or_path=tmp_path / "both", max_steps=1).code == 0
    assert not payload.ran()


@pytest.mark.parametrize("resume", [False, True], ids=["adapter", "checkpoint of the original"])
def test_an_adapter_in_a_pickle_is_read_as_tensors(run_qlora, payload, refused, tmp_path, resume):
    adapter = run_qlora(max_steps=2, output_dir=tmp_path / "first").output_dir / "checkpoint-2"
    flags = {"resume_from_checkpoint" if resume else "adapter_name_or_path": adapter, "max_steps": 4}
    (adapter / "checkpoint.json").unlink()  # as another program's, which has none
    if resume:  # where the original wrote it
        (adapter / "adapter_model").mkdir()
        for file in adapter.glob("adapter_*.*"):
            shutil.move(file, adapter / "adapter_model")
        adapter /= "adapter_model"
    weights = to_pickle(adapter, "adapter_model.safetensors", "adapter_model.bin")
    assert run_qlora(**flags).code == 0
    payload(adapter / "adapter_model.bin", **weights)
    refused(run_qlora(**flags, output_dir=tmp_path / "evil"), str(adapter), "more than tensors")


def test_a_full_checkpoint_in_a_pickle_is_read_as_tensors(run_qlora, payload, refused, tmp_path):
    full = {"full_finetune": True, "bits": 32, "lora_r": None, "optim": "sgd"}
    checkpoint = run_qlora(**full, max_steps=2, output_dir=tmp_path / "first").output_dir / "checkpoint-2"
    (checkpoint / "checkpoint.json").unlink()
    payload(checkpoint / "pytorch_model.bin", **to_pickle(checkpoint, "model.safetensors", "pytorch_model.bin"))
    refused(run_qlora(**full, max_steps=4, resume_from_checkpoint=checkpoint), str(checkpoint), "more than tensors")


# ------------------------------------------------------------------------------------
# Secrets
# ------------------------------------------------------------------------------------

TOKEN = "hf_PlantedTokenPlantedToken"
KEYS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY", "MLFLOW_TRACKING_PASSWORD")


def holders(folder: Path, secret: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.parametrize(("name", "tracker"), [("hub_token", "tensorboard"), ("push_to_hub_token", "none")])
def test_no_token_of_flags_or_environment_is_in_a_file_or_the_log(run_qlora, tmp_path, monkeypatch, name, tracker):
    if tracker != "none":
        extra(tracker)
    for key in KEYS:
        monkeypatch.setenv(key, TOKEN)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "out/tensorboard"))
    use = {"do_eval": True, "do_predict": True, "predict_with_generate": True, "max_new_tokens": 2}
    secret = {name: TOKEN, "report_to": tracker, "use_auth_token": True}
    run = run_qlora(**use, **secret, merged_output_dir=tmp_path / "merged")
    assert run.code == 0
    assert {"run.json", "README.md", "trainer_state.json", "predictions.jsonl"} <= run.files()
    assert tracker == "none" or any(tracker in file for file in run.files())
    assert holders(tmp_path, TOKEN) == [] and TOKEN not in run.stdout + run.stderr
    assert holders(tmp_path, "paged_adamw_32bit"), "the search finds nothing"


def repository_made(trainer, **options):
    """Instead of asking the hub for one."""
    trainer.hub_model_id, trainer.push_in_progress = "a/b", None


def test_what_is_pushed_is_the_final_adapter_and_no_token(run_qlora, tmp_path, monkeypatch):
    """The Trainer would upload the whole folder, with its arguments as a pickle, the token in them."""
    import qlora

    pushed = []
    monkeypatch.setattr(qlora.QLoRATrainer, "init_hf_repo", repository_made)
    monkeypatch.setattr("huggingface_hub.whoami", lambda token: {"name": "a"})
    monkeypatch.setattr(qlora, "upload_folder", lambda **how: pushed.append(how), raising=False)
    out = tmp_path / "out"
    run = run_qlora(push_to_hub=True, hub_token=TOKEN, report_to="none")
    assert run.code == 0 and holders(tmp_path, TOKEN) == [] and TOKEN not in run.stderr
    (how,) = pushed
    assert (how["repo_id"], how["folder_path"], how["token"]) == ("a/b", out, TOKEN)
    files = {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json", "tokenizer_config.json"}
    assert files <= set(how["allow_patterns"]) and all((out / name).is_file() for name in how["allow_patterns"])
    assert not {"run.json", "trainer_state.json", "completed"} & set(how["allow_patterns"])


def test_a_push_that_fails_leaves_a_completed_run(run_qlora, tmp_path, monkeypatch):
    import qlora

    monkeypatch.setattr(qlora.QLoRATrainer, "init_hf_repo", repository_made)
    monkeypatch.setattr("huggingface_hub.whoami", lambda token: {"name": "a"})
    run = run_qlora(push_to_hub=True, max_steps=1)  # there is no network
    assert run.code == 2 and run.stderr.splitlines()[-1].startswith("error: --push_to_hub: all is saved here")
    assert (tmp_path / "out/completed").is_file() and "Traceback" not in run.stderr


@pytest.mark.parametrize("argv", ["--use_auth_token {}", "--use_auth {}", "--hub_token a {}", "--hub_tokn {}", "{}"])
def test_a_token_in_the_wrong_place_is_not_repeated(capsys, argv):
    import qlora

    assert qlora.main(argv.format(TOKEN).split()) == 2
    assert TOKEN not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dataset", "model_name_or_path", "mmlu_dir", "adapter_name_or_path"])
def test_a_password_in_a_url_is_refused(run_qlora, tmp_path, name):
    run = run_qlora(**{name: "https://me:Planted@example.org/x"})
    assert run.code == 2 and f"--{name}" in run.stderr and "Planted" not in run.stderr
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o027, 0o002], ids=oct)
def test_permissions_follow_the_umask(run_qlora, tmp_path, mask):
    bad = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", EVIL_ROWS)
    use = {"do_eval": True, "do_predict": True, "predict_with_generate": True, "max_new_tokens": 2}
    before = os.umask(mask)
    try:
        run = run_qlora(dataset=bad, on_bad_rows="skip", **use, merged_output_dir=tmp_path / "merged")
    finally:
        os.umask(before)
    assert run.code == 0
    written = [place for top in ("out", "merged") for place in (tmp_path / top, *(tmp_path / top).rglob("*"))]
    assert len(written) > 30
    modes = {str(path.relative_to(tmp_path)): oct(path.stat().st_mode & 0o777) for path in written}
    expected = {False: oct(0o666 & ~mask), True: oct(0o777 & ~mask)}
    assert modes == {str(path.relative_to(tmp_path)): expected[path.is_dir()] for path in written}
