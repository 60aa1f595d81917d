"""Losses, gradients or weights that are not finite: the run stops with one line that names step and rows.

The last good checkpoint stays.
"""

import json
import re
import shutil
from pathlib import Path

import accelerate
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.trainer_callback import CallbackHandler

import qlora


def message_of(run, rows: bool = True) -> str:
    """The one line of a run that ended with exit status 2; it names rows by file and line."""
    assert run.code == 2 and "Traceback" not in run.stderr
    (message,) = re.findall(r"error: (.*)", run.stderr)
    assert not rows or re.search(r"on rows \S+\.jsonl:\d+", message)
    assert not (run.output_dir / "completed").exists()
    return message


def steps_kept(folder: Path) -> set[int]:
    return {int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")}


def changed_copy(source: Path, target: Path, change) -> Path:
    """A copy of a model or adapter, `change` applied to its dictionary of tensors."""
    shutil.copytree(source, target)
    (file,) = target.glob("*model.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return target


def poison(name: str, *index: int, value: float = float("nan")):
    def change(tensors):
        tensors[name][index] = value

    return change


# ------------------------------------------------------------------------------------
# Not finite
# ------------------------------------------------------------------------------------


def test_a_learning_rate_that_is_far_too_high(run_qlora):
    """The first update ruins the weights, and the loss of the second step shows it."""
    run = run_qlora(learning_rate=1e30, save_steps=3, max_grad_norm=0)
    message = message_of(run)
    assert message.startswith("step 2:") and "not finite" in message and "--learning_rate 1e+30" in message
    assert not steps_kept(run.output_dir) and "no checkpoint was saved" in message


def test_weights_that_are_not_finite_are_never_saved(run_qlora, monkeypatch):
    """The update of step 3 leaves one: the save that is due then must not happen."""
    on_step_end = CallbackHandler.on_step_end

    def poison_weight(self, args, state, control):
        if state.global_step == 3:
            next(p for p in self.model.parameters() if p.requires_grad).data.view(-1)[0] = float("inf")
        return on_step_end(self, args, state, control)

    monkeypatch.setattr(CallbackHandler, "on_step_end", poison_weight)
    run = run_qlora(max_steps=3, save_steps=1)
    assert "step 3:" in message_of(run, rows=False) and "not finite" in message_of(run, rows=False)
    assert steps_kept(run.output_dir) == {1, 2} and not (run.output_dir / "adapter_model.safetensors").exists()


def test_the_last_good_checkpoint_stays_and_a_rerun_resumes_from_it(run_qlora, monkeypatch):
    """The learning rate jumps for step 5, whose update ruins the weights before the next save, at step 6."""
    on_step_begin = CallbackHandler.on_step_begin

    def jump(self, args, state, control):
        if state.global_step == 4:
            for group in self.optimizer.param_groups:
                group["lr"] = 1e30
        return on_step_begin(self, args, state, control)

    flags = {"max_steps": 8, "save_steps": 2, "logging_steps": 100, "max_grad_norm": 0}
    with monkeypatch.context() as patch:
        patch.setattr(CallbackHandler, "on_step_begin", jump)
        run = run_qlora(**flags)
    assert "step 6: the loss is not finite" in message_of(run)
    assert "checkpoint-4 stays" in message_of(run) and steps_kept(run.output_dir) == {2, 4}
    again = run_qlora(**flags)
    assert again.code == 0 and "checkpoint-4" in again.stderr and steps_kept(again.output_dir) == {2, 4, 6, 8}
    straight = run_qlora(**flags, output_dir=run.output_dir.parent / "straight")
    one, other = (load_file(r.output_dir / "adapter_model.safetensors") for r in (again, straight))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("save_steps", [1, 2])
def test_one_bad_row_is_named_without_the_others_of_its_step(run_qlora, models, tmp_path, save_steps):
    """The embedding of the letter Z is infinite, and one row of four has that letter."""
    name = "model.embed_tokens.weight"
    model = changed_copy(models("llama"), tmp_path / "model", poison(name, ord("Z"), 5, value=float("inf")))
    rows = [{"input": f"row {i}", "output": "Z" if i == 6 else "a"} for i in range(12)]
    data = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    run = run_qlora(
        model_name_or_path=model, dataset=data, per_device_train_batch_size=1, gradient_accumulation_steps=4,
        train_sampling_strategy="sequential", save_steps=save_steps, logging_steps=100,
        auto_batch=False,
    )  # fmt: skip
    message = message_of(run)
    assert message.startswith("step 2: the loss is not finite")
    assert re.findall(r"rows\.jsonl:\d+", message) == ["rows.jsonl:7"]
    assert "the step's other rows are fine" in message
    assert steps_kept(run.output_dir) == ({1} if save_steps == 1 else set())


def test_a_row_that_overflows_is_named_alone(run_qlora, models, tmp_path):
    """All weights are finite, but the model divides by zero at one letter."""
    model = tmp_path / "divides_by_zero"  # transformers caches remote code by the folder's name
    shutil.copytree(models("remote_code"), model)
    code, begin = (model / "modeling_toy.py").read_text(), "x = self.embed_tokens(input_ids)"
    assert begin in code
    code = code.replace(begin, f"x = self.embed_tokens(input_ids) / (input_ids != {ord('Z')}).float().unsqueeze(-1)")
    (model / "modeling_toy.py").write_text(code)
    rows = [{"input": f"row {i}", "output": "Z" if i == 2 else "a"} for i in range(4)]
    run = run_qlora(
        model_name_or_path=model, trust_remote_code=True, bits=16, per_device_train_batch_size=1,
        dataset=tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows), gradient_accumulation_steps=4,
        train_sampling_strategy="sequential", auto_batch=False,
    )  # fmt: skip
    message = message_of(run)
    assert re.findall(r"rows\.jsonl:\d+", message) == ["rows.jsonl:3"] and "other rows are fine" in message


# ------------------------------------------------------------------------------------
# Gradients
# ------------------------------------------------------------------------------------


def test_a_layer_that_is_never_called_gets_no_adapter(run_qlora, models, tmp_path):
    model = tmp_path / "has_a_spare_layer"  # transformers caches remote code by the folder's name
    shutil.copytree(models("remote_code"), model)
    code = (model / "modeling_toy.py").read_text()
    made = re.search(r"( +)self\.(wqkv) = nn\.Linear.*\n", code)
    (model / "modeling_toy.py").write_text(
        code.replace(made.group(), f"{made.group()}{made.group(1)}self.spare = nn.Linear(64, 64, bias=False)\n")
    )
    weights = load_file(model / "model.safetensors")
    layers = {name.rpartition("wqkv")[0] for name in weights if "wqkv" in name}
    weights |= {f"{layer}spare.weight": torch.randn(64, 64) for layer in layers}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    flags = {"model_name_or_path": model, "trust_remote_code": True, "bits": 16, "max_steps": 1}
    run = run_qlora(**flags)
    names = load_file(run.output_dir / "adapter_model.safetensors")
    assert run.code == 0 and len(names) == 16 and not any("spare" in name for name in names)
    alone = run_qlora(**flags, lora_modules="spare", output_dir=tmp_path / "nothing")
    assert alone.code == 2 and "--lora_modules: no linear layer is called 'spare'" in alone.stderr


@pytest.mark.parametrize("family", ["deepseek_v32", "gemma3n_text"])
def test_layers_whose_output_only_chooses_or_whose_weight_is_read_get_no_adapter(family):
    """DeepSeek's indexer picks tokens, and in training Gemma 3n reads a weight without calling its layer."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"these transformers do not know {family}")
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 260, "pad_token_id": 0}
    shape |= {"bos_token_id": 1, "eos_token_id": 2, "intermediate_size": 128, "head_dim": 16}
    shape |= {
        "deepseek_v32": {"num_key_value_heads": 4, "first_k_dense_replace": 2,
            "index_n_heads": 4, "index_head_dim": 16, "index_topk": 8,
            "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
        "gemma3n_text": {"num_key_value_heads": 2, "laurel_rank": 8, "activation_sparsity_pattern": None,
            "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 260},
    }[family]  # fmt: skip
    flags = ["--model_name_or_path", "none", "--bits", "16", "--objective", "clm"]
    config, base = qlora.parse_config(flags), AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
    model = qlora.make_trainable(base.float(), config, None)
    part = "indexer" if family == "deepseek_v32" else "correction_coefs"
    adapted = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert (
        adapted and not any(part in name for name in adapted) and any(part in name for name, _ in base.named_modules())
    )


def test_steps_without_a_masked_token_do_not_stop_the_run(run_qlora, models, tmp_path):
    """Short rows, one a step: three of four supervise no token, and a loss over no tokens is 0."""
    rows = [{"input": word} for word in ("a", "bc", "d", "ef", "g", "hi")]
    data = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    run = run_qlora(
        model_name_or_path=models("encoder", family="bert"), dataset=data, mask_prob=0.05,
        per_device_train_batch_size=1, max_steps=12, save_steps=100, target_max_len=None,
    )  # fmt: skip
    assert run.code == 0
    log = json.loads((run.output_dir / "trainer_state.json").read_text())["log_history"]
    assert sum(entry.get("grad_norm") == 0 for entry in log) >= 6


def test_steps_that_the_fp16_scaler_skips_do_not_stop_the_run(run_qlora, monkeypatch):
    """The scale starts too high for fp16 and is halved until gradients fit; then training continues.

    accelerate uses a gradient scaler on a GPU only; torch has one for the CPU too.
    """
    init = accelerate.Accelerator.__init__

    def with_scaler(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.scaler, self.native_amp = torch.amp.GradScaler("cpu", init_scale=2.0**24), True

    monkeypatch.setattr(accelerate.Accelerator, "__init__", with_scaler)
    run = run_qlora(fp16=True, max_steps=30, save_steps=100, learning_rate=1e-3)
    norms = [e["grad_norm"] for e in run.json("trainer_state.json")["log_history"] if "grad_norm" in e]
    skipped = sum(norm != norm or norm == float("inf") for norm in norms)
    assert run.code == 0 and 0 < skipped < 20 and len(norms) == 30


def test_fp16_that_overflows_in_every_step_stops_the_run(run_qlora, monkeypatch):
    """A scale can't be the cause after 20 halvings: without an end the run would save what was never trained."""
    init = accelerate.Accelerator.__init__

    def with_scaler(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.scaler, self.native_amp = torch.amp.GradScaler("cpu", init_scale=2.0**120), True

    monkeypatch.setattr(accelerate.Accelerator, "__init__", with_scaler)
    run = run_qlora(fp16=True, max_steps=40, save_steps=100)
    message = message_of(run)
    assert message.startswith("step 21: the gradient norm is not finite") and "train with --bf16" in message
    assert not (run.output_dir / "completed").exists()


@pytest.mark.parametrize("value", [None, float("inf")])
def test_the_trainers_own_check_sees_only_what_is_there(run_qlora, models, tmp_path, value):
    """--debug underflow_overflow watches every module's input and output."""
    model = models("llama")
    if value is not None:
        model = changed_copy(model, tmp_path / "model", poison("model.norm.weight", 3, value=value))
    run = run_qlora(model_name_or_path=model, debug="underflow_overflow", recompute_layers="all")
    assert (run.code == 0) == (value is None)
    assert value is None or (run.code == 2 and "error: --debug underflow_overflow: a value is not" in run.stderr)
