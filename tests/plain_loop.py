"""A training loop of transformers and peft alone, and how far a run of qlora.py is from it.

    run = run_qlora(model_name_or_path=base, dataset=data, **plain_loop.FLAGS, bits=4)
    assert plain_loop.compare(run.output_dir, base, rows, bits=4).largest < 1e-4

Two steps on the same rows: in the first only lora_B has a gradient, as it starts at zero; in the second all have.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import tiny
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import transformers_weight_conversion
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, set_seed
from transformers.pytorch_utils import Conv1D

import qlora

LONGEST, RATE, NORM, SEED = 64, 0.5, 0.3, 0
FLAGS = {
    **{"source_max_len": LONGEST, "target_max_len": LONGEST, "max_steps": 2, "per_device_train_batch_size": 4},
    **{"gradient_accumulation_steps": 1, "logging_steps": 1, "lora_r": 4, "optim": "sgd", "learning_rate": RATE},
    **{"max_grad_norm": NORM, "lr_scheduler_type": "constant", "seed": SEED},
}
MASKED_FLAGS = FLAGS | {"target_max_len": None, "mask_prob": 1.0, "mask_replace_prob": 0.0, "random_replace_prob": 0.0}


class Difference(NamedTuple):
    """Relative differences of a run to the plain loop, and the names of weights that only one of them saved."""

    loss: float  # the larger of two steps'
    norm: float  # of the gradients
    adapter: float  # after two steps, relative to how far they moved
    names: list[str]

    @property
    def largest(self) -> float:
        return max(self.loss, self.norm, self.adapter)


def encode(row: Mapping[str, str], masked: bool) -> tuple[list[int], list[int]]:
    """Ids and labels of a row with the byte tokenizer, by hand."""
    if masked:
        ids = [*row["input"].encode()][:LONGEST]
        return ids, ids
    source, target = [tiny.BOS, *row["input"].encode()][:LONGEST], [*row["output"].encode(), tiny.EOS][:LONGEST]
    return source + target, [-100] * len(source) + target


def layers_left_whole(base: Path, masked: bool = False) -> list[str]:
    """Names of the linear layers and stacks of experts that a run in 4 bits does not quantise."""
    config = qlora.parse_config(["--model_name_or_path", str(base), "--objective", "mlm" if masked else "clm"])
    model = qlora.load_model(config, qlora.load_model_config(config, str(base)), str(base))
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D)))
    whole = [name for name, module in layers if module.weight.is_floating_point()]
    return whole + [name for name, (_, stack) in qlora.stacked_experts(model).items() if stack.is_floating_point()]


def round_to_4_bits(model: Any, whole: Iterable[str]) -> None:
    """Give linear layers and experts, but those in `whole`, the weights that nf4 with double quantisation makes."""
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and name not in whole:
            weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
            packed, state = quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
            rounded = dequantize_4bit(packed, state)
            module.weight.data = rounded.T if isinstance(module, Conv1D) else rounded
    for name, (_, stack) in qlora.stacked_experts(model).items():
        if name not in whole:
            stack.data = dequantize_4bit(*quantize_4bit(stack.data, compress_statistics=True, quant_type="nf4"))


def train(model: Any, rows: Sequence[tuple[list[int], list[int]]], shift: int) -> list[dict[str, float]]:
    """Two steps of SGD, row by row without padding; the losses and gradient norms."""
    trained, log = [p for p in model.parameters() if p.requires_grad], []
    optimizer = torch.optim.SGD(trained, RATE)
    supervised = sum(label != -100 for _, labels in rows for label in labels)
    for _ in range(2):
        total = 0.0
        for ids, labels in rows:
            logits = model(input_ids=torch.tensor([ids])).logits[0].float()
            loss = F.cross_entropy(logits[: len(ids) - shift], torch.tensor(labels[shift:]), reduction="sum")
            (loss / supervised).backward()
            total += loss.item() / supervised
        norm = torch.nn.utils.clip_grad_norm_(trained, NORM).item()
        log.append({"loss": total, "grad_norm": norm})
        optimizer.step()
        optimizer.zero_grad()
    return log


def compare(
    output: Path,
    base: Path,
    rows: Iterable[Mapping[str, str]],
    whole: Iterable[str] | None = None,
    masked: bool = False,
) -> Difference:
    """Train as the run in `output` did; `whole` names the layers that a 4-bit run leaves as they are."""
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model = auto.from_pretrained(base, dtype=torch.float32)
    model.config.use_cache = False
    if whole is not None:
        round_to_4_bits(model, whole)
    config = LoraConfig.from_pretrained(output)
    config.inference_mode = False
    # peft takes names of a mixture's dense layers for those of its experts (https://github.com/huggingface/peft/issues/3711)
    name = f"{transformers_weight_conversion.__name__}.convert_peft_config_for_transformers"
    set_seed(SEED)
    with mock.patch(name, lambda *args, **kwargs: None):
        adapted = get_peft_model(model, config).train()
    start = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(adapted).items()}
    expected = train(adapted, [encode(row, masked) for row in rows], shift=0 if masked else 1)
    end, saved = get_peft_model_state_dict(adapted), load_file(output / "adapter_model.safetensors")
    log = [entry for entry in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
    errors = {
        key: max(abs(a[key] / b[key] - 1) for a, b in zip(log, expected, strict=True)) for key in ("loss", "grad_norm")
    }
    shared = [name for name in end if name in saved and saved[name].shape == end[name].shape]
    moved, apart = (
        sum((a[name] - b[name]).square().sum().item() for name in shared) for a, b in ((start, end), (saved, end))
    )
    names = sorted({*end, *saved} - {*shared})
    return Difference(errors["loss"], errors["grad_norm"], (apart / moved) ** 0.5, names)
