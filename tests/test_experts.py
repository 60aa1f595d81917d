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
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qlora

FAMILIES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "glm4_moe", "granitemoe", "phimoe", "llama4",
)  # fmt: skip


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
