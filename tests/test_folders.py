"""Where a run writes: working_dir, output_dir, final_output_dir; and the folder that a full fine-tune leaves."""

import fcntl
import json
import shutil
import signal
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import qlora

FINAL = {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json", "tokenizer_config.json"}
PREDICT = {"do_predict": True, "predict_with_generate": True, "max_new_tokens": 2, "max_eval_samples": 2}
FULL = {"full_finetune": True, "bits": 16, "lora_r": None, "learning_rate": 1e-2, "max_shard_size": "100KB"}


class Killed(BaseException):
    """What no handler of the program sees."""


class StopAt(TrainerCallback):
    """SIGTERM in the middle of a run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        """Before step `step` begins."""
        if state.global_step == self.step - 1:
            signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def stopped(run_qlora, monkeypatch):
    """`stopped(3, **flags)`: a run that SIGTERM stopped after step 3."""

    def run(step, **flags):
        with monkeypatch.context() as patch:
            patch.setattr(qlora, "build_callbacks", lambda stop, config: [stop, StopAt(step)])
            result = run_qlora(**flags)
        assert result.code == 143
        return result

    return run


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one, other) -> bool:
    a, b = weights(one), weights(other)
    return bool(a) and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("final_flag", ["output_dir", "final_output_dir"])
def test_working_and_final_folders_are_separate(run_qlora, tmp_path, final_flag):
    work, final = tmp_path / "work", tmp_path / "final"
    flags = (
        {"output_dir": final, "working_dir": work}
        if final_flag == "output_dir"
        else {
            "output_dir": work,
            "final_output_dir": final,
        }
    )
    run = run_qlora(**flags, **PREDICT, do_eval=True)
    assert run.code == 0
    assert names(final) == FINAL
    assert names(work) == {
        *("checkpoint-2", "checkpoint-4", "trainer_state.json", "run.json", "metrics.json", "all_results.json"),
        *("train_results.json", "eval_results.json", "predict_results.json", "predictions.jsonl", "loss.png"),
        "completed",
    }
    flags = json.loads((work / "run.json").read_text())["flags"]
    assert flags["output_dir"] == str(final if final_flag == "output_dir" else work)
    assert "(../work/loss.png)" in (final / "README.md").read_text()


def test_resume_completed_and_prediction_with_a_working_dir(run_qlora, stopped, tmp_path, data_dir):
    straight = run_qlora(output_dir=tmp_path / "straight", learning_rate=1e-2)
    flags = {"working_dir": tmp_path / "work", "learning_rate": 1e-2}
    stopped(3, **flags)
    assert not (tmp_path / "out").exists() and (tmp_path / "work" / "checkpoint-3").is_dir()
    resumed = run_qlora(**flags)
    assert f"resuming from {tmp_path / 'work' / 'checkpoint-3'}" in resumed.stderr
    assert same(tmp_path / "out", straight.output_dir)
    assert "used, not trained again" in run_qlora(**flags).stderr
    again = run_qlora(**flags, **PREDICT, do_train=False)
    assert f"evaluating {tmp_path / 'out'}" in again.stderr
    assert len((tmp_path / "work" / "predictions.jsonl").read_text().splitlines()) == 2
    other = run_qlora(**flags, dataset=data_dir / "alpaca.jsonl")
    assert other.code == 2 and "belongs to another run" in other.stderr
    more = run_qlora(**{**flags, "max_steps": 5})
    assert more.code == 0 and not same(tmp_path / "out", straight.output_dir)


def test_overwriting_clears_both_folders(run_qlora, tmp_path):
    flags = {"working_dir": tmp_path / "work", "max_steps": 2}
    run_qlora(**flags)
    (tmp_path / "out" / "mine.txt").write_text("mine")
    run = run_qlora(**flags, full_finetune=True, bits=16, overwrite_output_dir=True)
    assert run.code == 0
    assert not {"adapter_model.safetensors", "adapter_config.json"} & names(tmp_path / "out")
    assert {"model.safetensors", "mine.txt"} <= names(tmp_path / "out")


@pytest.mark.parametrize("flag", ["working_dir", "final_output_dir"])
def test_uncreatable_folder_is_an_error_before_loading(run_qlora, tmp_path, monkeypatch, flag):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(qlora, "load_model", None)
    run = run_qlora(**{flag: tmp_path / "file" / "folder"})
    assert run.code == 2 and run.stderr.splitlines()[-1].startswith("error: ") and "file" in run.stderr


@pytest.mark.parametrize("flag", ["output_dir", "working_dir", "final_output_dir", "merged_output_dir"])
@pytest.mark.parametrize("below", [False, True])
def test_an_output_folder_that_is_a_file_is_one_line_at_once(run_qlora, tmp_path, monkeypatch, flag, below):
    file = tmp_path / "taken"
    file.write_text("mine")
    monkeypatch.setattr(qlora, "load_run", None)
    run = run_qlora(**{flag: file / "folder" if below else file})
    folder = f"{file}/folder" if below else file
    assert run.code == 2 and run.stderr.splitlines()[-1] == f"error: --{flag} {folder}: {file} is a file; name a folder"
    assert file.read_text() == "mine"


# ------------------------------------------------------------------------------------
# The base and the adapter to start from
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["model_name_or_path", "adapter_name_or_path"])
@pytest.mark.parametrize("name", ["/no/such", "./no", "no/such/model", "../no", "~me/no"])
def test_a_path_that_does_not_exist_is_named_as_such(run_qlora, monkeypatch, flag, name):
    monkeypatch.setattr(qlora, "load_base", None)
    run = run_qlora(**{flag: name})
    assert run.code == 2 and run.stderr.splitlines()[-1] == f"error: --{flag} {name}: no such folder or file"


def test_an_adapter_as_the_base_names_its_base(run_qlora, models, tmp_path):
    adapter = run_qlora(max_steps=1).output_dir
    for folder in (adapter, adapter / "checkpoint-1"):
        run = run_qlora(model_name_or_path=folder, output_dir=tmp_path / "second")
        (line,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
        assert run.code == 2 and line.startswith(
            f"error: --model_name_or_path {folder}: an adapter of {models('llama')};"
        )
        assert "--adapter_name_or_path" in line


@pytest.fixture
def no_network(monkeypatch):
    """The hub cannot be reached. Returns how often it was asked."""
    asked = []

    def refuse(*args, **options):
        asked.append(args)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.get_session(), "head", refuse)
    return asked


def test_a_hub_id_without_a_connection_is_one_line_at_once(run_qlora, no_network):
    run = run_qlora(model_name_or_path="some/llama")
    lines = [line for line in run.stderr.splitlines() if "llama" in line]
    assert run.code == 2 and len(no_network) == 1
    where = "no such folder, not in the cache, and no connection: Name or service not known"
    assert lines == [f"error: --model_name_or_path some/llama: {where}"]


def test_a_cached_hub_id_needs_no_connection(run_qlora, no_network, models, tmp_path):
    cache = tmp_path / "cache/models--some--llama"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("abc")
    shutil.copytree(models("llama"), cache / "snapshots/abc")
    run = run_qlora(model_name_or_path="some/llama", cache_dir=tmp_path / "cache", max_steps=1)
    assert run.code == 0 and len(no_network) == 1
    said = "no connection to the hub (Name or service not known): using some/llama as it is in the cache"
    assert run.stderr.splitlines().count(said) == 1


# ------------------------------------------------------------------------------------
# Full fine-tune
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [{"layers_to_freeze": 1, "bf16": True}, {"bits": 32, "layer_freeze_ratio": 0.5}, {"working_dir": True}],
    ids=str,
)
def test_a_full_fine_tune_with_frozen_layers_in_shards_resumes_completes_and_predicts(
    run_qlora, stopped, models, tmp_path, flags
):
    if "working_dir" in flags:
        flags = {"working_dir": tmp_path / "work"}
    base = models("llama", tie=True)
    flags = {**FULL, **flags, "model_name_or_path": base}
    straight = run_qlora(**{**flags, "output_dir": tmp_path / "straight"} | ({"working_dir": None}))
    stopped(3, **flags)
    run = run_qlora(**flags)
    out = tmp_path / "out"
    assert run.code == 0 and same(out, straight.output_dir)  # bit for bit

    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} <= names(out)
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 1 and all(file.stat().st_size <= 110_000 for file in shards)
    config = json.loads((out / "config.json").read_text())
    assert config["use_cache"] is True and config["tie_word_embeddings"] is True
    assert config["dtype"] == ("bfloat16" if flags.get("bf16") else "float32")
    before = load_file(base / "model.safetensors")
    frozen = 1 if {"layers_to_freeze", "layer_freeze_ratio"} & set(flags) else 0
    for name, tensor in weights(out).items():
        still = "embed_tokens" in name or (frozen and ".layers.0." in name)
        assert torch.equal(tensor, before[name].to(tensor.dtype)) == bool(still), name
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)

    predicted = run_qlora(**{**flags, **PREDICT, "do_train": False})
    assert f"evaluating {out}" in predicted.stderr
    folder = flags.get("working_dir", out)
    row = json.loads((folder / "predictions.jsonl").read_text().splitlines()[0])
    prompt = torch.tensor([[256, *row["input"].encode()][:32]])
    answer = model.generate(prompt, max_new_tokens=2, do_sample=False, pad_token_id=258)[0, prompt.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == row["prediction"]
    rerun = run_qlora(**flags)
    assert "used, not trained again" in rerun.stderr and same(out, straight.output_dir)


def test_shards_of_an_earlier_save_do_not_stay(run_qlora, tmp_path):
    """A lone model.safetensors beside new shards would be loaded instead of them."""
    run_qlora(**{**FULL, "max_shard_size": "5GB", "max_steps": 2})
    assert "model.safetensors" in names(tmp_path / "out")
    run_qlora(**{**FULL, "max_steps": 4})
    assert "model.safetensors" not in names(tmp_path / "out")
    straight = run_qlora(**{**FULL, "output_dir": tmp_path / "straight"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in weights(straight.output_dir).items())
    run_qlora(**{**FULL, "max_shard_size": "5GB", "max_steps": 6})
    assert not [name for name in names(tmp_path / "out") if "-of-" in name or name.endswith("index.json")]


def test_shards_of_a_save_that_was_killed_do_not_stay(run_qlora, tmp_path, monkeypatch):
    """After half of its files have their names."""
    replace, out = Path.replace, tmp_path / "out"

    def kill(file, target):
        if target.name.startswith("model-00003"):
            raise Killed
        return replace(file, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", kill)
        with pytest.raises(Killed):
            run_qlora(**FULL)
    assert {"model-00001", "model-00002"} <= {name[:11] for name in names(out)} and "completed" not in names(out)
    assert run_qlora(**{**FULL, "max_shard_size": "5GB"}).code == 0
    assert "model.safetensors" in names(out) and not [name for name in names(out) if name.startswith(("model-", "."))]


def test_final_files_in_sub_folders_are_saved_again(run_qlora, own_model, tmp_path):
    """A tokenizer with several chat templates has a folder of them."""
    tokenizer = AutoTokenizer.from_pretrained(own_model)
    tokenizer.chat_template = {"default": "{{ messages }}", "rag": "{{ documents }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(own_model)
    templates = tmp_path / "out" / "additional_chat_templates"
    assert run_qlora(model_name_or_path=own_model, max_steps=2).code == 0
    (templates / "mine.jinja").write_text("mine")
    (own_model / "additional_chat_templates" / "rag.jinja").unlink()
    assert run_qlora(model_name_or_path=own_model, max_steps=3).code == 0
    assert {name: (templates / name).read_text() for name in names(templates)} == {
        "tool_use.jinja": "{{ tools }}",
        "mine.jinja": "mine",
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_full_finetune_of_quantised_weights_is_refused(run_qlora, tmp_path, bits):
    run = run_qlora(full_finetune=True, bits=bits)
    (error,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert run.code == 2 and not (tmp_path / "out").exists()
    assert all(word in error for word in ("full", "--bits", "16 or 32"))


# ------------------------------------------------------------------------------------
# A run never overwrites or removes what it reads.
# ------------------------------------------------------------------------------------


def contents_of(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def own_model(models, tmp_path):
    """A base model that a test may lose."""
    return shutil.copytree(models("llama"), tmp_path / "home" / "checkpoint-7" / "model")


@pytest.mark.parametrize("flag", ["output_dir", "final_output_dir", "working_dir", "merged_output_dir"])
@pytest.mark.parametrize("way", ["same", "symlink", "above", "dot"])
def test_output_folders_that_the_run_reads_are_refused(run_qlora, own_model, tmp_path, monkeypatch, flag, way):
    before, link = contents_of(own_model), tmp_path / "link"
    link.symlink_to(own_model)
    monkeypatch.chdir(own_model)
    folder = {"same": own_model, "symlink": link, "above": own_model.parent, "dot": "."}[way]
    base = "." if way == "dot" else own_model
    run = run_qlora(model_name_or_path=base, **{flag: folder}, overwrite_output_dir=True)
    assert run.code == 2
    assert f"--{flag}" in run.stderr and "name another folder" in run.stderr
    assert contents_of(own_model) == before


@pytest.mark.parametrize("flag", ["output_dir", "final_output_dir", "working_dir", "merged_output_dir"])
@pytest.mark.parametrize("name", ["checkpoint-4", "checkpoint-9/best", "left-checkpoint-3", ".saving-final"])
def test_no_output_folder_is_named_as_what_a_run_sets_aside_or_removes(run_qlora, tmp_path, monkeypatch, flag, name):
    """Rotation, a resume or the next save would take it for one of its own."""
    monkeypatch.setattr(qlora, "load_run", None)
    folder = tmp_path / "out" / name
    if "/" in name and flag in ("output_dir", "working_dir"):  # another run's checkpoint
        folder.parent.mkdir(parents=True)
        (folder.parent / "trainer_state.json").write_text("{}")
    run = run_qlora(**{flag: folder})
    part = name.partition("/")[0]
    assert run.code == 2 and f"--{flag} {folder}: {part} names a run's checkpoint" in run.stderr
    assert not folder.exists()


def test_a_folder_that_only_lies_below_such_a_name_is_free(run_qlora, tmp_path):
    assert run_qlora(output_dir=tmp_path / "checkpoint-5" / "out", max_steps=1).code == 0
    assert run_qlora(output_dir=tmp_path / "checkpoint-5-again", max_steps=1).code == 0


@pytest.mark.parametrize("alone", [False, True], ids=["a run that shares it", "a run with that folder"])
@pytest.mark.parametrize("kind", [{}, FULL], ids=["adapter", "full"])
def test_a_rerun_takes_no_other_runs_weights_for_its_own(run_qlora, tmp_path, alone, kind):
    """Both runs write into one final folder, the second with --overwrite_output_dir."""
    final = tmp_path / "final"
    first = {**kind, "output_dir": final if alone else tmp_path / "one", "final_output_dir": final}
    assert run_qlora(**first).code == 0
    assert "used, not trained again" in run_qlora(**first).stderr
    other = {
        **kind,
        "output_dir": tmp_path / "two",
        "final_output_dir": final,
        "seed": 5,
        "lora_r": None if kind else 8,
    }
    if kind:
        other |= {"max_shard_size": "5GB"}  # one file, which is loaded instead of the first run's shards
    assert run_qlora(**other, overwrite_output_dir=True).code == 0
    before = contents_of(final)
    for again in (first, first | {"max_steps": 6}, first | PREDICT | {"do_train": False}):
        run = run_qlora(**again)
        assert run.code == 2 and "but of another one" in run.stderr.splitlines()[-1]
    assert contents_of(final) == before
    assert "used, not trained again" in run_qlora(**other).stderr
    anew = run_qlora(**first, overwrite_output_dir=True)
    assert anew.code == 0 or (kind and "remove it" in anew.stderr)


def test_a_final_folder_that_moved_is_known_by_its_weights(run_qlora, tmp_path):
    flags = {"output_dir": tmp_path / "out", "final_output_dir": tmp_path / "final"}
    assert run_qlora(**flags).code == 0
    (tmp_path / "final").rename(tmp_path / "moved")
    flags["final_output_dir"] = tmp_path / "moved"
    assert "used, not trained again" in run_qlora(**flags).stderr
    other = run_qlora(output_dir=tmp_path / "other", seed=5, learning_rate=1e-2)
    shutil.copy(other.output_dir / "adapter_model.safetensors", tmp_path / "moved")
    assert "but of another one" in run_qlora(**flags).stderr.splitlines()[-1]


def test_an_output_folder_above_a_model_is_no_risk_to_it(run_qlora, models, tmp_path):
    """A merged model, in the folder of the run that made it, is what examples/ load."""
    model = shutil.copytree(models("llama"), tmp_path / "out" / "merged")
    before = contents_of(model)
    assert run_qlora(model_name_or_path=model, output_dir=tmp_path / "out", overwrite_output_dir=True).code == 0
    assert contents_of(model) == before


@pytest.mark.parametrize("flag", ["output_dir", "final_output_dir", "working_dir", "merged_output_dir"])
def test_an_output_folder_among_the_sub_folders_of_a_dataset_is_refused(
    run_qlora, data_dir, tmp_path, monkeypatch, flag
):
    """Its sub-folders are read, so that a rerun would take the run's own .json files for rows."""
    (tmp_path / "data" / "en").mkdir(parents=True)
    shutil.copy(data_dir / "support.jsonl", tmp_path / "data" / "en")
    before = contents_of(tmp_path)
    monkeypatch.chdir(tmp_path / "data")
    for dataset, folder in ((".", "results"), (tmp_path / "data", tmp_path / "data" / "en" / "results")):
        run = run_qlora(dataset=dataset, **{flag: folder})
        assert run.code == 2 and f"--{flag} {folder}" in run.stderr and "sub-folders" in run.stderr
    assert contents_of(tmp_path) == before
    shutil.copy(data_dir / "support.jsonl", tmp_path / "data")  # now its sub-folders are not read
    for _ in range(2):
        assert run_qlora(dataset=".", max_steps=1, output_dir="results").code == 0


def test_a_model_that_would_be_loaded_instead_of_what_is_saved_is_not_overwritten(run_qlora, own_model, tmp_path):
    """A lone model.safetensors beside shards, of which no record says whose it is."""
    before = contents_of(own_model)
    run = run_qlora(**FULL, output_dir=tmp_path / "out", final_output_dir=own_model, overwrite_output_dir=True)
    assert run.code == 2 and f"{own_model / 'model.safetensors'}: of another run" in run.stderr
    assert contents_of(own_model) == before


@pytest.mark.parametrize("first", [{}, {"output_dir": "results"}, {"full_finetune": True, "bits": 16, "lora_r": None}])
def test_a_final_folder_of_another_run_is_refused(run_qlora, tmp_path, first):
    """One that shares the final folder, one that wrote there alone, and one of another kind."""
    final, flags = tmp_path / "results", {"max_steps": 2, "save_steps": 1}
    own = {"output_dir": tmp_path / "one", "final_output_dir": None if "output_dir" in first else final}
    first = {name: tmp_path / value if name == "output_dir" else value for name, value in first.items()}
    assert run_qlora(**flags | own | first).code == 0
    before, second = contents_of(final), {"output_dir": tmp_path / "two", "final_output_dir": final}
    run = run_qlora(**flags | second)
    assert run.code == 2 and f"{final} holds the result of a run, and no checkpoint" in run.stderr
    assert contents_of(final) == before and not (tmp_path / "two").exists()
    assert run_qlora(**flags | own | first | {"max_steps": 3}).code == 0  # its own
    assert run_qlora(**flags | second, overwrite_output_dir=True).code == 0
    assert run_qlora(**flags | second | {"max_steps": 3}).code == 0


def test_a_folder_named_as_a_preset_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "oasst1").mkdir()
    qlora.check_folders(qlora.parse_config(["--dataset", "oasst1", "--output_dir", "oasst1"]))


