"""Flags: defaults, spelling, config files, old and removed names, and the rules between flags."""

import dataclasses
import json
import logging
import os
import re

import pytest
import torch
from transformers import Seq2SeqTrainingArguments

import qlora


def parse(*argv: str) -> qlora.Config:
    return qlora.parse_config(list(argv))


@pytest.fixture
def main(capsys):
    """`main(*argv)` returns the exit status and the lines on standard error."""

    def call(*argv: str) -> tuple[int, list[str]]:
        code = qlora.main(list(argv))
        return code, capsys.readouterr().err.splitlines()

    return call


@pytest.fixture
def warnings(caplog):
    """`warnings()` returns what the program has warned about so far."""

    def messages() -> list[str]:
        records = [r for r in caplog.records if r.name == "qlora"]
        return [r.getMessage() for r in records if r.levelno >= logging.WARNING]

    return messages


# ------------------------------------------------------------------------------------
# Defaults, written out by hand: users of the original rely on them.
# ------------------------------------------------------------------------------------

MODEL = {
    "model_name_or_path": "EleutherAI/pythia-12b",
    "trust_remote_code": False,
    "use_auth_token": False,
    "adapter_name_or_path": None,
    "attn_implementation": None,
    "pad_token": None,
    "eos_token": None,
    "bos_token": None,
    "unk_token": None,
    "add_tokens": None,
    "padding_side": "right",
    "tokenizer_patch": None,
    "chat_template": None,
    "rope_scaling": None,
    "cache_dir": None,
}
DATA = {
    "dataset": "alpaca",
    "dataset_format": None,
    "expand_conversations": False,
    "columns": None,
    "as_chat": False,
    "eval_dataset": None,
    "include_sources": "ALL",
    "eval_dataset_size": 1024,
    "streaming": False,
    "stream_buffer": 10_000,
    "max_train_samples": None,
    "max_eval_samples": None,
    "source_max_len": 1024,
    "target_max_len": 256,
    "model_max_len": None,
    "skip_excess_length": True,
    "on_bad_rows": "stop",
    "packing": False,
    "train_on_source": False,
    "objective": "auto",
    "mask_prob": 0.15,
    "mask_replace_prob": 0.8,
    "random_replace_prob": 0.1,
    "preview": 0,
}
QUANTISATION = {
    "bits": 4,
    "quant_type": "nf4",
    "calibration_rows": 0,
    "double_quant": True,
    "full_finetune": False,
    "max_memory_MB": 80000,
}
LORA = {
    "lora_r": 64,
    "expert_lora_r": None,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "lora_modules": "all",
    "lora_bias": "none",
    "lora_dtype": "float32",
    "use_dora": False,
    "lora_rank_pattern": None,
    "lora_alpha_pattern": None,
    "use_rslora": False,
    "init_lora_weights": "True",  # text, for it may also name a method
    "modules_to_save": None,
    "layers_to_freeze": 0,
    "layer_freeze_ratio": 0.0,
}
TRAINING = {
    "output_dir": "./output",
    "optim": "paged_adamw_32bit",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "max_steps": 10000,
    "weight_decay": 0.0,
    "learning_rate": 2e-4,
    "remove_unused_columns": False,
    "max_grad_norm": 0.3,
    "gradient_checkpointing": True,
    "do_train": True,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0.03,  # the original's warmup_ratio: below 1 it is a share of all steps
    "logging_steps": 10,
    "train_sampling_strategy": "group_by_length",  # the original's group_by_length
    "save_strategy": "steps",
    "save_steps": 250,
    "save_total_limit": 40,
    "report_to": "none",
}
NEW_TRAINING = {  # flags that the Trainer does not have
    "overwrite_output_dir": False,
    "early_stopping_patience": None,
    "recipe": None,
    "working_dir": None,
    "final_output_dir": None,
    "merged_output_dir": None,
    "merge_base": "original",
    "max_shard_size": "5GB",
    "recompute_layers": "auto",
    "offload_activations": False,
    "auto_batch": True,
    "fast_path": True,
    "plan": False,
    "plan_gpu": None,
}
MMLU = {
    "do_mmlu_eval": False,
    "mmlu_split": "eval",
    "mmlu_dataset": "mmlu-fs",
    "max_mmlu_samples": None,
    "mmlu_source_max_len": 2048,
    "mmlu_dir": "data/mmlu",
}
GENERATION = {
    "max_new_tokens": 256,
    "min_new_tokens": None,
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
GROUPS = {
    "model": MODEL,
    "data": DATA,
    "quant": QUANTISATION,
    "lora": LORA,
    "training": TRAINING | NEW_TRAINING,
    "mmlu": MMLU,
    "generation": GENERATION,
}
OURS = {name for table in GROUPS.values() for name in table}
AS_IN_THE_TRAINER = {"weight_decay", "save_strategy"}  # defaults that are the Trainer's own today


@pytest.mark.parametrize("group", GROUPS)
def test_defaults(group):
    config, expected = parse(), GROUPS[group]
    assert {name: config.flags[name] for name in expected} == expected
    # What the run reads; the Trainer turns report_to "none" into an empty list.
    expected = {name: [] if name == "report_to" else value for name, value in expected.items()}
    used = {name: getattr(getattr(config, group), name) for name in expected}
    assert used == expected
    booleans = {name for name, value in expected.items() if isinstance(value, bool)}
    assert {name for name, value in used.items() if isinstance(value, bool)} == booleans


def test_the_tables_of_defaults_are_complete():
    trainers = {f.name for f in dataclasses.fields(Seq2SeqTrainingArguments)}
    assert set(parse().flags) - trainers == OURS - set(TRAINING)


def test_other_trainer_flags_keep_the_trainers_defaults():
    ours, trainers = parse().training, Seq2SeqTrainingArguments(use_cpu=True)
    names = {f.name for f in dataclasses.fields(Seq2SeqTrainingArguments)} - set(TRAINING)
    changed = {name for name in names if getattr(ours, name) != getattr(trainers, name)}
    if torch.cuda.is_available():
        changed.discard("use_cpu")
    assert changed <= {"activation_checkpointing"}  # the Trainer's newer name of gradient_checkpointing


def test_parsing_does_not_change_the_defaults():
    parse("--lora_r", "8", "--learning_rate", "1.0")
    assert parse().lora.lora_r == 64 and parse().training.learning_rate == 2e-4


# ------------------------------------------------------------------------------------
# Spelling
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "name", "expected"),
    [
        (["--bf16"], "bf16", True),
        (["--bf16", "True"], "bf16", True),
        (["--bf16=True"], "bf16", True),
        (["--bf16", "False"], "bf16", False),
        (["--double_quant", "False"], "double_quant", False),
        (["--no_double_quant"], "double_quant", False),
        (["--no-double-quant"], "double_quant", False),
        (["--no_gradient_checkpointing"], "gradient_checkpointing", False),
        (["--auto_batch"], "auto_batch", True),
        (["--auto_batch", "False"], "auto_batch", False),
        (["--debug", "underflow_overflow"], "debug", ["underflow_overflow"]),
        (["--no_skip_excess_length", "--model_max_len", "9"], "skip_excess_length", False),
        (["--learning-rate", "1e-4"], "learning_rate", 1e-4),
        (["--learning-rate=1e-4"], "learning_rate", 1e-4),
        (["--max-memory-MB", "100"], "max_memory_MB", 100),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--max_steps=-1"], "max_steps", -1),
        (["--run_name=a=b"], "run_name", "a=b"),
        (["--eval_dataset_size", "0.01"], "eval_dataset_size", 0.01),
        (["--lora_r", "8", "--lora_r", "16"], "lora_r", 16),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_spelling(argv, name, expected, warnings):
    flags = parse(*argv)
    holders = [getattr(flags, group) for group in GROUPS]
    (value,) = [getattr(holder, name) for holder in holders if hasattr(holder, name)]
    assert value == expected and type(value) is type(expected)
    assert not warnings()


@pytest.mark.parametrize("dash", ["–", "—", "––"])
@pytest.mark.parametrize("rest", [["learning_rate", "1e-4"], ["learning-rate=1e-4"]])
def test_a_typographic_dash_is_accepted_with_a_warning(dash, rest, warnings):
    config = parse(dash + rest[0], *rest[1:])
    assert config.training.learning_rate == 1e-4
    (warning,) = warnings()
    assert f"{dash}learning" in warning and f"--{rest[0].partition('=')[0]}" in warning


@pytest.mark.parametrize(
    ("argv", "given", "nearest"),
    [
        (["--lerning_rate", "1"], "--lerning_rate", "--learning_rate"),
        (["--lora_alfa", "8"], "--lora_alfa", "--lora_alpha"),
        (["--source-max-length=9"], "--source-max-length", "--source_max_len"),
        (["–dataste", "x"], "--dataste", "--dataset"),
        (["--evaluation_stratgy", "no"], "--evaluation_stratgy", "--eval_strategy"),
        (["--max_step", "3"], "--max_step", "--max_steps"),  # a prefix is not accepted
        (["--use_auth_tok"], "--use_auth_tok", "--use_auth_token"),
        (["--no_double_quan"], "--no_double_quan", "--no_double_quant"),
        (["-bf16"], "-bf16", "--bf16"),
        (["--max_steps", "5", "-bf16", "True"], "-bf16", "--bf16"),
        (["--report_to", "none", "-bf16"], "-bf16", "--bf16"),
        (["-learning-rate=1"], "-learning-rate", "--learning_rate"),
        (["-lr", "1"], "-lr", "--learning_rate"),
        (["-help"], "-help", "--help"),
    ],
)
def test_an_unknown_flag_names_the_nearest_and_exits_2(main, argv, given, nearest):
    code, lines = main(*argv)
    assert code == 2 and lines[-1].startswith("error: ")
    assert given in lines[-1] and re.search(rf"{nearest}(?!\w)", lines[-1].split(given, 1)[1])
    assert "Traceback" not in "".join(lines)


# Names of other programs, and of the first guess.
TYPED = {
    "lr": "learning_rate",
    "model": "model_name_or_path",
    "base_model": "model_name_or_path",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "load_in_4bit": "bits 4",
    "load_in_8bit": "bits 8",
    "lora_rank": "lora_r",
    "lora_target": "lora_modules",
    "lora_target_modules": "lora_modules",
    "datasets": "dataset",
    "sequence_len": "model_max_len",
    "cutoff_len": "model_max_len",
    "val_set_size": "eval_dataset_size",
    "sample_packing": "packing",
    "precision": "bf16",
    "device": "use_cpu",
    "wd": "weight_decay",
    "stage": "objective",
    "template": "chat_template",
    "save_every": "save_steps",
    "grad_acc": "gradient_accumulation_steps",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "output": "output_dir",
    "save_dir": "output_dir",
    "use_lora": "lora_r",
    "use_qlora": "bits 4",
    "fp32": "bits 32",
    "eval_file": "eval_dataset",
    "validation_file": "eval_dataset",
    "bnb_4bit_quant_type": "quant_type",
}


@pytest.mark.parametrize("typed", TYPED)
def test_what_people_type_names_the_flag(tmp_path, typed):
    with pytest.raises(qlora.ConfigError, match=rf"^--{typed}: unknown flag, did you mean --{TYPED[typed]}\?"):
        parse(f"--{typed}", "1")
    with pytest.raises(qlora.ConfigError, match=rf"did you mean --{TYPED[typed]}\?"):
        parse(f"--{typed.replace('_', '-')}=1")
    (tmp_path / "run.yaml").write_text(f"{typed}:\n  - path: mhenrichsen/alpaca_2k_test\n    type: alpaca\n")
    with pytest.raises(qlora.ConfigError, match=rf"run.yaml: --{typed}: .*--{TYPED[typed]}\?"):
        parse(str(tmp_path / "run.yaml"))


def test_suggested_flags_exist_and_what_is_typed_is_no_flag():
    flags = parse().flags.keys()
    assert {flag.split()[0] for flag in qlora.OTHER_NAMES.values()} <= flags
    assert not qlora.OTHER_NAMES.keys() & (flags | qlora.OLD_FLAGS)


def test_an_unknown_flag_without_a_near_match(main):
    code, lines = main("--xyzzy_plugh_qq", "1")
    assert code == 2 and lines[-1].startswith("error: ") and "--xyzzy_plugh_qq" in lines[-1]


@pytest.mark.parametrize("flag", ["save_total", "lora"])
def test_a_prefix_of_a_flag_is_not_accepted(flag):
    with pytest.raises(qlora.ConfigError, match=f"--{flag}: unknown"):
        parse(f"--{flag}", "1")


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--lora_r", "many"], ["--lora_r", "many"]),
        (["--learning_rate", "fast"], ["--learning_rate", "fast"]),
        (["--bits", "5"], ["--bits", "5", "4", "8", "16", "32"]),
        (["--on_bad_rows", "ignore"], ["--on_bad_rows", "ignore", "stop", "skip"]),
        (["--bf16", "maybe"], ["--bf16", "maybe"]),
        (["--lora_r"], ["--lora_r"]),
        (["--optim", "paged_adamw"], ["paged_adamw"]),
        (["--lr_scheduler_type", "linera"], ["linera"]),
        (["--bf16", "--fp16"], ["bf16", "fp16"]),
        (["lora_r", "8"], ["lora_r"]),  # no dashes
        (["-r", "8"], ["-r"]),
        (["--lora_r", "8", "16"], ["16"]),  # one value too many
    ],
    ids=lambda value: " ".join(value),
)
def test_a_wrong_value_is_a_one_line_error(main, argv, fragments):
    code, lines = main(*argv)
    assert code == 2
    (error,) = [line for line in lines if "error" in line]
    assert error == lines[-1] and error.startswith("error: ")
    assert all(fragment in error for fragment in fragments)
    assert not any("Traceback" in line or "usage:" in line for line in lines)


