"""What a training run computes, in which order, and which files it writes."""

import json
import resource
import shutil
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    Seq2SeqTrainingArguments,
    Trainer,
)
from transformers.training_args import OptimizerNames

import qlora

# Long and short outputs: the mean over tokens differs from the mean of the micro-batches' means.
ROWS = [
    {"input": "count", "output": "one two three four five six seven"},
    {"input": "a longer question than the first", "output": "no"},
    {"input": "say", "output": "the wind came from the north-east"},
    {"input": "", "output": "ok"},
]
FIRST_STEP = {"max_steps": 1, "learning_rate": 0.0, "gradient_accumulation_steps": 2}


@pytest.fixture
def rows_file(tmp_path):
    return tiny.rows_to_jsonl(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def batches(monkeypatch) -> list[list[tuple[int, ...]]]:
    """The training rows of every step that is collated, as tuples of ids."""
    seen, collate = [], qlora.collate_step

    def spy(rows, masked=False):
        if "length" in rows[0]:  # not the rows of the fast path's trial
            seen.append([tuple(row["input_ids"]) for row in rows])
        return collate(rows, masked)

    monkeypatch.setattr(qlora, "collate_step", spy)
    return seen


def history(run, key: str) -> list[float]:
    return [entry[key] for entry in run.json("trainer_state.json")["log_history"] if key in entry]


@torch.no_grad()
def negative_log_probabilities(model, row: dict) -> torch.Tensor:
    """(supervised tokens, V): the output and EOS of one row, alone and unpadded."""
    source, target = [tiny.BOS, *row["input"].encode()], [*row["output"].encode(), tiny.EOS]
    logits = model(input_ids=torch.tensor([source + target])).logits[0]
    return -F.log_softmax(logits[len(source) - 1 : -1].float(), dim=-1)


def token_losses(model, row: dict, smoothing: float = 0.0) -> torch.Tensor:
    table = negative_log_probabilities(model, row)
    target = torch.tensor([*row["output"].encode(), tiny.EOS])
    right = table.gather(1, target[:, None])[:, 0]
    return (1 - smoothing) * right + smoothing * table.mean(dim=1)


# ------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------

TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
ADAPTER = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
TOP = ADAPTER | TOKENIZER
TOP |= {"trainer_state.json", "train_results.json", "all_results.json", "metrics.json"}
TOP |= {"run.json", "loss.png", "completed"}
CHECKPOINT = ADAPTER | TOKENIZER
CHECKPOINT |= {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
CHECKPOINT |= {"checkpoint.json"}


def in_checkpoints(*steps: int) -> set[str]:
    return {f"checkpoint-{step}/{name}" for step in steps for name in CHECKPOINT}


def test_four_steps_leave_exactly_these_files(run_qlora):
    run = run_qlora()
    assert run.code == 0
    assert run.files() == TOP | in_checkpoints(2, 4)
    # scripts/slurm.sbatch goes by it: metrics.json is written last
    assert (run.output_dir / "metrics.json").stat().st_mtime_ns > (run.output_dir / "completed").stat().st_mtime_ns


def test_evaluation_and_prediction_add_exactly_these_files(run_qlora):
    run = run_qlora(do_eval=True, do_predict=True, predict_with_generate=True, max_new_tokens=2, save_steps=4)
    assert run.code == 0
    more = {"eval_results.json", "predict_results.json", "predictions.jsonl"}
    assert run.files() == TOP | in_checkpoints(4) | more


def test_metrics_hold_the_name_and_the_metrics_of_every_stage(run_qlora):
    run = run_qlora(
        run_name="a try",
        do_eval=True,
        do_predict=True,
        predict_with_generate=True,
        max_new_tokens=2,
    )
    metrics = run.json("metrics.json")
    assert metrics["run_name"] == "a try"
    stages = {"train": run.json("train_results.json"), "eval": run.json("eval_results.json")}
    for name, results in stages.items():
        assert metrics[f"{name}_loss"] == results[f"{name}_loss"]
    assert metrics["predict_samples"] == len((run.output_dir / "predictions.jsonl").read_text().splitlines())


@pytest.mark.real_writes
def test_the_loss_chart_is_a_png_and_the_card_names_settings_data_and_losses(run_qlora, data_dir, models, tmp_path):
    run = run_qlora(learning_rate=0.00123)
    assert (run.output_dir / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    card = (run.output_dir / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "0.00123" in card and str(data_dir / "support.jsonl") in card
    assert all(f" {loss:.4g} |" in card and str(loss) not in card for loss in history(run, "loss"))
    assert "base_model" not in card  # a folder: the hub refuses what is no name of its own
    # a name in the config is that of what this base was once trained from
    config = json.loads((models("llama") / "config.json").read_text()) | {"_name_or_path": "other/older"}
    base = shutil.copytree(models("llama"), tmp_path / "models--maker--tiny-llama/snapshots/abc")
    (base / "config.json").write_text(json.dumps(config))
    named = run_qlora(model_name_or_path=base, max_steps=1, output_dir=tmp_path / "named")
    assert 'base_model: "maker/tiny-llama"\n' in (named.output_dir / "README.md").read_text(encoding="utf-8")


# Our own flags, which every run records; the Trainer's come from its class.
OWN_FLAGS = """
    model_name_or_path trust_remote_code use_auth_token adapter_name_or_path attn_implementation
    pad_token eos_token bos_token unk_token padding_side tokenizer_patch
    rope_scaling dataset dataset_format eval_dataset_size max_train_samples max_eval_samples source_max_len
    target_max_len model_max_len skip_excess_length on_bad_rows packing train_on_source
    objective mask_prob mask_replace_prob random_replace_prob
    bits quant_type double_quant full_finetune max_memory_MB
    lora_r lora_alpha lora_dropout lora_modules lora_bias lora_dtype use_dora use_rslora
    init_lora_weights modules_to_save layers_to_freeze layer_freeze_ratio
    cache_dir overwrite_output_dir
    recompute_layers auto_batch plan plan_gpu
    do_mmlu_eval mmlu_split mmlu_dataset max_mmlu_samples mmlu_source_max_len mmlu_dir
    max_new_tokens min_new_tokens do_sample num_beams temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size
""".split()  # noqa: SIM905


def test_run_json_has_five_parts_and_every_flag_by_its_own_name(run_qlora, models, data_dir):
    run = run_qlora(adam8bit=True, warmup_ratio=0.25, group_by_length=False, lora_r=8)
    record = run.json("run.json")
    assert list(record) == ["flags", "derived", "versions", "data", "device"]
    trainers = {item.name for item in fields(Seq2SeqTrainingArguments) if item.init}
    assert set(record["flags"]) >= (trainers - qlora.OLD_FLAGS) | set(OWN_FLAGS)
    expected = {
        "model_name_or_path": str(models("llama")),
        "dataset": str(data_dir / "support.jsonl"),
        "lora_r": 8,
        "lora_alpha": 16,
        "bits": 4,
        "max_steps": 4,
        "optim": "paged_adamw_8bit",  # resolved
        "warmup_steps": 0.25,
        "train_sampling_strategy": "random",
        "learning_rate": 2e-4,
        "max_grad_norm": 0.3,
    }
    assert expected.items() <= record["flags"].items()
    assert record["versions"]["torch"] == version("torch")  # without the +cu130 that torch adds
    assert {"transformers", "peft", "bitsandbytes", "qlora.py"} <= set(record["versions"])
    assert record["data"] and record["device"]


# ------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_first_loss_is_the_mean_over_the_supervised_tokens_of_the_step(
    run_qlora, models, rows_file, bits, smoothing
):
    run = run_qlora(
        dataset=rows_file,
        bits=bits,
        lora_dropout=0.0,
        label_smoothing_factor=smoothing,
        source_max_len=64,
        target_max_len=64,
        **FIRST_STEP,
    )
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(
        models("llama"),
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=quantised if bits == 4 else None,
    ).eval()
    losses = torch.cat([token_losses(model, row, smoothing) for row in ROWS])
    assert history(run, "loss") == [pytest.approx(losses.mean().item(), rel=1e-4)]


def test_the_mean_of_means_would_be_another_number(models):
    """So the test above can fail."""
    model = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32).eval()
    losses = [token_losses(model, row) for row in ROWS]
    of_rows = sum(row.mean() for row in losses) / len(losses)
    by_length = (torch.cat(losses[:1] + losses[2:3]).mean() + torch.cat(losses[1::2]).mean()) / 2
    assert abs(of_rows - torch.cat(losses).mean()) > 0.005
    assert abs(by_length - torch.cat(losses).mean()) > 0.005


def test_the_loss_does_not_depend_on_how_a_step_is_cut(run_qlora, rows_file, tmp_path):
    shapes = [(1, 4), (2, 2), (4, 1)]
    losses, norms = [], []
    for rows, accumulated in shapes:
        run = run_qlora(
            dataset=rows_file,
            output_dir=tmp_path / f"{rows}x{accumulated}",
            bits=16,
            **FIRST_STEP | {"gradient_accumulation_steps": accumulated},
            per_device_train_batch_size=rows,
        )
        losses += history(run, "loss")
        norms += history(run, "grad_norm")
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)
    assert norms == pytest.approx(norms[:1] * 3, rel=1e-4)


def test_eos_is_supervised_even_where_it_is_the_pad_token(run_qlora, models, tmp_path):
    """Rows padded with EOS: the first loss is the mean over all supervised tokens, every EOS among them."""
    rows = [{"input": "q", "output": "abcdefgh"}, {"input": "", "output": "x"}]
    base = models("llama", tokenizer=partial(tiny.write_byte, pad=None))  # no unknown token either: pad is EOS
    data = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    run = run_qlora(model_name_or_path=base, dataset=data, bits=16, max_steps=1)
    assert run.json("run.json")["derived"]["special tokens"].count("257") == 2  # EOS and pad
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    losses = torch.cat([token_losses(model, row) for row in rows])
    assert history(run, "loss") == [pytest.approx(losses.mean().item(), rel=1e-4)]


def test_neftune_adds_noise_to_training_and_not_to_evaluation(run_qlora, tmp_path):
    plain, noisy = (
        run_qlora(
            output_dir=tmp_path / f"alpha-{alpha}",
            neftune_noise_alpha=alpha,
            do_eval=True,
            **FIRST_STEP,
        )
        for alpha in (None, 50)
    )
    assert history(noisy, "loss") != pytest.approx(history(plain, "loss"), rel=1e-3)
    assert history(noisy, "eval_loss") == pytest.approx(history(plain, "eval_loss"), rel=1e-6)


def test_one_seed_gives_one_run_and_another_seed_another(run_qlora, tmp_path):
    runs = [
        run_qlora(output_dir=tmp_path / str(i), seed=seed, lora_dropout=0.1, learning_rate=1e-2)
        for i, seed in enumerate((7, 7, 8))
    ]
    first, again, other = (load_file(r.output_dir / "adapter_model.safetensors") for r in runs)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert history(runs[0], "loss") == history(runs[1], "loss")
    assert not any(torch.equal(first[name], other[name]) for name in first)


# ------------------------------------------------------------------------------------
# Optimizers and schedules
# ------------------------------------------------------------------------------------


def tensors_in(value) -> list[torch.Tensor]:
    """Every tensor of nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, list) else []


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("adamw_torch", torch.float32),
        ("paged_adamw_32bit", torch.float32),
        ("paged_lion_32bit", torch.float32),
        ("adamw_bnb_8bit", torch.uint8),
        ("paged_adamw_8bit", torch.uint8),
        ("lion_8bit", torch.uint8),
        ("adafactor", torch.float32),
        ("sgd", None),
    ],
)
def test_every_optimizer_trains_with_states_of_its_kind(run_qlora, name, state):
    """Rank 64, as bitsandbytes keeps 8-bit states only for tensors of 4096 elements or more."""
    run = run_qlora(optim=name, max_steps=2, learning_rate=1e-3, lora_r=64)
    assert run.code == 0
    adapter = load_file(run.output_dir / "adapter_model.safetensors")
    assert all(tensor.any() for key, tensor in adapter.items() if "lora_B" in key)  # they were 0
    saved = torch.load(run.output_dir / "checkpoint-2/optimizer.pt", weights_only=True)
    large = {t.dtype for t in tensors_in(saved["state"]) if t.numel() >= 4096}
    if state == torch.uint8:
        assert large == {torch.uint8}
    elif name == "adafactor":  # factored into rows and columns: no large state at all
        assert {t.dtype for t in tensors_in(saved["state"])} == {torch.float32}
    else:
        assert large == ({state} if state else set())


def test_an_unknown_optimizer_is_an_error_in_one_line(run_qlora):
    run = run_qlora(optim="paged_adamw")
    assert run.code == 2
    line = run.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and "paged_adamw" in line
    assert "Traceback" not in run.stderr
    assert not run.output_dir.exists()


PEAK = 1e-3
WARM = "constant_with_warmup"


@pytest.mark.parametrize(
    ("schedule", "flags", "rates"),
    [
        (WARM, {"warmup_ratio": 0.5}, [0, 1, 2, 3, 4, 4, 4, 4]),
        (WARM, {"warmup_steps": 2}, [0, 2, 4, 4, 4, 4, 4, 4]),
        ("constant", {"warmup_ratio": 0.5}, [4] * 8),
        ("linear", {"warmup_steps": 0}, [4, 3.5, 3, 2.5, 2, 1.5, 1, 0.5]),
        ("linear", {"warmup_ratio": 0.25}, [0, 2, 4, 10 / 3, 8 / 3, 2, 4 / 3, 2 / 3]),
    ],
)
def test_learning_rates_step_by_step(run_qlora, schedule, flags, rates):
    """In quarters of the peak: the rates of steps 1 to 8."""
    run = run_qlora(max_steps=8, learning_rate=PEAK, lr_scheduler_type=schedule, bits=16, save_steps=8, **flags)
    assert history(run, "learning_rate") == pytest.approx([PEAK * rate / 4 for rate in rates])


def test_the_default_warmup_is_three_percent_of_the_steps(run_qlora):
    """0.03 x 40 = 1.2 steps, rounded up to 2: rates 0, 1/2, 1, 1, …"""
    run = run_qlora(bits=16, max_steps=40, lr_scheduler_type="constant_with_warmup", save_steps=40)
    expected = [0, 1e-4, *[2e-4] * 38]
    assert history(run, "learning_rate") == pytest.approx(expected)


RECIPE = {"recipe": "modern", "bits": 16, "warmup_steps": 0}


def test_the_recipe_stands_for_its_flags_and_resumes_exactly(run_qlora, tmp_path):
    """The tiny Llama is 64 wide: 5e-4 * (2000 / 64) ** 0.781 = 7.35e-3."""
    run = run_qlora(**RECIPE)
    flags = "--lora_alpha 32 --lora_modules all --lr_scheduler_type linear --warmup_steps 0.0 --learning_rate 0.00735"
    assert f"--recipe modern: {flags}" in run.stderr.splitlines()
    assert history(run, "learning_rate") == pytest.approx([7.35e-3 * rate / 4 for rate in (4, 3, 2, 1)])
    assert (run.json("adapter_config.json")["r"], run.json("adapter_config.json")["lora_alpha"]) == (4, 32)
    recorded = {"recipe": "modern", "lora_alpha": 32, "learning_rate": 7.35e-3, "lr_scheduler_type": "linear"}
    assert recorded.items() <= run.json("run.json")["flags"].items()
    adapter = (run.output_dir / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run.output_dir / "checkpoint-4")
    (run.output_dir / "completed").unlink()
    resumed = run_qlora(**RECIPE)
    assert "other flags" not in resumed.stderr and history(resumed, "loss") == history(run, "loss")
    assert (resumed.output_dir / "adapter_model.safetensors").read_bytes() == adapter
    repeated = run_qlora(str(run.output_dir / "run.json"), output_dir=tmp_path / "repeated")
    assert "what differs from it:\n  nothing" in repeated.stderr
    assert (repeated.output_dir / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.parametrize("in_file", [False, True])
def test_flags_of_ones_own_override_the_recipe(run_qlora, tmp_path, in_file):
    own = {"lora_alpha": 8, "lora_modules": "attn", "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    file = tmp_path / "run.yaml"
    file.write_text("".join(f"{name}: {value}\n" for name, value in (RECIPE | own).items()))
    run = run_qlora(str(file), max_steps=2) if in_file else run_qlora(**RECIPE | own, max_steps=2)
    assert run.code == 0 and own.items() <= run.json("run.json")["flags"].items()
    assert history(run, "learning_rate") == [1e-3] * 2 and run.json("adapter_config.json")["lora_alpha"] == 8


@pytest.mark.parametrize(
    ("family", "width", "rate"),  # by a pocket calculator
    [("llama", 4096, 2.86e-4), ("qwen3", 4096, 4.73e-4), ("gemma", 2000, 5e-4), ("gemma", 4000, 3.71e-4)],
)
def test_the_recipes_rate_falls_with_the_width(family, width, rate):
    config = qlora.parse_config(["--recipe", "modern"])
    resolved = qlora.resolve_recipe(config, AutoConfig.for_model(family, hidden_size=width))
    assert resolved.training.learning_rate == resolved.flags["learning_rate"] == rate
    assert config.training.learning_rate == 2e-4  # the Config of before is left alone


def test_a_recipe_for_a_width_that_is_not_known():
    config = qlora.parse_config(["--recipe", "modern"])
    with pytest.raises(qlora.ConfigError, match=r"^--recipe: .*without hidden_size, pass --learning_rate"):
        qlora.resolve_recipe(config, PreTrainedConfig())


# ------------------------------------------------------------------------------------
# Order and length
# ------------------------------------------------------------------------------------


def test_grouping_by_length_counts_tokens_not_characters(run_qlora, tmp_path, batches):
    """All rows have the same number of characters, and half of them three times the tokens."""
    rows = [{"input": str(i), "output": ("a" if i % 2 else "€") * 9} for i in range(10, 42)]
    run_qlora(bits=16, dataset=tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows), max_steps=16, save_steps=16)
    short, long = 1 + 2 + 9 + 1, 1 + 2 + 27 + 1
    assert {len(row) for batch in batches for row in batch} == {short, long}
    mixed = sum(len({len(row) for row in batch}) == 2 for batch in batches)
    assert mixed <= 4  # at most one in each group of 8 rows; at random it would be 8 of 16


@pytest.mark.parametrize("flags", [{}, {"group_by_length": True}, {"group_by_length": False}], ids=str)
def test_an_epoch_sees_every_row_once_and_the_next_in_another_order(run_qlora, batches, flags):
    run_qlora(bits=16, max_steps=24, save_steps=24, target_max_len=64, source_max_len=200, **flags)
    rows = [row for batch in batches for row in batch]
    first, second = rows[:24], rows[24:]
    assert len(set(first)) == 24 and sorted(first) == sorted(second)
    assert first != second
    assert [len(r) for r in first] != sorted((len(r) for r in first), reverse=True)


def test_sequential_order_is_the_files(run_qlora, tmp_path, batches):
    rows = [{"input": "q", "output": chr(ord("a") + i)} for i in range(8)]
    path = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    run_qlora(bits=16, dataset=path, train_sampling_strategy="sequential")
    seen = bytes(row[2] for batch in batches for row in batch)
    assert seen == b"abcdefgh"


@pytest.mark.parametrize(
    ("side", "ids", "mask", "positions"),
    [
        ("right", [[256, 97, 257], [256, 98, 99], [98, 257, 257]], [[1, 1, 1], [1, 1, 1], [1, 1, 0]], [0, 1, 4, 6]),
        ("left", [[256, 97, 257], [256, 98, 99], [257, 98, 257]], [[1, 1, 1], [1, 1, 1], [0, 1, 1]], [0, 1, 4, 7]),
    ],
)
def test_padding_with_eos_hides_the_padding_and_not_the_eos(side, ids, mask, positions):
    rows = [
        {"input_ids": [256, 97, 257], "labels": [-100, 97, 257]},
        {"input_ids": [256, 98, 99], "labels": [-100, -100, 99]},
        {"input_ids": [98, 257], "labels": [98, 257]},  # nothing predicts the first token
    ]
    step = qlora.collate_step(rows)["step"]
    batch = qlora.padded_batch(step, [0, 1, 2], tiny.EOS, side)
    assert batch["input_ids"].tolist() == ids
    assert batch["attention_mask"].tolist() == mask
    assert batch["positions"].tolist() == positions  # of the nine, which predict a supervised token
    assert batch["targets"].tolist() == [97, 257, 99, 257]


@pytest.mark.parametrize(
    ("flags", "steps", "epochs"),
    [
        ({"num_train_epochs": 2, "max_steps": None}, 6, 2.0),
        ({"num_train_epochs": 0.5, "max_steps": None}, 2, 2 / 3),  # rounded up to whole steps
        ({"num_train_epochs": 2, "max_steps": 4}, 4, 4 / 3),
        ({"max_steps": 3}, 3, 1.0),
    ],
)
def test_steps_and_epochs(run_qlora, flags, steps, epochs):
    """24 rows in batches of 8: an epoch has three steps."""
    run = run_qlora(bits=16, per_device_train_batch_size=8, **flags)
    state = run.json("trainer_state.json")
    assert (state["global_step"], state["epoch"]) == (steps, pytest.approx(epochs))
    assert run.json("run.json")["flags"]["max_steps"] == (flags["max_steps"] or -1)


@pytest.mark.parametrize("flag", ["eval_strategy", "evaluation_strategy"])
def test_evaluation_every_so_many_steps(run_qlora, flag):
    run = run_qlora(bits=16, **{flag: "steps"}, eval_steps=2, max_steps=5)
    log = run.json("trainer_state.json")["log_history"]
    assert [entry["step"] for entry in log if "eval_loss" in entry][:2] == [2, 4]
    assert "eval_loss" in run.json("metrics.json")  # the strategy turned do_eval on


def test_the_newest_checkpoints_are_kept(run_qlora):
    """Sorted by number: by name checkpoint-10 comes before checkpoint-9."""
    run = run_qlora(bits=16, max_steps=11, save_steps=1, save_total_limit=2)
    assert {path.name for path in run.output_dir.glob("checkpoint*-*")} == {
        "checkpoint-10",
        "checkpoint-11",
    }


def test_the_best_checkpoint_is_kept_and_used(run_qlora):
    """A higher loss counts as better here, so that the first of four is the best."""
    run = run_qlora(
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        save_total_limit=2,
    )
    losses = history(run, "eval_loss")[:4]
    best = losses.index(max(losses)) + 1
    folder = run.output_dir / f"checkpoint-{best}"
    assert best < 3 and Path(run.json("trainer_state.json")["best_model_checkpoint"]) == folder
    kept = load_file(folder / "adapter_model.safetensors")
    final = load_file(run.output_dir / "adapter_model.safetensors")
    assert all(torch.equal(final[name], kept[name]) for name in kept)


def test_adapter_name_or_path_starts_from_the_adapter_with_a_fresh_optimizer(run_qlora, finished_run):
    second = run_qlora(adapter_name_or_path=finished_run.output_dir, max_steps=1, learning_rate=0.0)
    assert second.code == 0
    old, new = (load_file(run.output_dir / "adapter_model.safetensors") for run in (finished_run, second))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert second.json("trainer_state.json")["global_step"] == 1
    assert second.json("adapter_config.json")["r"] == 4


def test_peft_alone_loads_the_adapter(run_qlora, models):
    run = run_qlora(learning_rate=1e-2, bits=16)
    assert run.json("adapter_config.json")["base_model_name_or_path"] == str(models("llama"))
    base = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32)
    ids = torch.tensor([[256, *b"Order 3: where is my coffee?"]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, run.output_dir).eval()(input_ids=ids).logits
    assert (after - before).abs().max() > 1e-2


@pytest.mark.parametrize(("flag", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("phase", ["training", "evaluation"])
def test_products_are_computed_in_the_compute_dtype(run_qlora, monkeypatch, flag, dtype, phase):
    """Also where weights are stored in float32, and the fast path does not call the model's own forward."""
    dtypes, original = set(), qlora.frozen_outputs

    def spy(x, *args):
        dtypes.add(x.dtype)
        return original(x, *args)

    monkeypatch.setattr(qlora, "choose_fast_path", lambda model, base, fast, *args: fast._replace(**fast_parts(base)))
    monkeypatch.setattr(qlora, "frozen_outputs", spy)
    only = {"do_train": False} if phase == "evaluation" else {}
    run = run_qlora(**{flag: True}, do_eval=True, max_steps=1, save_strategy="no", **only)
    assert run.code == 0 and dtypes == {dtype}


def fast_parts(base):
    """The parts of the fast path that the trial finds for a LLaMA."""
    return {"body": base.base_model, "head": base.get_output_embeddings(), "attention": qlora.VARLEN_ATTENTION}


# ------------------------------------------------------------------------------------
# Optimizers
# ------------------------------------------------------------------------------------


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al. 2024) as in the package of that name: training moves y, x is the result."""

    def __init__(self, parameters, lr, momentum=0.9, **ignored):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "train_mode": False, "k": 0})

    def _swap(self, training, weight):
        for group in self.param_groups:
            if group["train_mode"] != training:
                group["train_mode"] = training
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], weight(group["momentum"]))

    def train(self):
        self._swap(True, lambda momentum: 1 - momentum)

    def eval(self):
        self._swap(False, lambda momentum: 1 - 1 / momentum)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"]
            share = 1 / (group["k"] + 1)
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, share).add_(p.grad, alpha=group["lr"] * (group["momentum"] * (1 - share) - 1))
                z.sub_(p.grad, alpha=group["lr"])
            group["k"] += 1


def test_a_schedule_free_optimizer_saves_its_averages_and_resumes_exactly(run_qlora, monkeypatch, tmp_path):
    choose = staticmethod(lambda args, *rest: (ScheduleFree, {"lr": args.learning_rate}))
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", choose)
    flags = {"bits": 16, "learning_rate": 0.5, "max_grad_norm": 0, "max_steps": 4, "save_steps": 1}
    straight = run_qlora(**flags, output_dir=tmp_path / "straight")
    assert straight.code == 0
    saved = torch.load(straight.output_dir / "checkpoint-4/optimizer.pt")
    assert saved["param_groups"][0]["train_mode"] is False

    # x is the mean of z over the steps, as every step weighs the same
    steps = [torch.load(straight.output_dir / f"checkpoint-{n}/optimizer.pt")["state"] for n in (1, 2, 3, 4)]
    adapter = load_file(straight.output_dir / "adapter_model.safetensors")
    means = [sum(state[i]["z"] for state in steps) / 4 for i in range(len(adapter))]
    for mean in means:
        assert any(mean.shape == w.shape and torch.allclose(mean, w, rtol=1e-4, atol=1e-6) for w in adapter.values())

    resumed = run_qlora(**flags | {"max_steps": 2}, output_dir=tmp_path / "resumed")
    assert resumed.code == 0 and run_qlora(**flags, output_dir=tmp_path / "resumed").code == 0
    again = load_file(resumed.output_dir / "adapter_model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in adapter.items())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(str(name.value), marks=[] if name in ("lion_32bit", "lomo") else [pytest.mark.slow])
        for name in OptimizerNames
    ],
)
def test_every_optimizer_trains_or_is_refused_in_one_line(run_qlora, name):
    run = run_qlora(optim=name, max_steps=3, save_strategy="no")
    if run.code == 0:
        weights = load_file(run.output_dir / "adapter_model.safetensors")
        assert len(history(run, "loss")) == 3 and all(w.any() for n, w in weights.items() if "lora_B" in n)
    else:
        assert run.code == 2 and "Traceback" not in run.stderr and run.stderr.splitlines()[-1].startswith("error: ")
        print(run.stderr.splitlines()[-1])


# ------------------------------------------------------------------------------------
# Rows on their way to the model
# ------------------------------------------------------------------------------------


def test_learnt_positions_do_not_count_padding_on_the_left(run_qlora, models, tmp_path):
    """GPT-2 looks its positions up; OPT counts them by the mask."""
    flags = {"model_name_or_path": models("gpt2", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0), "bits": 16}
    flags |= {"per_device_train_batch_size": 4, "fast_path": False, "do_eval": True}
    right, left = (run_qlora(**flags, padding_side=side, output_dir=tmp_path / side) for side in ("right", "left"))
    assert history(left, "loss") == pytest.approx(history(right, "loss"), rel=1e-5)
    assert left.json("eval_results.json")["eval_loss"] == pytest.approx(
        right.json("eval_results.json")["eval_loss"], rel=1e-5
    )


DYNAMIC = json.dumps({"rope_type": "dynamic", "factor": 2.0})


def test_dynamic_rotary_embeddings_do_not_remember_longer_rows(run_qlora, models, tmp_path):
    """Each row of the evaluation counts as if it were the first that the model sees, and a resume is exact."""
    base = models("llama", max_position_embeddings=16)
    rows = [{"input": "question " * n, "output": "answer " * n} for n in (1, 5, 3, 2, 4, 1)]
    flags = {"model_name_or_path": base, "rope_scaling": DYNAMIC, "bits": 16, "source_max_len": 64}
    flags |= {"target_max_len": 64, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "max_steps": 6}
    flags |= {"dataset": tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows), "train_sampling_strategy": "sequential"}
    straight = run_qlora(**flags, learning_rate=0.0, output_dir=tmp_path / "straight")
    means = []
    for row in rows:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = model.config
        config.rope_parameters |= json.loads(DYNAMIC)
        fresh = AutoModelForCausalLM.from_config(config).eval()
        fresh.load_state_dict(model.state_dict())
        means.append(token_losses(fresh, row).mean().item())
    assert history(straight, "loss") == pytest.approx(means, rel=1e-4)

    flags |= {"learning_rate": 1e-2, "save_steps": 3}
    straight = run_qlora(**flags, output_dir=tmp_path / "learning")
    first = run_qlora(**flags | {"max_steps": 3}, output_dir=tmp_path / "resumed")
    assert first.code == 0 and run_qlora(**flags, output_dir=tmp_path / "resumed").code == 0
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("learning", "resumed"))
    assert all(torch.equal(one[name], value) for name, value in other.items())


LONG_ROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
LONG_ROPE |= {"original_max_position_embeddings": 32}


@pytest.mark.parametrize("rope", [DYNAMIC, json.dumps(LONG_ROPE)], ids=["dynamic", "longrope"])
def test_a_long_row_does_not_stretch_the_rotary_embedding_of_its_neighbours(run_qlora, models, tmp_path, rope):
    """Rows of a step, regrouped or packed, and of an evaluation count as those that go through the model alone."""
    rows = [{"input": "question " * n, "output": "answer " * n} for n in (1, 4, 2, 1)]
    data = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    flags = {"model_name_or_path": models("llama", max_position_embeddings=32), "rope_scaling": rope, "bits": 16}
    flags |= {"source_max_len": 64, "target_max_len": 64, "dataset": data, "eval_dataset": data, "do_eval": True}
    flags |= {"max_steps": 1, "gradient_accumulation_steps": 4, "learning_rate": 0.0}
    alone = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    numbers = []
    for name, own in (
        ("alone", {**alone, "auto_batch": False, "fast_path": False}),
        ("regrouped", alone),
        ("together", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}),
        ("packed", {**alone, "packing": True}),
    ):
        run = run_qlora(**flags | own, output_dir=tmp_path / name)
        assert "one row at a time: a long one would change the others" in run.stderr
        (entry,) = (e for e in run.json("trainer_state.json")["log_history"] if "loss" in e)
        numbers.append((entry["loss"], entry["grad_norm"]))
    assert numbers == [pytest.approx(numbers[0], rel=1e-5)] * 4
    short = run_qlora(**flags | {"source_max_len": 8, "target_max_len": 8}, output_dir=tmp_path / "short")
    assert "one row at a time" not in short.stderr


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_of_many_rows_needs_few_open_files(run_qlora, tmp_path, packing):
    """Workers send tensors through files: with one for each row, this would hang."""
    rows = [{"input": f"row {i}", "output": "yes"} for i in range(520)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        run = run_qlora(
            dataset=tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows), per_device_train_batch_size=8,
            gradient_accumulation_steps=1 if packing else 32, auto_batch=True, packing=packing, source_max_len=32,
            target_max_len=160, dataloader_num_workers=1 if packing else 3, max_steps=2, save_strategy="no",
        )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert run.code == 0 and len(history(run, "loss")) == 2
