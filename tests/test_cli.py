"""qlora.py as a process, and every command in the documentation and the scripts."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from conftest import preserved_state

import qlora

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = {"|", ">", ">>", "<", "&&", "||", ";", "&", "2>&1"}


def start(*command: str, **environment: str) -> subprocess.Popen:
    """Start a command in the repository; with one thread, because several run at once."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_help_and_a_misspelt_flag():
    script = str(ROOT / "qlora.py")
    help_process = start(sys.executable, script, "--help")
    wrong = start(sys.executable, script, "--lora_rank", "8")
    stdout, _ = help_process.communicate(timeout=120)
    assert help_process.returncode == 0
    assert "--model_name_or_path" in stdout and "--lora_r " in stdout and "--save_steps" in stdout
    stdout, stderr = wrong.communicate(timeout=120)
    assert wrong.returncode == 2 and not stdout
    (line,) = stderr.strip().splitlines()
    assert line.startswith("error: ") and "--lora_rank" in line and "--lora_r?" in line


# ------------------------------------------------------------------------------------
# Commands in Markdown pages
# ------------------------------------------------------------------------------------


def commands_in(text: str) -> list[list[str]]:
    """The arguments of qlora.py in each command of a Markdown page, in fenced blocks and inline `code`."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    commands = []
    for line in lines:
        if not re.match(r"(\w+=\S+ )*(\S*python\S*|accelerate launch|torchrun)\b.* ?qlora\.py\b", line.strip()):
            continue
        words = shlex.split(line, comments=True)
        words = words[next(i for i, word in enumerate(words) if Path(word).name == "qlora.py") + 1 :]
        end = next((i for i, word in enumerate(words) if word in OPERATORS), len(words))
        commands.append([word for word in words[:end] if word not in ("…", "...", "[…]")])
    return commands


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("examples/**/*.md")), ROOT / "scripts/results/README.md"]
IN_PAGES = [(page.name, words) for page in PAGES for words in commands_in(page.read_text(encoding="utf-8"))]


def test_commands_are_found():
    page = "Say `python qlora.py run.yaml --lora_r 8`, or:\n```bash\nA=1 torchrun --nproc 2 qlora.py \\\n"
    page += "  --bits 4  # why\npython other.py\npython qlora.py --seed 1 | tee log\n```\n"
    assert sorted(commands_in(page)) == [["--bits", "4"], ["--seed", "1"], ["run.yaml", "--lora_r", "8"]]


@pytest.mark.parametrize(("page", "words"), IN_PAGES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(IN_PAGES)])
def test_every_command_of_a_page_parses(page, words, tmp_path, monkeypatch):
    """A config file that a page only mentions is an empty one here."""
    if words and words[0].endswith((".yaml", ".yml", ".json")) and not (ROOT / words[0]).exists():
        monkeypatch.chdir(tmp_path)
        Path(words[0]).parent.mkdir(parents=True, exist_ok=True)
        Path(words[0]).write_text("{}")
    if "--help" not in words:
        qlora.parse_config(words)


# ------------------------------------------------------------------------------------
# Recipes
# ------------------------------------------------------------------------------------
RECIPES = sorted(path.name for path in (ROOT / "examples/recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains(run_qlora, models, tmp_path, recipe):
    """On a tiny model and rows of its own; all that the recipe says about training stays."""
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Seven."}]
    rows = tiny.rows_to_jsonl(tmp_path / "chats.jsonl", [{"messages": turns}] * 20)
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    mine = {
        "model_name_or_path": models("llama"),
        "dataset": rows,
        "chat_template": tmp_path / "chat.jinja",
        "bf16": False,
    }
    unset = dict.fromkeys(("source_max_len", "target_max_len", "max_steps", "per_device_train_batch_size",
                           "gradient_accumulation_steps", "lora_r", "logging_steps", "save_steps"))  # fmt: skip
    run = run_qlora(str(ROOT / "examples/recipes" / recipe), **unset | mine)
    assert run.code == 0 and run.json("trainer_state.json")["global_step"] == 9, "3 epochs of 18 rows, 8 a step"
    assert run.json("adapter_config.json")["r"] == 16


# ------------------------------------------------------------------------------------
# Scripts (slurm.sbatch: test_crash_safety.py)
# ------------------------------------------------------------------------------------

STUB = """#!/bin/sh
for word in "$@"; do printf '%s\\n' "$word" >> "$RECORD"; done
"""
SCRIPTS = [
    path.name
    for path in sorted((ROOT / "scripts").glob("*.sh"))
    if re.search(r'^[^#\n]*"\$\{PYTHON:-python\}" (-m .*)?qlora\.py', path.read_text(), flags=re.M)
]


def words_of(script: str, tmp_path: Path, **environment: str) -> list[str]:
    """The arguments that a script passes to qlora.py."""
    stub, record = tmp_path / "python", tmp_path / "words"
    stub.write_text(STUB)
    stub.chmod(0o755)
    record.unlink(missing_ok=True)
    unset = {"MODEL", "DATASET", "OUTPUT_DIR", "WORKING_DIR", "MAX_STEPS", "MMLU", "GPUS"}
    clean = {name: value for name, value in os.environ.items() if name not in unset}
    clean |= {"PYTHON": str(stub), "RECORD": str(record)} | environment
    subprocess.run(["bash", str(ROOT / "scripts" / script)], check=True, env=clean, cwd=tmp_path, timeout=30)
    words = record.read_text().splitlines()
    launcher, words = words[: words.index("qlora.py")], words[words.index("qlora.py") + 1 :]
    assert launcher == LAUNCHERS.get(script, [])
    if "--deepspeed" in words:  # parsing it needs the package and torchrun's environment
        at = words.index("--deepspeed")
        assert json.loads((ROOT / words[at + 1]).read_text())["zero_optimization"]["stage"] == 2
        del words[at : at + 2]
    return words


GUANACO = {
    "dataset": "oasst1",
    "source_max_len": 16,
    "target_max_len": 512,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "max_steps": 1875,
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_modules": "all",
    "bits": 4,
    "quant_type": "nf4",
    "double_quant": True,
    "bf16": True,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0.03,
    "adam_beta2": 0.999,
    "max_grad_norm": 0.3,
    "weight_decay": 0.0,
    "seed": 0,
    "data_seed": 42,
    "save_total_limit": 40,
    "eval_dataset_size": 1024,
    "max_eval_samples": 1000,
    "per_device_eval_batch_size": 1,
    "eval_strategy": "steps",
    "eval_steps": 187,
    "max_new_tokens": 32,
    "dataloader_num_workers": 3,
    "train_sampling_strategy": "group_by_length",
    "gradient_checkpointing": True,
    "optim": "paged_adamw_32bit",
    "do_train": True,
    "do_eval": True,
    "do_mmlu_eval": True,
}
SMALL, LARGE = {"learning_rate": 2e-4, "save_steps": 500}, {"learning_rate": 1e-4, "save_steps": 200}
FINETUNE = {
    "model_name_or_path": "EleutherAI/pythia-12b",
    "dataset": "alpaca",
    "source_max_len": 384,
    "target_max_len": 128,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "max_steps": 10000,
    "eval_steps": 1000,
    "save_steps": 1000,
    "learning_rate": 2e-4,
}
GENERATE = {
    "dataset": "alpaca",
    "do_train": False,
    "do_predict": True,
    "predict_with_generate": True,
    "per_device_eval_batch_size": 4,
    "source_max_len": 512,
    "target_max_len": 128,
    "max_new_tokens": 64,
    "do_sample": True,
    "top_p": 0.9,
}
ESM = {  # the defaults, with rows in random order
    "objective": "mlm",
    "mask_prob": 0.15,
    "train_sampling_strategy": "random",
    "bits": 4,
    "quant_type": "nf4",
    "double_quant": True,
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "max_steps": 10000,
    "source_max_len": 1024,
    "optim": "paged_adamw_32bit",
    "max_grad_norm": 0.3,
}
AIROBOROS = {
    "dataset_format": "airoboros",
    "model_max_len": 4096,
    "num_train_epochs": 5,
    "max_steps": -1,
    "bf16": True,
    "attn_implementation": "flash_attention_2",
    "max_grad_norm": 0.3,
    "weight_decay": 0.0,
    "seed": 11422,
    "data_seed": 11422,
    "do_train": True,
    "do_eval": True,
    "eval_strategy": "steps",
    "gradient_checkpointing": True,
}
AIROBOROS_70B = {
    "bits": 4,
    "quant_type": "nf4",
    "double_quant": True,
    "full_finetune": False,
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "lora_modules": "all",
    "per_device_train_batch_size": 2,
    "learning_rate": 8e-5,
    "lr_scheduler_type": "constant",
    "eval_dataset_size": 0.01,
    "eval_steps": 75,
    "save_steps": 75,
    "save_total_limit": 3,
}
AIROBOROS_7B_FULL = {
    "bits": 16,
    "full_finetune": True,
    "per_device_train_batch_size": 12,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.005,
    "optim": "adamw_torch",
    "eval_dataset_size": 0.02,
    "eval_steps": 5,
}
LAUNCHERS = {
    "finetune_airoboros_70b.sh": ["-m", "accelerate.commands.launch"],  # accelerate launch
    "finetune_airoboros_7b_full.sh": ["-m", "torch.distributed.run", "--nproc_per_node", "7"],  # torchrun
}
PUBLISHED = {
    "finetune_airoboros_70b.sh": (AIROBOROS, AIROBOROS_70B, {}, "meta-llama/Llama-2-70b-hf"),
    "finetune_airoboros_7b_full.sh": (AIROBOROS, AIROBOROS_7B_FULL, {}, "meta-llama/Llama-2-7b-hf"),
    "finetune_guanaco_7b.sh": (GUANACO, SMALL, {"lora_dropout": 0.1}, "huggyllama/llama-7b"),
    "finetune_guanaco_13b.sh": (GUANACO, SMALL, {"lora_dropout": 0.05}, "huggyllama/llama-13b"),
    "finetune_guanaco_33b.sh": (GUANACO, LARGE, {"lora_dropout": 0.05}, "huggyllama/llama-30b"),
    "finetune_guanaco_65b.sh": (GUANACO, LARGE, {"lora_dropout": 0.05}, "huggyllama/llama-65b"),
    "finetune_llama2_guanaco_7b.sh": (GUANACO, SMALL, {"lora_dropout": 0.1}, "meta-llama/Llama-2-7b-hf"),
    "finetune.sh": (FINETUNE, {}, {}, "EleutherAI/pythia-12b"),
    "generate.sh": (GENERATE, {}, {}, "EleutherAI/pythia-12b"),
    "finetune_esm1b_mlm.sh": (ESM, {}, {}, "facebook/esm1b_t33_650M_UR50S"),
}


@pytest.mark.parametrize("script", PUBLISHED)
def test_scripts_have_the_published_settings(script, tmp_path):
    *parts, model = PUBLISHED[script]
    expected = {"model_name_or_path": model} | {name: value for part in parts for name, value in part.items()}
    flags = qlora.parse_config(words_of(script, tmp_path)).flags
    assert {name: flags[name] for name in expected} == expected


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_parses_and_reads_its_environment(script, tmp_path):
    environment = {"MODEL": "a model", "DATASET": "b.jsonl", "OUTPUT_DIR": "out put"}
    flags = qlora.parse_config(words_of(script, tmp_path, **environment)).flags
    assert (flags["model_name_or_path"], flags["dataset"], flags["output_dir"]) == tuple(environment.values())


def test_the_published_scripts_exist():
    assert set(PUBLISHED) <= set(SCRIPTS)


@pytest.fixture
def tiny_environment(models, tmp_path):
    """Variables that the scripts read: a tiny model, alpaca rows that also have a `text`, two steps."""
    rows = [row | {"text": f"{row['instruction']} {row['output']}"} for row in tiny.ALPACA_ROWS]
    return {
        "PYTHON": sys.executable,
        "MODEL": str(models("llama", max_position_embeddings=1024)),
        "DATASET": str(tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)),
        "MAX_STEPS": "2",
        "MMLU": "False",
    }


def run_script(name: str, output: Path, environment: dict[str, str], *words: str) -> subprocess.Popen:
    return start("bash", f"scripts/{name}", *words, OUTPUT_DIR=str(output), **environment)


def finish(process: subprocess.Popen) -> str:
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return stderr


def run_here(name: str, tmp_path: Path, environment: dict[str, str], *words: str) -> None:
    """What a script runs, in this process."""
    environment = environment | {"OUTPUT_DIR": str(tmp_path / "out")}
    environment.pop("PYTHON")
    with preserved_state():
        assert qlora.main([*words_of(name, tmp_path, **environment), *words]) == 0


def test_finetune_then_generate(tiny_environment, tmp_path):
    output = tmp_path / "out"
    finish(run_script("finetune.sh", output, tiny_environment))
    assert {path.name for path in output.iterdir()} >= {"completed", "adapter_model.safetensors", "eval_results.json"}
    run_here("generate.sh", tmp_path, tiny_environment, "--max_new_tokens", "4")
    assert len((output / "predictions.jsonl").read_text().splitlines()) == 1  # a tenth of 8 rows


def test_guanaco(tiny_environment, tmp_path):
    words = ["--dataset_format", "oasst1", "--gradient_accumulation_steps", "2"]
    run_here("finetune_guanaco_7b.sh", tmp_path, tiny_environment, *words)
    assert (tmp_path / "out/completed").exists()


def test_masked_proteins(models, tmp_path):
    rows = [{"input": "MKTAYIAKQRGAVLIPFMW"[i:] + "STCYNQDEKRH"} for i in range(12)]
    environment = {
        "PYTHON": sys.executable,
        "MODEL": str(models("encoder", family="esm")),
        "DATASET": str(tiny.rows_to_csv(tmp_path / "rows.csv", rows)),
        "MAX_STEPS": "2",
    }
    run_here("finetune_esm1b_mlm.sh", tmp_path, environment)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"completed", "eval_results.json"}
