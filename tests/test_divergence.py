"""Numbers that go wrong: the run stops with one line that says when, on which rows and why, and saves nothing bad."""

import json
import re
import shutil
from pathlib import Path

import accelerate
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import qlora


def message_of(run) -> str:
    """The one line of a run that ended with exit status 2, which names rows by file and line."""
    assert run.code == 2 and "Traceback" not in run.stderr
    (message,) = re.findall(r"error: (.*)", run.stderr)
    assert re.search(r"on rows \S+\.jsonl:\d+", message)
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


@pytest.mark.parametrize(("save_steps", "step", "kept"), [(1, 1, set()), (3, 2, set())])
def test_a_learning_rate_that_is_far_too_high(run_qlora, save_steps, step, kept):
    """The first update ruins the weights. They are tried before they are saved; else the second step's loss tells."""
    run = run_qlora(learning_rate=1e30, save_steps=save_steps, logging_steps=1, max_grad_norm=0)
    message = message_of(run)
    assert f"step {step}:" in message and "not finite" in message and "--learning_rate 1e+30" in message
    assert steps_kept(run.output_dir) == kept and "no checkpoint was saved" in message


def test_the_last_good_checkpoint_stays_and_a_rerun_goes_on_from_it(run_qlora, monkeypatch):
    """The rate rises after step 4 by a mistake of the schedule; nobody looks before step 6 or 8."""
    plain = qlora.QLoRATrainer.training_step

    def rise(self, *args, **kwargs):
        if self.state.global_step == 4:
            for group in self.optimizer.param_groups:
                group["lr"] = 1e30
        return plain(self, *args, **kwargs)

    flags = {"max_steps": 8, "save_steps": 2, "logging_steps": 100, "max_grad_norm": 0}
    with monkeypatch.context() as patch:
        patch.setattr(qlora.QLoRATrainer, "training_step", rise)
        run = run_qlora(**flags)
    assert "step 6: the loss is not finite" in message_of(run)  # step 5's update; its save is due at 6
    assert "checkpoint-4 stays" in message_of(run) and steps_kept(run.output_dir) == {2, 4}
    again = run_qlora(**flags)
    assert again.code == 0 and "checkpoint-4" in again.stderr and steps_kept(again.output_dir) == {2, 4, 6, 8}
    straight = run_qlora(**flags, output_dir=run.output_dir.parent / "straight")
    one, other = (load_file(r.output_dir / "adapter_model.safetensors") for r in (again, straight))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("save_steps", [1, 2])
def test_one_poisoned_row_is_told_from_the_others(run_qlora, models, tmp_path, save_steps):
    """The letter Z is in one row only; what it is embedded as is infinite. Three other rows share its step."""
    name = "model.embed_tokens.weight"
    model = changed_copy(models("llama"), tmp_path / "model", poison(name, ord("Z"), 5, value=float("inf")))
    rows = [{"input": f"row {i}", "output": "Z" if i == 6 else "a"} for i in range(12)]
    data = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    run = run_qlora(
        model_name_or_path=model, dataset=data, per_device_train_batch_size=1, gradient_accumulation_steps=4,
        train_sampling_strategy="sequential", save_steps=save_steps, logging_steps=100,
    )  # fmt: skip
    message = message_of(run)
    assert message.startswith("step 2: the loss is not finite") and re.findall(r"rows\.jsonl:\d+", message) == [
        "rows.jsonl:7"
    ]
    assert "embed_tokens" in message and "damaged" in message
    assert steps_kept(run.output_dir) == ({1} if save_steps == 1 else set())


def test_a_row_that_overflows_is_named_alone(run_qlora, models, tmp_path):
    """All weights are finite, but the model divides by zero at one letter."""
    model = tmp_path / "that_divides"  # a name of its own: transformers caches remote code by it
    shutil.copytree(models("remote_code"), model)
    code, begin = (model / "modeling_toy.py").read_text(), "x = self.embed_tokens(input_ids)"
    assert begin in code
    code = code.replace(begin, f"x = self.embed_tokens(input_ids) / (input_ids != {ord('Z')}).float().unsqueeze(-1)")
    (model / "modeling_toy.py").write_text(code)
    rows = [{"input": f"row {i}", "output": "Z" if i == 2 else "a"} for i in range(4)]
    run = run_qlora(
        model_name_or_path=model, trust_remote_code=True, bits=16, per_device_train_batch_size=1,
        dataset=tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows), gradient_accumulation_steps=4,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    message = message_of(run)
    assert re.findall(r"rows\.jsonl:\d+", message) == ["rows.jsonl:3"] and "other rows are fine" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_base_is_named(run_qlora, models, tmp_path, value):
    model = changed_copy(models("llama"), tmp_path / "model", poison("model.norm.weight", 3, value=value))
    run = run_qlora(model_name_or_path=model, save_steps=1)
    message = message_of(run)
    assert "step 1:" in message and "model.norm.weight is not finite" in message
    assert not steps_kept(run.output_dir)


def test_numbers_are_read_one_step_late_unless_something_is_due(run_qlora, monkeypatch):
    """To read them at once is to wait for the GPU at every step."""
    read, plain = [], qlora.QLoRATrainer._check_numbers

    def spy(self, step, *numbers):
        read.append((self.state.global_step, step))
        plain(self, step, *numbers)

    monkeypatch.setattr(qlora.QLoRATrainer, "_check_numbers", spy)
    assert run_qlora(max_steps=6, save_steps=4, logging_steps=100).code == 0
    assert read == [(2, 1), (3, 2), (4, 3), (4, 4), (6, 5), (6, 6)]


