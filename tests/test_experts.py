"""Mixtures of experts: stacks of experts in 4 bit, adapters on them, and their own fast path.

Values come from plain transformers and peft on a base whose weights are what the 4-bit ones stand for.
"""

import contextlib
import json
from unittest import mock

import pytest
import reference
import tiny
import torch
from accelerate import Accelerator
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AfmoeConfig, AutoModelForCausalLM

import qlora

FAMILIES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "deepseek_v3",
    "glm4_moe",
    "granitemoe",
    "phimoe",
    "llama4",
]
SMALL = {"learning_rate": 1e-2, "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}


def raise_out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def plain_base(folder, packed):
    """The base as transformers loads it, in float32, with the values that packed weights stand for."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in packed.named_parameters():
        if hasattr(weight, "quant_state"):
            values = dequantize_4bit(weight.data, weight.quant_state)
            plain.get_parameter(name).data.copy_(values)
    return plain


def gradients(model, ids):
    """Loss, and the gradient of every adapter weight, by name."""
    model.train()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_in_4_bit_train_as_in_plain_peft(models, tmp_path, family):
    folder = models(family)
    config = reference.parse(folder, bits=4, lora_r=8)
    base = qlora.load_model(config, qlora.load_model_config(config, str(folder)), str(folder))
    plain = plain_base(folder, base)
    packed = [weight for _, weight in qlora.stacked_experts(base).values()]
    assert packed and all(hasattr(weight, "quant_state") for weight in packed)
    model = qlora.make_trainable(base, config, None)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(saved["target_parameters"]) == len(packed)
    # 0.21 takes the dense and shared layers of two families for experts (https://github.com/huggingface/peft/issues/3711)
    mistaken = mock.patch("peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers")
    with mistaken if family in ("deepseek_v3", "glm4_moe") else contextlib.nullcontext():
        other = PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    ids = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    loss, wanted = gradients(other, ids)
    for way in ("unpacked", "grouped"):
        if way == "grouped":
            others = qlora.group_experts(model)
            assert len(others) == (family == "llama4"), "whose experts get all tokens in one batched product"
        model.zero_grad()
        found, own = gradients(model, ids)
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-5)
        assert own.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(own[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def adapter(run) -> dict[str, torch.Tensor]:
    return load_file(run.output_dir / "adapter_model.safetensors")


def test_a_mixture_trains_resumes_predicts_and_is_merged(run_qlora, models, tmp_path):
    """Bit for bit over a resume; merged into the published base, and into the values that training saw."""
    flags = {"model_name_or_path": models("mixtral"), **SMALL}
    whole = run_qlora(**flags, output_dir=tmp_path / "whole", merged_output_dir=tmp_path / "merged")
    half = run_qlora(**flags | {"max_steps": 2}, output_dir=tmp_path / "half")
    resumed = run_qlora(**flags, output_dir=tmp_path / "half")
    assert [run.code for run in (whole, half, resumed)] == [0, 0, 0]
    assert "not quantised" not in whole.stderr and "after loading" not in whole.stderr
    first, second = adapter(whole), adapter(resumed)
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    assert all(tensor.any() for name, tensor in first.items() if "experts" in name)
    again = run_qlora(
        **flags, output_dir=tmp_path / "whole", do_train=False, merge_base="dequantized",
        merged_output_dir=tmp_path / "dequantized", do_predict=True, predict_with_generate=True, max_new_tokens=3,
    )  # fmt: skip
    assert again.code == 0 and len((again.output_dir / "predictions.jsonl").read_text().splitlines()) > 1
    packed = load_file(tmp_path / "dequantized" / "model.safetensors")
    published = load_file(tmp_path / "merged" / "model.safetensors")
    stored = load_file(models("mixtral") / "model.safetensors")
    assert {*packed} == {*published} == {*stored}, "the published layout, an expert at a time"


@pytest.mark.parametrize("bits", [4, 32])
def test_the_fast_path_of_experts_trains_to_the_same(run_qlora, models, tmp_path, monkeypatch, bits):
    flags = {"model_name_or_path": models("qwen3_moe"), "bits": bits, **SMALL, "max_steps": 2}
    fast = run_qlora(**flags, fast_path=True, output_dir=tmp_path / "fast")
    monkeypatch.setattr(qlora, "group_experts", None)  # --fast_path False does not call it
    slow = run_qlora(**flags, fast_path=False, output_dir=tmp_path / "slow")
    assert fast.code == slow.code == 0 and "unpack whole stacks" not in fast.stderr
    for name, tensor in adapter(slow).items():
        torch.testing.assert_close(adapter(fast)[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_each_expert_has_a_rank_of_its_own(run_qlora, models):
    """--lora_r over the experts of a token, here two, unless the flag says otherwise; dropout is said to leave them."""
    base = {"model_name_or_path": models("mixtral"), "lora_r": 8, "max_steps": 1}
    run = run_qlora(**base, lora_dropout=0.1)
    shapes = {tuple(t.shape) for n, t in adapter(run).items() if "experts" in n and "lora_A" in n}
    assert shapes == {(4 * 4, 64), (4 * 4, 128)} and "--lora_dropout: experts get none" in run.stderr
    assert run.json("adapter_config.json")["lora_dropout"] == 0, "which plain peft would refuse to load"
    run = run_qlora(**base, expert_lora_r=3, lora_modules="gate_up_proj", overwrite_output_dir=True)
    assert {n.rpartition("experts.")[2]: tuple(t.shape) for n, t in adapter(run).items() if "layers.0" in n} == {
        "lora_A.weight": (4 * 3, 64), "lora_B.weight": (256, 4 * 3)
    }  # fmt: skip
    assert run_qlora(**base, expert_lora_r=0).code == 2


def test_layers_beside_experts_keep_their_dropout(models):
    """peft refuses dropout where it adapts experts."""
    folder = str(models("mixtral"))
    config = qlora.parse_config(["--model_name_or_path", folder, "--lora_dropout", "0.3"])
    model = qlora.load_model(config, qlora.load_model_config(config, folder), folder)
    layers = [m for m in qlora.make_trainable(model, config, None).modules() if isinstance(m, LoraLayer)]
    rates = [(hasattr(m, "parameter_name"), getattr(m.lora_dropout["default"], "p", 0.0)) for m in layers]
    assert sorted(rates) == [(False, 0.3)] * 8 + [(True, 0.0)] * 4


def test_experts_without_tokens_have_no_gradient(models):
    config = reference.parse(models("mixtral"), bits=4, lora_r=8)
    base = qlora.load_model(config, qlora.load_model_config(config, str(models("mixtral"))), str(models("mixtral")))
    model = qlora.make_trainable(base, config, None)
    assert qlora.group_experts(model) == []
    with torch.no_grad():  # a router that sends all tokens to the first two
        for name, weight in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                weight.zero_()
    _, found = gradients(model, torch.randint(5, 250, (1, 16)))
    for name, gradient in found.items():
        if "experts" in name:
            rows = (
                gradient.unflatten(0, (4, -1)) if "lora_A" in name else gradient.unflatten(1, (-1, 4)).permute(2, 0, 1)
            )
            seen = [bool(expert.any()) for expert in rows]
            assert sum(seen) == 2, f"{name}: {seen}"


@pytest.mark.parametrize("few_tokens", [False, True])
def test_the_routers_loss_is_added_and_reported(run_qlora, models, tmp_path, monkeypatch, few_tokens):
    """As the config asks: loss and gradient norm of a row are the model's own. It is no part of eval_loss."""
    if few_tokens:  # a plan as on a small GPU, whose layers are recomputed in another way
        monkeypatch.setattr(qlora, "choose_step_plan", lambda *_: (qlora.StepPlan(None, 528, 2), {}))
    base = models("mixtral", output_router_logits=True, router_aux_loss_coef=2.0)
    data = tiny.rows_to_jsonl(tmp_path / "row.jsonl", [{"text": "Owls sleep by day."}])
    flags = {"bits": 32, "max_steps": 2, "logging_steps": 2, "gradient_accumulation_steps": 1, "learning_rate": 0.0}
    backward, failing = Accelerator.backward, iter([raise_out_of_memory] * (not few_tokens))  # that pass counts nowhere
    monkeypatch.setattr(Accelerator, "backward", lambda *args, **kwargs: next(failing, backward)(*args, **kwargs))
    run = run_qlora(model_name_or_path=base, dataset=data, eval_dataset=data, do_eval=True, **flags)
    logs = {k: v for entry in run.json("trainer_state.json")["log_history"] for k, v in entry.items()}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    other = PeftModel.from_pretrained(model, run.output_dir, is_trainable=True)
    ids = torch.tensor([[tiny.BOS, *b"Owls sleep by day.", tiny.EOS]])
    outputs = other(input_ids=ids, labels=ids)
    outputs.loss.backward()
    norm = torch.stack([p.grad.norm() for p in other.parameters() if p.grad is not None]).norm().item()
    assert logs["router_loss"] == pytest.approx(outputs.aux_loss.item(), rel=1e-5)
    assert f"routers' loss {outputs.aux_loss.item():.4g}" in run.stderr
    assert logs["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert logs["loss"] == pytest.approx(outputs.loss.item(), rel=1e-3)
    assert run.json("eval_results.json")["eval_loss"] == pytest.approx(
        (outputs.loss - 2 * outputs.aux_loss).item(), rel=1e-5
    )


def test_a_model_with_a_routers_loss_predicts(run_qlora, models, tmp_path):
    """What it predicts without one: the loss would need the prompt beside each new token."""
    flags = {"do_train": False, "do_predict": True, "predict_with_generate": True, "max_new_tokens": 4}
    texts = []
    for own in ({}, {"output_router_logits": True}):
        base, folder = models("mixtral", **own), tmp_path / str(len(texts))
        run = run_qlora(model_name_or_path=base, max_eval_samples=2, output_dir=folder, **flags)
        assert run.code == 0
        texts.append((folder / "predictions.jsonl").read_text())
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 2


@pytest.mark.parametrize(
    "flags", [{"full_finetune": True}, {"modules_to_save": "mlp.experts", "lora_modules": "q_proj"}], ids=str
)
def test_experts_that_train_whole_are_not_frozen(run_qlora, models, flags):
    """Grouped products would give their weights no gradient."""
    base = models("mixtral")
    run = run_qlora(model_name_or_path=base, bits=32, optim="adamw_torch", **SMALL | {"max_steps": 1}, **flags)
    assert run.code == 0
    before, after = load_file(base / "model.safetensors"), load_file(next(run.output_dir.glob("*model.safetensors")))
    if "full_finetune" in flags:
        moved = [name for name in before if ".experts." in name and not torch.equal(before[name], after[name])]
        assert len(moved) == 24
    else:
        stored = {n.rpartition(".")[2]: t for n, t in AutoModelForCausalLM.from_pretrained(base).named_parameters()}
        saved = {n: t for n, t in after.items() if "layers.1" in n and n.endswith(("gate_up_proj", "down_proj"))}
        assert len(saved) == 2 and all(not torch.equal(t, stored[n.rpartition(".")[2]]) for n, t in saved.items())


def test_patterns_of_the_user_hold_for_experts_and_load_in_plain_peft(run_qlora, models):
    """peft takes the first key that matches, and saves them in another order: no stack may match two."""
    patterns = {
        "lora_rank_pattern": {"mlp.experts.down_proj": 6},
        "lora_alpha_pattern": {"layers.1.mlp.experts.gate_up_proj": 64},
    }
    run = run_qlora(model_name_or_path=models("mixtral"), bits=32, lora_r=8, max_steps=1, **patterns)
    assert run.code == 0
    other = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models("mixtral")), run.output_dir)
    layers = {
        n: (m.r["default"], m.scaling["default"]) for n, m in other.named_modules() if hasattr(m, "parameter_name")
    }
    ranks = {name.partition("layers.")[2]: value for name, value in layers.items()}
    assert ranks == {
        "0.mlp.experts": (6, 16 / 6), "0.mlp.experts.base_layer": (4, 16 / 4),
        "1.mlp.experts": (6, 16 / 6), "1.mlp.experts.base_layer": (4, 64 / 4),
    }  # fmt: skip