def test_debug_shows_the_traceback(main):
    code, lines = main("--debug", "--lora_r", "0")
    assert code == 2 and lines[-1].startswith("error: ")
    assert any("Traceback" in line for line in lines[:-1])


# ------------------------------------------------------------------------------------
# Config files
# ------------------------------------------------------------------------------------

FILES = {
    "run.yaml": "learning_rate: 1e-4\nbits: 8\nbf16: true\ndouble-quant: false\npad_token: null\n"
    "dataset: a.jsonl,b.jsonl\nlora_modules: 'q_proj,v_proj'\nmax_steps: -1\n",
    "run.yml": "# a comment\nlearning_rate: 0.0001\nbits: '8'\nbf16: True\ndouble_quant: False\n"
    "dataset: a.jsonl,b.jsonl\nlora_modules: q_proj,v_proj\nmax_steps: -1\n",
    "run.json": '{"learning_rate": 1e-4, "bits": 8, "bf16": true, "double_quant": false,'
    '"dataset": "a.jsonl,b.jsonl", "lora_modules": "q_proj,v_proj", "max_steps": -1,'
    '"pad_token": null}',
}


@pytest.mark.parametrize("name", FILES)
def test_flags_from_a_file(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    config = parse(str(tmp_path / name))
    assert config.training.learning_rate == 1e-4 and config.training.max_steps == -1
    assert (config.quant.bits, config.quant.double_quant, config.training.bf16) == (8, False, True)
    assert config.data.dataset == "a.jsonl,b.jsonl" and config.model.pad_token is None
    assert config.lora.lora_modules == "q_proj,v_proj"
    assert config.lora.lora_r == 64  # not in the file


@pytest.mark.parametrize(
    ("content", "argv", "name", "expected"),
    [
        ("learning_rate: 1e-4", ["--learning_rate", "1e-3"], "learning_rate", 1e-3),
        ("double_quant: true", ["--no_double_quant"], "double_quant", False),
        ("no_double_quant: true", ["--double_quant"], "double_quant", True),
        ("warmup_ratio: 0.1", ["--warmup_ratio", "0.2"], "warmup_steps", 0.2),
        ("warmup_ratio: 0.1", ["--warmup_steps", "5"], "warmup_steps", 5),
        ("group_by_length: true", ["--group_by_length=False"], "train_sampling_strategy", "random"),
        ("num_train_epochs: 2", ["--max_steps", "7"], "max_steps", 7),
        ("max_steps: 7", ["--num_train_epochs", "2"], "max_steps", -1),
    ],
)
def test_the_command_line_overrides_the_file(tmp_path, content, argv, name, expected):
    (tmp_path / "run.yaml").write_text(content)
    assert parse(str(tmp_path / "run.yaml"), *argv).flags[name] == expected


@pytest.mark.parametrize("word", ["--dataset=rows.json", "–output_dir=a.yaml"])
def test_a_first_flag_that_ends_like_a_file_is_no_file(word):
    assert word.partition("=")[2] in parse(word, "--plan").flags.values()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "learning_rate: 1e-3\nbits: 4\nlearning_rate: 5e-3\n"),
        ("a.json", '{"learning_rate": 1e-3, "learning_rate": 5e-3}'),
    ],
)
def test_a_flag_that_stands_twice_in_a_file_is_an_error(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(qlora.ConfigError, match=rf"{re.escape(name)}: learning_rate stands there twice"):
        parse(str(tmp_path / name))


def test_a_mapping_in_a_file_becomes_json(tmp_path):
    (tmp_path / "run.yaml").write_text("rope_scaling:\n  rope_type: linear\n  factor: 2.0\n")
    value = parse(str(tmp_path / "run.yaml")).model.rope_scaling
    assert json.loads(value) == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("name", ["eval_strategy", "save_strategy", "evaluation_strategy"])
def test_no_in_a_yaml_file_is_text(tmp_path, name):
    """YAML itself reads `no` as False."""
    (tmp_path / "run.yaml").write_text(f"{name}: no\n")
    training = parse(str(tmp_path / "run.yaml")).training
    assert getattr(training, name.replace("evaluation", "eval")) == "no"


def test_old_names_work_in_a_file(tmp_path, warnings):
    (tmp_path / "run.yaml").write_text("warmup_ratio: 0.1\ngroup_by_length: false\nno_cuda: true\n")
    training = parse(str(tmp_path / "run.yaml")).training
    assert (training.warmup_steps, training.train_sampling_strategy) == (0.1, "random")
    assert training.use_cpu is True
    assert len(warnings()) == 3


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("run.yaml", None, []),
        ("run.yaml", "bits: [4\n", []),
        ("run.json", '{"bits": 4', []),
        ("run.yaml", "- --bits\n- 4\n", ["list"]),
        ("run.yaml", "bits 4\n", ["str"]),
        ("run.yaml", "<<: {bits: 8, lora_r: 4}\nseed: 1\n", ["<<"]),
        ("run.yaml", "yes: 1\ntrue: 2\n", ["takes for one"]),
        ("run.yaml", "lerning_rate: 1e-4\n", ["lerning_rate", "--learning_rate"]),
        ("run.yaml", b"run_name: caf\xe9\n", []),
    ],
    ids=["missing", "yaml", "json", "a list", "a text", "merge key", "one name twice", "unknown flag", "encoding"],
)
def test_a_bad_file_is_a_one_line_error_that_names_it(main, tmp_path, name, content, fragments):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, lines = main(str(tmp_path / name))
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert all(fragment in lines[0] for fragment in [str(tmp_path / name), *fragments])