# ------------------------------------------------------------------------------------
# Nothing is supervised
# ------------------------------------------------------------------------------------


@pytest.fixture
def dead_adapter(run_qlora, tmp_path):
    """An adapter whose A and B are zero: each one's gradient has the other as a factor."""
    first = run_qlora(output_dir=tmp_path / "first", max_steps=1)

    def zero(tensors):
        for tensor in tensors.values():
            tensor.zero_()

    return changed_copy(first.output_dir, tmp_path / "dead", zero)


def test_a_gradient_of_exactly_zero(run_qlora, dead_adapter):
    run = run_qlora(adapter_name_or_path=dead_adapter, max_steps=10, save_steps=1, logging_steps=100)
    message = message_of(run)
    assert message.startswith("step 3: the gradient norm is exactly zero, 3 times") and "A and B" in message
    assert steps_kept(run.output_dir) == set()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rate_that_is_lost_in_rounding(run_qlora, dtype):
    """B must not be zero, to which the smallest number can be added."""
    run = run_qlora(init_lora_weights=False, lora_dtype=dtype, learning_rate=1e-30, max_steps=10, save_steps=100)
    message = message_of(run)
    assert "no trained value has changed in 3 steps" in message and f"1e-30 is lost in rounding to {dtype}" in message


@pytest.mark.parametrize(
    "flags",
    [
        {"learning_rate": 0.0},
        {"learning_rate": 1e-3, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 8},
        {
            "learning_rate": 1e-3,
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_stable_steps": 1, "num_decay_steps": 2},  # and then zero
        },
    ],
    ids=str,
)
def test_a_rate_of_zero_that_was_asked_for_stops_nothing(run_qlora, flags):
    """Adapters in bfloat16, in which the small rates of warm-up and end change nothing."""
    run = run_qlora(init_lora_weights=False, lora_dtype="bfloat16", max_steps=10, **flags)
    assert run.code == 0


def test_a_parameter_that_no_gradient_reaches(run_qlora, models, tmp_path):
    """A linear layer that the model's forward never calls gets adapters like all others."""
    model = tmp_path / "with_a_spare_layer"  # a name of its own: transformers caches remote code by it
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
    flags = {"model_name_or_path": model, "trust_remote_code": True, "bits": 16, "max_steps": 6, "save_steps": 100}
    run = run_qlora(**flags)
    message = message_of(run)
    assert "step 3: no gradient reaches" in message and "spare.lora_A" in message and "--lora_modules" in message
    assert run_qlora(**flags, lora_modules="wqkv,wo,up,down").code == 0


def test_windows_in_which_no_token_is_masked_are_no_zero_gradients(run_qlora, models, tmp_path):
    """Short rows, one a step: three of four have nothing to learn, and a loss of 0 / 0 tokens is none."""
    rows = [{"input": word} for word in ("a", "bc", "d", "ef", "g", "hi")]
    data = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    run = run_qlora(
        model_name_or_path=models("encoder", family="bert"), dataset=data, mask_prob=0.05,
        per_device_train_batch_size=1, max_steps=12, save_steps=100, target_max_len=None,
    )  # fmt: skip
    assert run.code == 0
    log = json.loads((run.output_dir / "trainer_state.json").read_text())["log_history"]
    assert sum(entry.get("grad_norm") == 0 for entry in log) >= 6


# ------------------------------------------------------------------------------------
# fp16's scaler
# ------------------------------------------------------------------------------------


@pytest.fixture
def scaler(monkeypatch):
    """accelerate gives fp16 its gradient scaler on a GPU only; torch has one for the CPU too."""
    plain = accelerate.Accelerator.__init__

    def with_scaler(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        self.scaler, self.native_amp = torch.amp.GradScaler("cpu", init_scale=SCALES["init"]), True

    monkeypatch.setattr(accelerate.Accelerator, "__init__", with_scaler)


SCALES = {"init": 2.0**16}


def test_steps_that_the_scaler_skips_are_no_error(run_qlora, scaler, monkeypatch):
    """The scale begins too high for fp16, is halved until gradients fit, and training then goes on."""
    monkeypatch.setitem(SCALES, "init", 2.0**24)
    run = run_qlora(fp16=True, max_steps=30, save_steps=100, learning_rate=1e-3)
    norms = [e["grad_norm"] for e in run.json("trainer_state.json")["log_history"] if "grad_norm" in e]
    skipped = sum(norm != norm or norm == float("inf") for norm in norms)
    assert run.code == 0 and 0 < skipped < qlora.SKIPS and len(norms) == 30


def test_overflow_that_goes_on_is_one(run_qlora, scaler, monkeypatch):
    """Gradients that no scale makes finite: the backward pass of one layer gives infinity, its forward pass not."""

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    plain = qlora.summed_loss
    monkeypatch.setattr(qlora, "summed_loss", lambda *a, **k: Overflow.apply(plain(*a, **k)))
    run = run_qlora(fp16=True, max_steps=40, save_steps=100, chunked_head=False)
    message = message_of(run)
    assert message.startswith(f"step {qlora.SKIPS}: fp16 overflowed") and "--bf16" in message
    assert not steps_kept(run.output_dir)