def test_weights_that_another_command_put_into_the_final_folder_stay(run_qlora, tmp_path):
    """The record names files, but of another final folder."""
    assert run_qlora(output_dir=tmp_path / "out").code == 0
    best = tmp_path / "best"
    best.mkdir()
    shutil.copy(tmp_path / "out" / "adapter_model.safetensors", best / "adapter_model.bin")
    shutil.copy(tmp_path / "out" / "adapter_config.json", best)
    before = contents_of(best)
    config = qlora.parse_config(
        ["--output_dir", str(tmp_path / "out"), "--final_output_dir", str(best), "--overwrite_output_dir"]
    )
    qlora.clear_output(config, 0)
    assert contents_of(best) == before


@pytest.mark.parametrize("kind", [{}, FULL], ids=["adapter", "full"])
def test_a_projects_own_readme_and_lock_file_stay(run_qlora, tmp_path, kind):
    """The card takes another name there; one of an earlier run is written anew."""
    mine, card = {"README.md": "My project: ünï", ".lock": "mine"}, tmp_path / "out" / "MODEL_CARD.md"
    (tmp_path / "out").mkdir()
    for name, text in mine.items():
        (tmp_path / "out" / name).write_text(text)
    for flags in ({"max_steps": 1}, {"max_steps": 2}, {"max_steps": 1, "overwrite_output_dir": True}):
        assert run_qlora(**kind | flags).code == 0
        assert {name: (tmp_path / "out" / name).read_text() for name in mine} == mine
        assert f"{flags['max_steps']} optimizer steps" in card.read_text()
    alone = {**kind, "output_dir": tmp_path / "alone"}
    for steps in (1, 2):
        run = run_qlora(**alone, max_steps=steps)
        (run.output_dir / "completed").unlink()
        assert f"{steps} optimizer steps" in (run.output_dir / "README.md").read_text()
        assert not (run.output_dir / "MODEL_CARD.md").exists()