def test_a_file_of_flags_that_the_run_would_overwrite_is_refused(main, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"output_dir": str(tmp_path)}))
    code, (line,) = main(str(tmp_path / "run.json"))
    assert code == 2 and line.startswith(f"error: {tmp_path}/run.json: the run would write its own file")


@pytest.mark.parametrize(
    ("content", "argv", "expected"),
    [
        ("max_steps: 4", "--num_train_epochs 2", {"max_steps": -1, "num_train_epochs": 2.0}),
        ("eval_dataset_size: 9", "--eval_dataset x", {"eval_dataset": "x", "eval_dataset_size": 1024}),
        ("source_max_len: 9\ntarget_max_len: 9", "--model_max_len 8", {"model_max_len": 8, "source_max_len": 1024}),
        ("num_train_epochs: 2", "--max_steps -1", {"num_train_epochs": 2.0, "max_steps": -1}),
    ],
)
def test_the_command_line_wins_over_what_excludes_it_in_the_file(tmp_path, content, argv, expected):
    (tmp_path / "run.yaml").write_text(content)
    flags = parse(str(tmp_path / "run.yaml"), *argv.split()).flags
    assert {name: flags[name] for name in expected} == expected


@pytest.mark.parametrize("more", ["--do_train False --dataset other", "--dataset other", "--do_train False"])
def test_all_rows_of_another_file_are_answered(tmp_path, more):
    """A run that trains, or answers rows of its own dataset, holds out as many as the one that it repeats."""
    flags = {
        "eval_dataset_size": 9,
        "max_eval_samples": 3,
        "include_sources": "a",
        "dataset": "own",
        "do_predict": True,
    }
    record = {"flags": flags | {"predict_with_generate": True}, "derived": {"given": sorted(flags)}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    config = parse(str(tmp_path / "run.json"), "--output_dir", str(tmp_path / "out"), *more.split())
    every = more.startswith("--do_train False --dataset")
    found = config.data.max_eval_samples, config.data.eval_dataset_size, config.data.include_sources
    assert found == ((None, 1024, "ALL") if every else (3, 9, "a"))


FOLDERS = [
    *("model_name_or_path", "adapter_name_or_path", "tokenizer_patch", "chat_template", "cache_dir", "dataset"),
    *("output_dir", "working_dir", "final_output_dir", "merged_output_dir", "mmlu_dir", "resume_from_checkpoint"),
]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_tilde_is_the_home_folder_wherever_it_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "run.yaml").write_text(f"{name}: ~/x/y\n")
    for words in (
        [f"--{name}", "~/x/y"],
        [f"--{name}=~/x/y"],
        [f"--{name.replace('_', '-')}=~/x/y"],
        [tmp_path / "run.yaml"],
    ):
        assert parse(*map(str, words)).flags[name] == f"{tmp_path}/home/x/y"