def test_routers_and_shared_gates_are_not_quantised(models):
    folder = str(models("qwen2_moe"))
    config = reference.parse(folder, bits=4)
    model = qlora.load_model(config, qlora.load_model_config(config, folder), folder)
    gates = [m.weight for n, m in model.named_modules() if n.endswith("shared_expert_gate")]
    assert len(gates) == 2 and all(weight.is_floating_point() for weight in gates)


def test_a_router_gets_an_adapter_only_where_it_is_named():
    """AFMoE's is a linear layer, as Jamba's in transformers 5.17."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "num_dense_layers": 1, "num_shared_experts": 1}
    model = AutoModelForCausalLM.from_config(AfmoeConfig(vocab_size=320, **sizes, **heads, **experts))
    router = "model.layers.1.mlp.router.gate"
    assert router in qlora.linear_layers(model)
    for modules, named in (("all", False), ("mlp", False), ("gate,q_proj", True)):
        lora = qlora.parse_config(["--lora_modules", modules]).lora
        assert (router in qlora.lora_targets(model, lora)) == named


def test_experts_of_a_quantised_base_are_quantised_after_loading(run_qlora, models):
    """Where transformers has left them in 16 bit: to the same codes as while a published base loads."""
    folders = [str(models("mixtral")), str(models("prequantised", base=models("mixtral")))]
    config = reference.parse(folders[0], bits=4)
    published, quantised = (qlora.load_model(config, qlora.load_model_config(config, f), f) for f in folders)
    for name, (_, weight) in qlora.stacked_experts(published).items():
        assert torch.equal(quantised.get_parameter(name).data, weight.data), name
    run = run_qlora(model_name_or_path=folders[1], max_steps=1)
    assert run.code == 0 and "4 stacks of experts are quantised after loading" in run.stderr


def test_a_rank_that_no_expert_has_is_one_line(run_qlora, models):
    for flags in ({"expert_lora_r": 65}, {"lora_r": 130}, {"lora_rank_pattern": '{"mlp.experts.down_proj": 65}'}):
        run = run_qlora(model_name_or_path=models("mixtral"), max_steps=1, **flags)
        assert run.code == 2 and "--expert_lora_r" in run.stderr and " has a rank of 64 at most\n" in run.stderr
    run = run_qlora(model_name_or_path=models("mixtral"), lora_modules="mlp.experts", max_steps=1)
    assert run.code == 0 and "adapters: 2 mlp.experts\n" in run.stderr