def test_starting_anew_leaves_files_of_another_program(run_qlora, tmp_path):
    """The Trainer's own names, in a folder without a record or checkpoint of ours."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "predictions.jsonl").write_text("mine")
    assert run_qlora(output_dir=out, max_steps=1, overwrite_output_dir=True).code == 0
    assert (out / "predictions.jsonl").read_text() == "mine"


def test_starting_anew_removes_the_metrics_of_a_run_that_was_interrupted(run_qlora, tmp_path):
    assert run_qlora(max_steps=2, save_steps=1).code == 0
    out = run_qlora(max_steps=2, save_steps=1).output_dir
    (out / "completed").unlink()
    (out / "metrics.json").write_text('{"eval_loss": 1.0}')
    run = run_qlora(max_steps=1, overwrite_output_dir=True)
    assert run.code == 0 and "eval_loss" not in run.json("metrics.json")


@pytest.mark.parametrize("name", ["adapter_name_or_path", "dataset", "tokenizer_patch", "chat_template"])
def test_output_folder_with_adapter_data_or_patch_is_refused(run_qlora, data_dir, tmp_path, name):
    folder = tmp_path / "read"
    folder.mkdir()
    shutil.copy(data_dir / "support.jsonl", folder / "rejected.jsonl")
    source = folder / "rejected.jsonl" if name in ("dataset", "chat_template") else folder
    run = run_qlora(**{name: source}, output_dir=folder)
    assert run.code == 2 and f"--{name}" in run.stderr
    assert names(folder) == {"rejected.jsonl"}


@pytest.mark.parametrize("anew", [False, True])
def test_only_files_that_a_record_names_are_removed(run_qlora, tmp_path, anew):
    """Two full fine-tunes into one folder: the first one's shards go, somebody else's files stay."""
    flags = FULL | {"output_dir": tmp_path / "work", "final_output_dir": tmp_path / "final"}
    assert run_qlora(**flags).code == 0
    first = names(tmp_path / "final")
    assert len(list((tmp_path / "final").glob("model-*"))) > 1
    others = [tmp_path / place / name for place in ("work", "final") for name in (
        "model-00001-of-00099.safetensors", "adapter_model.bin", "config.json.bak", "my_results.json")]  # fmt: skip
    for file in others:
        file.write_text("mine")
    (tmp_path / "work" / "checkpoint-99").mkdir()
    (tmp_path / "work" / "checkpoint-99" / "mine.txt").write_text("mine")
    run = run_qlora(**flags | {"max_steps": 6, "max_shard_size": "1GB"}, overwrite_output_dir=anew)
    assert run.code == 0
    assert all(file.read_text() == "mine" for file in others)
    assert len(list((tmp_path / "work").glob("*checkpoint-99*/mine.txt"))) == 1
    gone = {name for name in first if name.startswith("model-") or name.endswith(".index.json")}
    assert not gone & names(tmp_path / "final") and (tmp_path / "final" / "model.safetensors").is_file()
    assert ".completed-before" not in names(tmp_path / "work")


def test_a_folder_without_records_keeps_its_weights(run_qlora, own_model, tmp_path):
    """A model lies where a LoRA run writes, but is not read: its files are not the run's to remove."""
    weights_before = {name: data for name, data in contents_of(own_model).items() if name.startswith("model")}
    assert run_qlora(output_dir=own_model, overwrite_output_dir=True).code == 0
    assert weights_before and weights_before.items() <= contents_of(own_model).items()


def test_a_lock_file_that_its_holder_has_just_removed_locks_nothing(tmp_path, monkeypatch):
    """Two runs would each hold a lock, one of them on a file without a name."""
    lockf = fcntl.lockf
    monkeypatch.setattr(fcntl, "lockf", lambda file, kind: (tmp_path / qlora.LOCK).unlink() or lockf(file, kind))
    with pytest.raises(qlora.ConfigError, match="is in use by"), qlora.lock_folder(tmp_path):
        pass