def test_tildes_in_a_list_of_datasets_and_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse("--dataset", "a,~/b,/c~/d, ~/e").data.dataset == "a,/home/me/b,/c~/d, /home/me/e"
    config = parse("--pad_token", "~", "--run_name=~x")
    assert (config.model.pad_token, config.training.run_name) == ("~", "~x")


def test_somebody_elses_run_does_not_bring_along_the_right_to_run_code(tmp_path, warnings):
    record = {
        "flags": {"dataset": "a", "lora_r": 8, "trust_remote_code": True},
        "derived": {"given": ["trust_remote_code"]},
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    words = [str(tmp_path / "run.json"), "--output_dir", "x"]
    config = parse(*words)
    assert config.model.trust_remote_code is False and config.explicitly_set == {"output_dir"}
    assert config.lora.lora_r == 8
    (warning,) = warnings()
    assert "trust_remote_code is not taken over" in warning and "run.json" in warning
    assert parse(*words, "--trust_remote_code").model.trust_remote_code is True


# ------------------------------------------------------------------------------------
# Values that depend on other flags
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "steps", "epochs"),
    [
        ([], 10000, 3.0),
        (["--num_train_epochs", "2"], -1, 2.0),
        (["--num-train-epochs=2"], -1, 2.0),
        (["--num_train_epochs", "2", "--max_steps", "50"], 50, 2.0),
        (["--max_steps", "50"], 50, 3.0),
    ],
)
def test_epochs_apply_unless_steps_are_passed(argv, steps, epochs):
    config = parse(*argv)
    assert (config.training.max_steps, config.training.num_train_epochs) == (steps, epochs)
    assert config.flags["max_steps"] == steps


def test_adam8bit():
    assert parse("--adam8bit").training.optim == "paged_adamw_8bit"
    assert parse("--adam8bit").flags["optim"] == "paged_adamw_8bit"
    assert parse("--adam8bit", "False").training.optim == "paged_adamw_32bit"


@pytest.mark.parametrize(
    ("argv", "work", "final"),
    [
        ("--output_dir o", "o", "o"),
        ("--output_dir o --working_dir w", "w", "o"),
        ("--output_dir o --final_output_dir f", "o", "f"),
        ("--output_dir o --working_dir w --final_output_dir f", "w", "f"),
    ],
)
def test_folders(argv, work, final):
    config = parse(*argv.split())
    assert (config.training.output_dir, str(qlora.final_folder(config))) == (work, final)
    assert config.flags["output_dir"] == "o"


def test_explicitly_set_flags_are_recorded():
    config = parse("--lora-r", "8", "--no_double_quant", "--warmup_ratio", "0.1")
    assert config.explicitly_set == {"lora_r", "double_quant", "warmup_steps"}
    assert config.flags["lora_r"] == 8 and config.flags["double_quant"] is False


@pytest.mark.parametrize(("value", "steps"), [("0.03", 3), ("0.005", 1), ("0", 0), ("0.5", 50)])
def test_a_warmup_ratio_is_a_fraction_of_all_steps(value, steps):
    assert parse("--warmup_ratio", value).training.get_warmup_steps(100) == steps


@pytest.mark.parametrize("value", ["1", "1.5", "-0.1"])
def test_a_warmup_ratio_out_of_range(value):
    with pytest.raises(qlora.ConfigError, match=r"warmup_ratio.*1"):
        parse("--warmup_ratio", value)


def test_explicitly_set_generation_flags():
    config = parse("--top_p", "0.9", "--max_new_tokens", "256")
    assert config.explicitly_set == {"top_p", "max_new_tokens"}
    assert config.generation.top_p == 0.9


# ------------------------------------------------------------------------------------
# Old names
# ------------------------------------------------------------------------------------

# Old flag, its value, and the current flags that it sets.
OLD = [
    ("evaluation_strategy", "steps", {"eval_strategy": "steps", "do_eval": True}),
    ("evaluation_strategy", "no", {"eval_strategy": "no", "do_eval": False}),
    ("warmup_ratio", "0.1", {"warmup_steps": 0.1}),
    ("group_by_length", "True", {"train_sampling_strategy": "group_by_length"}),
    ("group_by_length", "False", {"train_sampling_strategy": "random"}),
    ("group_by_length", "", {"train_sampling_strategy": "group_by_length"}),
    ("no_group_by_length", "", {"train_sampling_strategy": "random"}),
    ("no_cuda", "", {"use_cpu": True}),
    ("no_cuda", "True", {"use_cpu": True}),
    ("mlm_probability", "0.3", {"mask_prob": 0.3}),
    ("use_auth", "", {"use_auth_token": True}),
    ("use_auth", "False", {"use_auth_token": False}),
    ("push_to_hub_token", "abc", {"hub_token": "abc"}),
    ("use_flash_attention_2", "", {"attn_implementation": "flash_attention_2"}),
    ("use_flash_attention_2", "True", {"attn_implementation": "flash_attention_2"}),
    ("use_flash_attention_2", "False", {"attn_implementation": None}),
    ("adafactor", "True", {"optim": "adafactor"}),
    ("adafactor", "False", {"optim": "paged_adamw_32bit"}),
    ("per_gpu_train_batch_size", "3", {"per_device_train_batch_size": 3}),
    ("per_gpu_eval_batch_size", "3", {"per_device_eval_batch_size": 3}),
    ("activation_checkpointing", "False", {"gradient_checkpointing": False}),
    ("adam8bit", "", {"optim": "paged_adamw_8bit"}),
    ("generation_num_beams", "2", {"num_beams": 2}),
    ("adam8bit", "False", {"optim": "paged_adamw_32bit"}),
]


IGNORED = [
    ("save_safetensors", "False"),
    ("save_safetensors", ""),
    ("no_save_safetensors", ""),
    ("sortish_sampler", "True"),
    ("sharded_ddp", "simple"),
    ("torch_compile", ""),
    ("torch_compile_backend", "inductor"),
    ("torch_compile_mode", "default"),
    ("torchdynamo", "inductor"),
    ("use_mps_device", ""),
    ("half_precision_backend", "auto"),
    ("fp16_backend", "auto"),
    ("use_ipex", ""),
    ("jit_mode_eval", ""),
    ("past_index", "-1"),
    ("ray_scope", "last"),
    ("tpu_num_cores", "8"),
    ("fp16_opt_level", "O1"),
    ("xpu_backend", "ccl"),
    ("include_inputs_for_metrics", ""),
    ("include_tokens_per_second", "True"),
    ("dispatch_batches", "False"),
    ("split_batches", ""),
    ("fsdp_min_num_params", "100"),
    ("push_to_hub_model_id", "mine"),
    ("push_to_hub_organization", "ours"),
    ("length_column_name", "size"),
    ("auto_find_batch_size", ""),
    ("no_auto_find_batch_size", ""),
    ("enable_jit_checkpoint", ""),
    ("logging_nan_inf_filter", "False"),
    ("ddp_broadcast_buffers", "True"),
    ("use_liger_kernel", ""),
    ("liger_kernel_config", '{"rope": false}'),
    ("torch_empty_cache_steps", "4"),
    ("label_names", "labels"),
    ("include_for_metrics", "loss"),
    ("batch_eval_metrics", "True"),
    ("prediction_loss_only", ""),
    ("eval_do_concat_batches", "False"),
    ("eval_use_gather_object", ""),
    ("average_tokens_across_devices", "False"),
    ("ddp_find_unused_parameters", ""),
    ("include_num_input_tokens_seen", "all"),
    ("use_fast_tokenizer", "False"),
    ("hub_strategy", "checkpoint"),
    ("hub_always_push", ""),
    ("gradient_checkpointing_kwargs", '{"use_reentrant": true}'),
    ("activation_checkpointing_kwargs", "{}"),
]


def changed_flags(config: qlora.Config) -> dict[str, object]:
    default = parse().flags
    return {name: value for name, value in config.flags.items() if value != default[name]}


@pytest.mark.parametrize(("old", "value", "effect"), OLD, ids=[f"{o}={v}" for o, v, _ in OLD])
def test_an_old_name_works_with_one_warning(old, value, effect, warnings):
    config = parse(f"--{old}", *filter(None, [value]))
    (warning,) = warnings()
    assert f"--{old}" in warning
    for name, expected in effect.items():
        holder = next(h for h in (config.training, config.model, config.data, config.generation) if hasattr(h, name))
        assert getattr(holder, name) == expected
    assert changed_flags(config).keys() <= effect.keys()


def test_an_ignored_flag_is_accepted_with_one_warning(caplog):
    for name, value in IGNORED:
        caplog.clear()
        assert not changed_flags(parse(f"--{name}", *filter(None, [value])))
        (warning,) = caplog.messages
        assert warning.startswith(f"--{name}: accepted, without effect: ")


def test_every_old_name_is_tested():
    assert {old.removeprefix("no_") for old, *_ in [*OLD, *IGNORED]} | {
        "no_cuda",
        "logging_dir",
        *REMOVED,
    } >= qlora.OLD_FLAGS


REMOVED = [
    "generation_config",
    "generation_max_length",
    "cuda_graphs",
    "unpacked_layers",
    "fused_lora",
    "padding_free",
    "chunked_head",
    "liger",
    "allow_pickle_weights",
    "num_beam_groups",
    "diversity_penalty",
    "penalty_alpha",
    "show_traceback",
]


@pytest.mark.parametrize("name", REMOVED)
@pytest.mark.parametrize("spelling", ["--{}", "--{}=False", "--no_{}", "–{}", "yaml"])
def test_a_removed_flag_says_what_to_do_instead(main, tmp_path, name, spelling):
    (tmp_path / "run.yaml").write_text(f"{name}: 2\n")
    words = [str(tmp_path / "run.yaml")] if spelling == "yaml" else [spelling.format(name)]
    code, lines = main(*words)
    assert code == 2 and lines[-1].startswith("error: ") and "no longer exists" in lines[-1]
    assert name in lines[-1] and re.search(r"(use|e\.g\.) --\w+|leave it out", lines[-1])


def test_every_removed_flag_is_tested():
    assert set(REMOVED) == qlora.REMOVED_FLAGS.keys()


def test_repeating_a_run_drops_its_removed_flags(tmp_path):
    """They stay in the record: the list of what differs shows them."""
    record = {part: {} for part in ("derived", "versions", "data", "device")}
    record |= {"flags": {"dataset": "a", "lora_r": 8, "liger": True, "cuda_graphs": False}}
    record["derived"] = {"given": ["lora_r", "cuda_graphs"]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    config = parse(str(tmp_path / "run.json"), "--output_dir", "x")
    assert config.lora.lora_r == 8 and config.explicitly_set == {"lora_r", "output_dir"}
    assert "flags liger was True, is None" in list(qlora.differences(config.record, {"flags": config.flags}))


def test_evaluation_strategy_is_recorded_as_evaluating():
    """The Trainer's arguments turn do_eval on, and run.json holds every flag as resolved."""
    assert parse("--evaluation_strategy", "steps").flags["do_eval"] is True


def test_negated_old_names():
    assert parse("--no_use_auth").model.use_auth_token is False
    assert parse("--no_use_auth", "False").model.use_auth_token is True
    assert parse("--no_group_by_length=False").training.train_sampling_strategy == "group_by_length"
    with pytest.raises(qlora.ConfigError, match="--no_use_auth maybe"):
        parse("--no_use_auth", "maybe")


def test_logging_dir_becomes_its_environment_variable(warnings, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    parse("--logging_dir", "runs/1")
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "runs/1"
    (warning,) = warnings()
    assert "--logging_dir" in warning and "TENSORBOARD_LOGGING_DIR" in warning


def test_overwrite_output_dir_false_is_accepted():
    assert parse("--overwrite_output_dir", "False").training.overwrite_output_dir is False
    assert parse("--overwrite_output_dir").training.overwrite_output_dir is True


def test_flash_attention_falls_back_to_torchs_own_with_one_warning(warnings, monkeypatch):
    from transformers import utils

    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: False)
    config = parse("--use_flash_attention_2")
    before = len(warnings())
    qlora.warn_once.cache_clear()
    assert [qlora.resolve_attention(config) for _ in range(2)] == [None, None]  # as without the flag
    assert len(warnings()) == before + 1 and "flash" in warnings()[-1]
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: True)
    assert qlora.resolve_attention(config) == "flash_attention_2"
    assert qlora.resolve_attention(parse()) is None
    assert qlora.resolve_attention(parse("--attn_implementation", "eager")) == "eager"


# Flags of the original's Trainer that today's lacks: declared on a subclass they would parse and do nothing.
DROPPED_BY_THE_TRAINER = {
    *("evaluation_strategy", "group_by_length", "warmup_ratio", "no_cuda", "logging_dir"),
    *("save_safetensors", "half_precision_backend", "fp16_backend", "use_ipex", "jit_mode_eval"),
    *("use_mps_device", "torchdynamo", "past_index", "per_gpu_train_batch_size"),
    *("per_gpu_eval_batch_size", "push_to_hub_token", "sharded_ddp", "ray_scope", "adafactor"),
    *("tpu_num_cores", "include_inputs_for_metrics", "include_tokens_per_second"),
    *("dispatch_batches", "split_batches"),
}


def test_no_flag_is_declared_that_the_trainer_ignores():
    assert not DROPPED_BY_THE_TRAINER & set(parse().flags)
    trainers = {f.name for f in dataclasses.fields(Seq2SeqTrainingArguments)}
    declared = {f.name for f in dataclasses.fields(qlora.TrainingArguments)}
    assert declared - trainers == set(NEW_TRAINING)


# ------------------------------------------------------------------------------------
# Rules between flags
# ------------------------------------------------------------------------------------

RULES = [
    ("--do_train False", "do_train do_eval do_predict merged_output_dir"),
    ("--full_finetune", "full_finetune bits 16 32"),
    ("--full_finetune --bits 8", "full_finetune bits 16 32"),
    ("--full_finetune --bits 16 --adapter_name_or_path a", "full_finetune adapter_name_or_path"),
    ("--eval_dataset a --eval_dataset_size 5", "eval_dataset eval_dataset_size"),
    ("--streaming --max_steps 2 --ignore_data_skip", "streaming ignore_data_skip"),
    ("--calibration_rows 8 --bits 8", "calibration_rows bits 4"),
    ("--calibration_rows 8 --use_dora", "calibration_rows init_lora_weights"),
    ("--early_stopping_patience 2", "early_stopping_patience eval_strategy"),
    ("--save_strategy best", "save_strategy eval_strategy"),
    ("--recipe modern --full_finetune --bits 16", "recipe full_finetune"),
    ("--add_tokens a --full_finetune --bits 16", "add_tokens full_finetune"),
    ("--add_tokens a --modules_to_save lm_head", "add_tokens modules_to_save"),
    ("--add_tokens a --calibration_rows 8", "add_tokens calibration_rows"),
    ("--add_tokens a --fsdp --optim adamw_torch", "add_tokens fsdp"),
    ("--fsdp --optim paged_adamw_8bit", "fsdp paged_adamw_8bit adamw_torch"),
    ("--fsdp --bits 8", "fsdp bits 4 16 32"),
    ('--fsdp --fsdp_config {"version":1}', "fsdp_config version 1 2"),
    (
        '--fsdp --fsdp_config {"fsdp_auto_wrap_policy":"SIZE_BASED_WRAP"}',
        "fsdp_config auto_wrap_policy size_based_wrap",
    ),
    (
        '--fsdp --fsdp_config {"activation_checkpointing":true}',
        "fsdp_config activation_checkpointing --recompute_layers all",
    ),
    ('--fsdp --fsdp_config {"cpu_ofload":true}', "fsdp_config cpu_ofload cpu_offload"),
    ("--do_predict --objective clm", "do_predict predict_with_generate"),
    ("--objective clm --mask_prob 0.2", "mask_prob clm objective"),
    ("--objective clm --random_replace_prob 0", "random_replace_prob clm objective"),
    ("--objective mlm --target_max_len 9", "target_max_len mlm"),
    ("--objective mlm --train_on_source", "train_on_source mlm"),
    ("--objective mlm --do_predict --predict_with_generate", "predict_with_generate mlm"),
    ("--objective mlm --do_sample --top_p 0.9", "do_sample top_p mlm"),
    ("--objective mlm --do_eval --do_mmlu_eval", "do_mmlu_eval mlm"),
    ("--objective mlm --padding_side left", "padding_side mlm"),
    ("--objective mlm --dataset_format alpaca", "dataset_format alpaca input text"),
    ("--objective clm --metric_for_best_model masked_accuracy", "masked_accuracy loss perplexity"),
    ("--mask_prob 0", "mask_prob 0"),
    ("--mask_prob 1.1", "mask_prob 1.1"),
    ("--mask_prob nan", "mask_prob nan"),
    ("--mask_replace_prob -0.1", "mask_replace_prob -0.1"),
    ("--mask_replace_prob 1", "mask_replace_prob random_replace_prob 1 0.1"),  # 1.1 with the default of the other
    ("--random_replace_prob -0.1", "random_replace_prob -0.1"),
    ("--random_replace_prob nan", "random_replace_prob nan"),
    ("--do_mmlu_eval", "do_mmlu_eval do_eval"),
    ("--model_max_len 9 --source_max_len 4", "model_max_len source_max_len"),
    ("--model_max_len 9 --target_max_len 4", "model_max_len target_max_len"),
    ("--skip_excess_length", "skip_excess_length model_max_len"),
    ("--eval_dataset_size 0", "eval_dataset_size 0"),
    ("--eval_dataset_size -1", "eval_dataset_size -1"),
    ("--lora_r 0", "lora_r 0 1"),
    ("--expert_lora_r 0", "expert_lora_r 0 1"),
    ("--lora_dropout 1", "lora_dropout 1"),
    ("--lora_dropout -0.1", "lora_dropout -0.1"),
    ("--layers_to_freeze 1 --layer_freeze_ratio 0.5", "layers_to_freeze layer_freeze_ratio"),
    ("--layer_freeze_ratio 1", "layer_freeze_ratio 1"),
    ("--resume_from_checkpoint False", "resume_from_checkpoint False overwrite_output_dir"),
    ("--recompute_layers some", "recompute_layers some auto all none"),
    ("--recompute_layers -1", "recompute_layers -1"),
    ("--gradient_checkpointing False --recompute_layers all", "gradient_checkpointing recompute_layers"),
    ("--offload_activations --gradient_checkpointing False", "offload_activations gradient_checkpointing"),
    ("--plan_gpu 24GiB", "plan_gpu --plan"),
    ("--dataloader_persistent_workers", "dataloader_persistent_workers --dataloader_num_workers"),
    (
        '--accelerator_config {"gradient_accumulation_kwargs":{"num_steps":4}}',
        "--accelerator_config gradient_accumulation_kwargs loss",
    ),
    ("--plan --plan_gpu H100", "--plan_gpu H100 24GiB"),
    ("--plan --plan_gpu 8x80GiB", "--plan_gpu 8x80GiB 24GiB"),
    ("--plan --plan_gpu 0GiB", "--plan_gpu 0GiB 24GiB"),
    ("--overwrite_output_dir --resume_from_checkpoint c", "--overwrite_output_dir --resume_from_checkpoint"),
    ("--dataset https://me:pw@example.org/x", "--dataset password log"),
    ("--report_to pigeon", "--report_to pigeon tensorboard"),
    ("--report_to comet_ml", "--report_to comet_ml installed"),
    ("--preview -1", "preview -1"),
    ("--preview 3 --plan", "preview plan"),
    ("--layer_freeze_ratio -0.5", "layer_freeze_ratio -0.5"),
    ("--train_sampling_strategy sorted", "train_sampling_strategy sorted random"),
    ("--dataset_format alpacca", "dataset_format alpacca alpaca input-output path.py:function"),
    ("--dataset_format none.py:f", "dataset_format none.py:f"),
    ("--expand_conversations", "expand_conversations airoboros_chat"),
    ("--expand_conversations --dataset_format sharegpt", "expand_conversations airoboros_chat"),
    ("--dataset vicuna", "vicuna released"),
    ("--dataset alpaca,vicuna", "alpaca,vicuna released"),
    ("--dataset=", "dataset"),
    ("--stream_buffer 9", "stream_buffer streaming"),
    ("--streaming --stream_buffer 0", "stream_buffer 0 1"),
    ("--streaming --num_train_epochs 2", "streaming max_steps epochs"),
    ("--streaming --max_steps -1", "streaming max_steps"),
    ("--streaming --dataset a,b", "streaming dataset folder"),
    ("--streaming --do_eval --eval_dataset_size 0.1", "streaming eval_dataset_size number"),
    ("--streaming --dataloader_num_workers 2", "streaming dataloader_num_workers"),
    ("--streaming --packing", "--streaming --packing"),
    ("--streaming --group_by_length", "streaming train_sampling_strategy"),
    ("--streaming --save_strategy epoch", "streaming save_strategy steps"),
    ("--streaming --eval_strategy epoch", "streaming eval_strategy steps"),
    ("--streaming --logging_strategy epoch", "streaming logging_strategy steps"),
    ("--rope_scaling {factor:2}", "rope_scaling JSON"),
    ("--rope_scaling [1]", "rope_scaling [1]"),
    *(
        (f"--{name} 0", f"{name} 0 1")
        for name in (
            *("max_train_samples", "max_eval_samples", "source_max_len", "target_max_len"),
            *("model_max_len", "max_mmlu_samples", "mmlu_source_max_len", "max_new_tokens"),
            *("per_device_train_batch_size", "per_device_eval_batch_size"),
            "gradient_accumulation_steps",
        )
    ),
]


IMPOSSIBLE = [
    ("--max_steps 0", "--max_steps"),
    ("--seed -1", "--seed"),
    ("--seed 99999999999", "--seed"),
    ("--data_seed 99999999999", "--data_seed"),
    ("--label_smoothing_factor 2", "--label_smoothing_factor"),
    ("--lora_alpha 0", "--lora_alpha"),
    ("--lora_alpha inf", "--lora_alpha"),
    ("--learning_rate -1", "--learning_rate"),
    ("--weight_decay nan", "--weight_decay"),
    ("--dataloader_num_workers -1", "--dataloader_num_workers"),
    ("--eval_dataset_size nan", "--eval_dataset_size"),
    ("--eval_dataset_size inf", "--eval_dataset_size"),
    ("--metric_for_best_model foo", "--metric_for_best_model"),
    ("--metric_for_best_model mmlu_eval_accuracy", "--do_mmlu_eval"),
    ("--temperature -1", "--temperature"),
    ("--init_lora_weights eva --bits 16", "--init_lora_weights eva: expected .*gaussian"),
    ("--init_lora_weights loftq", "--init_lora_weights loftq: expected .*gaussian"),
    ("--init_lora_weights corda --bits 16", "--init_lora_weights corda: expected .*gaussian"),
    ("--init_lora_weights lora_ga --bits 16", "--init_lora_weights lora_ga: expected .*gaussian"),
    ("--init_lora_weights xavier --bits 16", "--init_lora_weights xavier: expected .*gaussian"),
    ("--init_lora_weights pissa", "--init_lora_weights pissa: .*--bits 16"),
    ("--init_lora_weights pissa_niter_4 --bits 8", "--init_lora_weights pissa_niter_4: .*--bits 16"),
    ("--init_lora_weights olora", "--init_lora_weights olora: .*--bits 16"),
    ("--init_lora_weights orthogonal --bits 8", "--init_lora_weights orthogonal: .*--bits 16"),
    ("--max_shard_size 5", "--max_shard_size 5"),
    ("--max_shard_size 1.5GB", "--max_shard_size 1.5GB"),
    ("--merge_base dequantized", "--merge_base .*--merged_output_dir"),
    ("--bits 8 --use_dora --use_cpu", "--use_dora with --bits 8: .* pass --bits 4 or 16"),
    ("--merged_output_dir m --full_finetune --bits 16", "--merged_output_dir.*--full_finetune"),
    ("--optim adalomo", "--optim adalomo: expected an optimizer that steps after the backward pass"),
    ("--optim galore_adamw_layerwise", "--optim galore_adamw_layerwise"),
    ("--debug run.yaml", "--debug .*run.yaml.*nothing, or underflow_overflow"),
    ("--merged_output_dir o --output_dir ./o", "--merged_output_dir o"),
    ("--merged_output_dir w --working_dir w", "--merged_output_dir w"),
    ("--merged_output_dir f --final_output_dir f", "--merged_output_dir f"),
    ("--mmlu_source_max_len 0", "--mmlu_source_max_len"),
    ("--max_memory_MB 0", "--max_memory_MB"),
    ("--max_grad_norm -1", "--max_grad_norm"),
    ("--num_train_epochs -1", "--num_train_epochs"),
    ("--layers_to_freeze -1", "--layers_to_freeze"),
    ("--calibration_rows -1", "--calibration_rows"),
    ("--early_stopping_patience 0", "--early_stopping_patience"),
    ("--add_tokens a,,b", "--add_tokens a,,b: expected tokens"),
    ("--recipe guanaco", "--recipe.*guanaco.*modern"),
    ("--neftune_noise_alpha -1", "--neftune_noise_alpha"),
    ("--optim galore_adamw_layerwise", "--optim"),
]


@pytest.mark.parametrize(("argv", "named"), RULES, ids=[argv for argv, _ in RULES])
def test_a_broken_rule_is_a_one_line_config_error(argv, named):
    with pytest.raises(qlora.ConfigError) as caught:
        parse(*argv.split())
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in named.split())


@pytest.mark.parametrize(("flags", "named"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_at_once(flags, named):
    with pytest.raises(qlora.ConfigError, match=named):
        parse(*flags.split())


def test_every_rule_is_tested(monkeypatch):
    """Every row of the tables of rules is the reason of an error above."""
    rules, tables = qlora.conflicts, []
    monkeypatch.setattr(qlora, "conflicts", lambda config: tables.append(rules(config)) or tables[-1])
    messages = messages_of_broken_rules()
    untested = [row for row in zip(*tables, strict=True) if not any(is_broken for is_broken, _ in row)]
    assert len(untested) == 1 and untested[0][0][1].startswith("--deepspeed")  # test_fsdp_deepspeed.py
    expected = [(name, expected) for names, expected, _ in qlora.VALUE_CHECKS for name in names.split()]
    assert not [row for row in expected if not any(m.startswith(f"--{row[0]} ") and row[1] in m for m in messages)]
    required = [f"--{name} needs --{other} {' or '.join(map(str, values))}" for name, other, *values in qlora.REQUIRES]
    assert {message.strip() for message in required} <= set(messages)
    assert {f"--{a} and --{b}: pass only one of them" for a, b in qlora.MUTUALLY_EXCLUSIVE} <= set(messages)


def messages_of_broken_rules() -> list[str]:
    messages = []
    for argv, _ in [*RULES, *IMPOSSIBLE]:
        with pytest.raises(qlora.ConfigError) as caught:
            parse(*argv.split())
        messages.append(str(caught.value))
    return messages


def test_messages_name_only_flags_that_exist():
    messages = messages_of_broken_rules()
    reasons = [reason for *_, reason in qlora.ineffective_flags(parse())]
    names = {name for message in messages + reasons for name in re.findall(r"--(\w+)", message)}
    assert names <= set(parse().flags) and all("--" in message for message in messages)


def test_fsdp_needs_a_floating_storage_dtype_of_a_quantised_base():
    """bitsandbytes' default, also if the file does not say so, is uint8."""
    config = parse("--fsdp", "--model_name_or_path", "some/base")
    for own in ({}, {"bnb_4bit_quant_storage": "uint8"}):
        with pytest.raises(qlora.ConfigError, match=r"^--fsdp: some/base .* stored as uint8, .* pass the base as pub"):
            qlora.check_prequantised(config, own)
    qlora.check_prequantised(config, {"bnb_4bit_quant_storage": "float32"})
    qlora.check_prequantised(parse(), {"bnb_4bit_quant_storage": "uint8"})


def test_settings_of_accelerate_launch_that_contradict_the_flags_are_refused(monkeypatch):
    """The Trainer would compute in its precision, or shard with its settings, whatever the run reports."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for words in ((), ("--fp16",)):
        with pytest.raises(qlora.ConfigError, match=r"mixed_precision bf16 of accelerate launch.* --bf16"):
            parse(*words)
    assert parse("--bf16").training.bf16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    for engine in ("fsdp", "deepspeed"):
        with monkeypatch.context() as launched:
            launched.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
            with pytest.raises(qlora.ConfigError, match=rf"^use_{engine} of accelerate launch: .*pass --{engine} here"):
                parse()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate itself sets it
    assert parse("--fsdp").training.fsdp


# A command line with ineffective flags, the line that says so, and flags that make them effective.
INEFFECTIVE = [
    ("--bits 8 --quant_type fp4 --no_double_quant", "double_quant, quant_type: without effect: bits is 8", "--bits 4"),
    ("--full_finetune --bits 16 --lora_r 8", "lora_r: without effect: there are no adapters", "--full_finetune False"),
    (f"--as_chat --dataset_format {__file__}:f", "as_chat: .*a function writes", "--dataset_format alpaca"),
    ("--adapter_name_or_path a --lora_r 8 --layers_to_freeze 1", "lora_r: .*keeps its own", None),
    ("--max_new_tokens 9 --predict_with_generate", "max_new_tokens, predict_with_generate: .*--do_predict",
     "--do_predict"),
    ("--do_predict --predict_with_generate --top_p 0.9", "top_p: without effect: .*--do_sample", "--do_sample"),
    ("--mmlu_split test --max_mmlu_samples 9", "max_mmlu_samples, mmlu_split: .*--do_mmlu_eval",
     "--do_eval --do_mmlu_eval"),
    ("--eval_dataset_size 9 --max_eval_samples 3", "eval_dataset_size, max_eval_samples: .*--do_eval", "--do_eval"),
    ("--eval_steps 9", "eval_steps: without effect: eval_strategy is no", "--eval_strategy steps"),
    ("--save_steps 9 --save_strategy epoch", "save_steps: without effect: save_strategy is epoch",
     "--save_strategy steps"),
    ("--num_train_epochs 2 --max_steps 9", "num_train_epochs: without effect: max_steps 9 takes precedence",
     "--max_steps -1"),
    ("--warmup_ratio 0.1", "warmup_steps: without effect: lr_scheduler_type constant",
     "--lr_scheduler_type constant_with_warmup"),
    ("--fsdp --offload_activations", "offload_activations: without effect: an engine", None),
    ("--hub_token t --hub_model_id x", "hub_model_id, hub_token: .*--push_to_hub", "--push_to_hub"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "expected", "remedy"), INEFFECTIVE, ids=[argv for argv, *_ in INEFFECTIVE])
def test_an_ineffective_flag_is_named(caplog, argv, expected, remedy):
    with caplog.at_level("INFO", "qlora"):
        qlora.log_hints(parse(*argv.split()))
        assert any(re.match(expected, message) for message in caplog.messages)
        caplog.clear()
        if remedy:
            qlora.log_hints(parse(*argv.split(), *remedy.split()))
            assert not any(re.match(expected.partition(":")[0], message) for message in caplog.messages)


def test_every_ineffective_flag_is_tested():
    configs = [parse(*argv.split()) for argv, *_ in INEFFECTIVE]
    tables = [(config, qlora.ineffective_flags(config)) for config in configs]
    for row in range(len(tables[0][1])):
        rows = [(config, table[row]) for config, table in tables]
        assert any(applies and config.explicitly_set & set(names) for config, (applies, names, _) in rows), rows[0][1]


def test_the_defaults_have_no_ineffective_flag(caplog):
    with caplog.at_level("INFO", "qlora"):
        qlora.log_hints(parse())
    assert "without effect" not in caplog.text


@pytest.mark.parametrize(
    "argv",
    [
        "--do_train False --do_eval",
        "--do_train False --merged_output_dir m --merge_base dequantized --max_shard_size 100KB",
        "--init_lora_weights FALSE --bits 8",
        "--init_lora_weights pissa_niter_16 --bits 16",
        "--init_lora_weights orthogonal --bits 32",
        "--do_train False --do_predict --predict_with_generate",
        "--full_finetune --bits 16",
        "--adam8bit",
        "--do_mmlu_eval --do_eval",
        "--do_mmlu_eval --evaluation_strategy steps",  # which turns do_eval on
        "--model_max_len 9 --skip_excess_length False",
        "--eval_dataset_size 0.5",
        "--lora_dropout 0.999",
        "--dataset_format airoboros_chat --expand_conversations",
        f"--dataset_format {__file__}:f",
        "--train_sampling_strategy sequential",
        '--rope_scaling {"type":"linear","factor":2.0}',
        "--do_predict",  # needs no generation if the model turns out to be a masked one
        "--objective mlm --do_predict --mask_prob 1 --mask_replace_prob 1 --random_replace_prob 0",
        "--objective mlm --model_max_len 64 --train_on_source False --metric_for_best_model eval_masked_accuracy",
        "--objective mlm --dataset_format text",
        "--streaming --max_steps 5 --num_train_epochs 2 --eval_strategy steps",
        "--streaming --train_sampling_strategy random",
        "--streaming --train_sampling_strategy sequential",
        '--accelerator_config {"split_batches":false}',
        "--dataloader_persistent_workers --dataloader_num_workers 2",
        "--neftune_noise_alpha 5",
        "--plan --plan_gpu 80GiB",
        "--plan --plan_gpu 23.5GiB",
        "--streaming --do_train False --do_eval --num_train_epochs 2",
    ],
)
def test_allowed_combinations(argv):
    assert parse(*argv.split())


def test_a_stream_is_not_grouped_by_length():
    assert parse("--streaming").training.train_sampling_strategy == "random"
    assert parse().training.train_sampling_strategy == "group_by_length"


def test_rules_are_checked_before_anything_is_loaded(main):
    code, lines = main("--model_name_or_path", "/no/such/model", "--full_finetune", "--bits", "4")
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ")


# ------------------------------------------------------------------------------------
# Help
# ------------------------------------------------------------------------------------


@pytest.fixture
def help_lines(capsys):
    def call(*argv: str) -> list[str]:
        with pytest.raises(SystemExit) as stop:
            qlora.main(list(argv))
        assert stop.value.code == 0
        return capsys.readouterr().out.splitlines()

    return call


def flags_in(lines: list[str]) -> list[str]:
    """The flags that have a line of their own."""
    return [match[1] for line in lines if (match := re.match(r"  --(\w+) ", line))]


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--lora_r", "8", "--help"]])
def test_help_has_a_line_for_each_of_our_flags_and_begins_with_those_that_people_use(help_lines, argv):
    lines = help_lines(*argv)
    assert len(lines) <= 130
    sentence, usage, empty, title, *_ = lines
    assert sentence.count(".") == 1 and usage.startswith("usage: ") and not empty and title.endswith(":")
    start = {"model_name_or_path", "dataset", "do_train", "do_eval", "do_predict", "bf16", "output_dir", "max_steps"}
    start |= {"resume_from_checkpoint", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"}
    assert start <= set(flags_in(lines[: lines.index("", 3)]))
    listed = flags_in(lines)
    assert len(listed) == len(set(listed)) and set(listed) >= OURS - AS_IN_THE_TRAINER
    assert not {"adam_beta1", "fsdp", "ddp_timeout"} & set(listed)
    text = "\n".join(lines)
    assert "%%" not in text and "%(" not in text


def test_help_all_has_every_flag_once(help_lines):
    lines = help_lines("--help", "all")
    listed = flags_in(lines)
    assert sorted(listed) == sorted(parse().flags)
    assert not any("Not directly used" in line for line in lines)
    assert next(line for line in lines if "--optim " in line).count("adamw") > 10


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora_r", ["Rank of the adapters.", "[64]"]),
        ("bits", ["4, 8, 16, 32", "[4]"]),
        ("double_quant", ["[on; --no_double_quant: off]"]),
        ("init_lora_weights", ["[True]"]),
        ("num_beams", ["[1]"]),
        ("learning_rate", ["[0.0002]"]),
    ],
)
def test_a_line_of_help_says_default_and_choices(help_lines, name, expected):
    (line,) = [line for line in help_lines("--help") if line.startswith(f"  --{name} ")]
    assert all(part in line for part in expected)
    assert not any(line.startswith(f"  --no_{name}") for line in help_lines("--help"))


def test_a_list_in_a_file_is_comma_separated(tmp_path):
    (tmp_path / "run.yaml").write_text("lora_modules: [q_proj, v_proj]\nreport_to: none\n")
    assert parse(str(tmp_path / "run.yaml")).lora.lora_modules == "q_proj,v_proj"


def test_a_removed_flag_with_the_originals_default_changes_nothing():
    assert parse("--num_beam_groups", "1", "--diversity_penalty", "0.0", "--penalty_alpha=None").explicitly_set == set()
