"""Families that differ from LLaMA in where their linear layers are and how they use them.

Each against plain transformers: the adapters that a run saves are added to the weights by hand.
"""

import contextlib
import itertools
import json
import shutil
from typing import Any

import plain_loop
import pytest
import tiny
import tiny_classes
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    WhisperConfig,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.jamba import modeling_jamba
from transformers.models.llama.modeling_llama import LlamaMLP

import qlora

ATTN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
MLA = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


def each(count: int, *names: str, block: str = "") -> dict[str, int]:
    return {f"{block}{name}": count for name in names}


# What carries adapters, by kind with counts, and which linear layers do not.
FAMILIES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "glm4_moe": (
        each(2, *ATTN) | each(1, *MLP, block="mlp.") | each(1, *MLP, block="mlp.shared_experts.")
        | each(1, "mlp.experts"),
        {"lm_head": 1},
    ),
    "deepseek_v3": (
        each(2, *MLA, block="self_attn.") | each(1, *MLP, block="mlp.") | each(1, *MLP, block="mlp.shared_experts.")
        | each(1, "mlp.experts"),
        {"lm_head": 1},
    ),
    "qwen3_next": (
        each(1, "in_proj_qkvz", "in_proj_ba", "out_proj", block="linear_attn.")
        | each(2, *MLP, block="mlp.shared_expert.") | each(2, "mlp.shared_expert_gate", "mlp.experts") | each(1, *ATTN),
        {"lm_head": 1},
    ),
    "llama4": (
        each(2, *ATTN)
        | each(1, *MLP, "experts", block="feed_forward.") | each(1, *MLP, block="feed_forward.shared_expert."),
        {"feed_forward.router": 1, "lm_head": 1},
    ),
    "gemma3n": (
        each(2, *ATTN) | each(2, *MLP, block="mlp.") | each(2, "laurel.linear_left", "laurel.linear_right")
        | each(2, "altup.modality_router", "per_layer_input_gate", "per_layer_projection")
        | each(1, "model.per_layer_model_projection")
        | each(3, "model.altup_projections.*", "model.altup_unembed_projections.*"),
        {"altup.correction_coefs": 2, "altup.prediction_coefs": 2, "lm_head": 1},
    ),
    "mamba": ({"mixer.in_proj": 2}, each(2, "x_proj", "dt_proj", "out_proj", block="mixer.") | {"lm_head": 1}),
    "jamba": (
        each(1, "in_proj", "x_proj", "out_proj", block="mamba.") | each(1, *MLP, "experts", block="feed_forward.")
        | each(1, *ATTN),
        {"mamba.dt_proj": 1, "lm_head": 1},
    ),
    "falcon_h1": (
        each(2, *MLP, block="feed_forward.") | each(2, "mamba.in_proj", *ATTN),
        {"mamba.out_proj": 2, "lm_head": 1},
    ),
    "rwkv": (
        each(2, "key", "value", "receptance", block="attention.") | each(2, "key", "receptance", block="feed_forward."),
        {"attention.output": 2, "feed_forward.value": 2, "head": 1},
    ),
    "mixtral": (each(2, *ATTN, "mlp.experts"), {"lm_head": 1}),
}  # fmt: skip
LINEAR_ROUTER = not hasattr(modeling_jamba, "JambaTopKRouter")  # transformers 5.17; it stays whole as well
SMALL = {"source_max_len": 64, "target_max_len": 64, "max_steps": 3, "per_device_train_batch_size": 4}
ROWS = tiny.support_rows(4)


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    tiny.rows_to_jsonl(tmp_path / "data/train.jsonl", tiny.support_rows(24))
    tiny.rows_to_jsonl(tmp_path / "data/eval.jsonl", ROWS)
    return tmp_path / "data"


def listed(line: str) -> dict[str, int]:
    """`adapters: 2 a, 1 b` as a dictionary."""
    return {name: int(count) for count, name in (part.split() for part in line.split(": ")[1].split(", "))}


def line_of(run, start: str) -> str:
    return next(line.strip() for line in run.stderr.splitlines() if line.strip().startswith(start))


def loss_of(model, longest: int = 32) -> float:
    """The mean over rows of their losses, each row alone."""
    losses = []
    for row in ROWS:
        source, target = [tiny.BOS, *row["input"].encode()][:longest], [*row["output"].encode(), tiny.EOS][:longest]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([source + target])).logits[0]
        losses.append(F.cross_entropy(logits[len(source) - 1 : -1].float(), torch.tensor(target)))
    return torch.stack(losses).mean().item()


CASES = [(family, bits) for family in FAMILIES for bits in (4, 32) if (family, bits) != ("rwkv", 32)]


@pytest.mark.parametrize(("family", "bits"), [*CASES, pytest.param("rwkv", 32, marks=pytest.mark.ci)])
def test_adapters_are_where_they_were_asked_for_and_trained_as_by_plain_peft(run_qlora, models, data, family, bits):
    """Losses, gradient norms and the saved adapter of two steps; weights read beside their layer stay as stored."""
    carry, without = FAMILIES[family]
    without = without | {"feed_forward.router": 1} if family == "jamba" and LINEAR_ROUTER else without
    base, rows = models(family), tiny.support_rows(4)
    tiny.rows_to_jsonl(data / "train.jsonl", rows)
    run = run_qlora(model_name_or_path=base, dataset=data / "train.jsonl", bits=bits, **plain_loop.FLAGS)
    assert run.code == 0
    assert listed(line_of(run, "adapters: ")) == carry
    assert listed(line_of(run, "linear layers without: ")) == without
    parts = load_file(run.output_dir / "adapter_model.safetensors")
    experts = sum(count for name, count in carry.items() if "experts" in name and "shared" not in name)
    assert len(parts) == 2 * (sum(carry.values()) + experts) and all(tensor.any() for tensor in parts.values())
    dense = [tensor for name, tensor in parts.items() if ".experts" not in name]
    assert all(4 in tensor.shape for tensor in dense), "of rank 4, also beside experts"
    whole = plain_loop.layers_left_whole(base) if bits == 4 else None
    difference = plain_loop.compare(run.output_dir, base, rows, whole)
    assert difference.largest < 2e-5 and not difference.names


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("family", "whole"), [("mamba", 6), ("jamba", 1), ("llama4", 1), ("rwkv", 4), ("gemma3n", 4)])
def test_weights_that_are_read_beside_their_layer_are_not_quantised(models, family, whole, bits):
    folder = str(models(family))
    config = qlora.parse_config(["--model_name_or_path", folder, "--bits", str(bits)])
    model = qlora.load_model(config, qlora.load_model_config(config, folder), folder)
    without = {name.rpartition(".")[2] for name in FAMILIES[family][1]} - {"lm_head", "head"}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    read = [module for name, module in layers.items() if name.rpartition(".")[2] in without - {"value", "output"}]
    if family == "rwkv":  # its attention has a `value` too
        read = [m for n, m in layers.items() if n.endswith(("attention.output", "feed_forward.value"))]
    assert len(read) == whole and all(module.weight.is_floating_point() for module in read)
    packed = [module for module in layers.values() if not module.weight.is_floating_point()]
    whole += family == "jamba" and LINEAR_ROUTER
    assert len(packed) == len(layers) - whole - 1, "all but the head"


def test_a_model_that_cannot_be_tried_says_so_and_counts_every_layer(run_qlora, monkeypatch):
    forward = LlamaModel.forward

    def refuse(self, input_ids=None, **kwargs):
        if input_ids.is_meta:
            raise RuntimeError("no values")
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(qlora, "TRIALS", {})
    monkeypatch.setattr(LlamaModel, "forward", refuse)
    with monkeypatch.context() as patch:
        detached = LlamaMLP.forward
        patch.setattr(LlamaMLP, "forward", lambda self, x: detached(self, x).detach())
        run = run_qlora(max_steps=1, bits=16, fast_path=False)
    assert run.code == 0 and "LlamaForCausalLM can't be tried (no values)" in run.stderr
    assert sum(listed(line_of(run, "adapters: ")).values()) == 14


def test_two_configs_of_one_class_are_tried_separately():
    """Names and sizes are the same, but one never calls `gate`."""

    class Model(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.gate = torch.nn.Linear(64, 64)

        def forward(self, input_ids=None, **kwargs):
            states = self.model(input_ids=input_ids).last_hidden_state
            return CausalLMOutput(logits=self.lm_head(self.gate(states) if self.config.gated else states))

    config = tiny.FAMILIES["llama"][1] | {"vocab_size": 320}
    with_gate, without = (Model(LlamaConfig(**config, gated=gated)) for gated in (True, False))
    assert "gate" in qlora.try_layers(with_gate)[0] and "gate" not in qlora.try_layers(without)[0]


def test_a_weight_that_is_read_through_a_tied_layer_stays_as_it_is():
    """As NeoMME's projection of the embedding, whose twin before the head never calls it."""

    class Model(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.up, self.down = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
            self.down.weight = self.up.weight

        def forward(self, input_ids=None, **kwargs):
            states = self.up(self.model(input_ids=input_ids).last_hidden_state)
            return CausalLMOutput(logits=self.lm_head(states @ self.down.weight))

    used, beside = qlora.try_layers(Model(LlamaConfig(**tiny.FAMILIES["llama"][1] | {"vocab_size": 320})))
    assert "up" in beside and "up" not in used and "model.layers.0.mlp.up_proj" in used


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("glm4_moe", {"lora_dropout": 0.05}),
        ("deepseek_v3", {"use_dora": True}),
        ("llama4", {"lora_modules": "up_proj"}),
    ],
)
def test_mixtures_take_every_option(run_qlora, models, family, flags):
    """Which peft refuses where it takes dense layers for experts; DoRA adapts none, and dropout leaves them out."""
    run = run_qlora(model_name_or_path=models(family), **SMALL, **flags)
    assert run.code == 0
    assert ("mlp.experts" in line_of(run, "adapters: ")) == ("lora_dropout" in flags)


@pytest.mark.parametrize("family", ["glm4_moe", "mamba", "jamba", "rwkv", "gemma3n"])
def test_families_are_merged_and_resumed(run_qlora, models, family, tmp_path):
    flags = {"model_name_or_path": models(family), "learning_rate": 1e-2, **SMALL, "max_steps": 2, "save_steps": 1}
    run = run_qlora(**flags, merged_output_dir=tmp_path / "merged")
    assert run.code == 0 and (tmp_path / "merged" / "config.json").is_file()
    again = run_qlora(**flags | {"max_steps": 3})
    assert again.code == 0 and "resuming from" in again.stderr


@pytest.mark.parametrize("family", ["laguna", "doge"])
def test_an_adapter_fits_the_model_that_it_was_trained_on(run_qlora, data, tmp_path, family):
    """peft renames some of Laguna's layers, though the names are its own; Doge's MLP wants another shape of input."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"these transformers do not know {family}")
    base = tiny_classes.write_class(tmp_path / "base", family)
    if family == "doge":
        (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | {"is_moe": True}))
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(base)
    flags = {"model_name_or_path": base, "dataset": data, "bits": 16, **SMALL}
    assert run_qlora(**flags).code == 0
    assert run_qlora(**flags, do_train=False, do_eval=True).code == 0


def test_attention_to_blocks_of_a_row_keeps_rows_apart(run_qlora, tmp_path):
    """MiniMax-M3 chooses blocks of earlier tokens, which only its own mask knows: two blocks of 16 here."""
    if "minimax_m3_vl_text" not in CONFIG_MAPPING:
        pytest.skip("these transformers do not know MiniMax-M3")
    base, rows = tiny_classes.write_class(tmp_path / "base", "minimax_m3_vl_text"), tiny.support_rows(4)
    config = json.loads((base / "config.json").read_text()) | {"index_block_size": 16, "index_topk_blocks": 2}
    (base / "config.json").write_text(json.dumps(config))
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    run = run_qlora(model_name_or_path=base, dataset=file, bits=32, **plain_loop.FLAGS)
    assert run.code == 0 and "one row at a time: a long one would change the others" in run.stderr
    assert plain_loop.compare(run.output_dir, base, rows).largest < 2e-5


def test_a_head_that_was_trained_whole_beside_tied_embeddings_is_merged(run_qlora, tmp_path):
    """BART holds its embeddings under three names."""
    base = tiny_classes.write_class(tmp_path / "base", "bart", masked=True)
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [{"input": row["input"]} for row in tiny.support_rows(8)])
    flags = {"model_name_or_path": base, "dataset": file, "bits": 32, "modules_to_save": "lm_head"}
    flags |= {"objective": "mlm", "max_steps": 1, "target_max_len": None, "learning_rate": 1e-2}
    run = run_qlora(**flags, merged_output_dir=tmp_path / "merged")
    assert run.code == 0 and "verified: " in run.stderr


def write_mxfp4(path, base):
    """gpt-oss as published: the experts' weights in blocks of 32 four-bit values with one scale each."""
    shutil.copytree(base, path)
    weights, generator, packed = load_file(base / "model.safetensors"), torch.Generator().manual_seed(0), {}
    for name, tensor in weights.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensor.shape
            shape = experts, outputs, inputs // 32
            packed[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
            packed[f"{name}_scales"] = torch.randint(122, 125, shape, generator=generator, dtype=torch.uint8)
        else:
            packed[name] = tensor.bfloat16()
    save_file(packed, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    whole = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": whole}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_mxfp4_weights_are_named_as_they_are_held_and_merged(run_qlora, models, data, tmp_path):
    base, merged = write_mxfp4(tmp_path / "base", models("gpt_oss")), tmp_path / "merged"
    flags = {"dataset": data, "do_eval": True, "per_device_eval_batch_size": 1, "learning_rate": 1e-2}
    run = run_qlora(model_name_or_path=base, merged_output_dir=merged, **flags)
    assert run.code == 0 and "weights                      4 bit" not in run.stderr
    assert "quantised (mxfp4) and is dequantised, held in float32" in run.stderr
    assert "4 stacks of experts are quantised after loading" in run.stderr
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for weight in plain.parameters():
        if weight.dim() == 3:
            dense = weight.data.float()  # transformers 5.17 leaves them in bf16
            weight.data = dequantize_4bit(*quantize_4bit(dense, quant_type="nf4", compress_statistics=True))
    expected = loss_of(PeftModel.from_pretrained(plain, run.output_dir).eval())
    assert run.json("metrics.json")["eval_loss"] == pytest.approx(expected, rel=2e-5)
    assert loss_of(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)) == pytest.approx(
        expected, rel=1e-2
    )


@pytest.mark.parametrize(("changed", "refused"), [(1, False), (12, True)])
def test_a_router_that_flips_is_no_failed_merge(models, changed, refused):
    """Logits that differ at one token of twelve; at all of them a merge is wrong."""
    model = AutoModelForCausalLM.from_pretrained(models("mixtral"), dtype=torch.bfloat16).eval()
    sample = {"input_ids": torch.arange(65, 77)[None], "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    adapted = qlora.float32_logits(model, sample)
    adapted[:changed] += torch.randn(changed, adapted.shape[1], generator=torch.Generator().manual_seed(0))
    context = pytest.raises(qlora.ConfigError, match="rounding explains") if refused else contextlib.nullcontext()
    with context:
        qlora.compare_merged(model, adapted + 1, adapted, 0.0, sample, "merged")


def test_an_experts_adapter_that_a_merge_leaves_out_is_noticed(models):
    """One of four experts, in one layer of two; with all of them the merge is right."""
    base, generator = models("mixtral"), torch.Generator().manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    ids = torch.randint(256, (4, 64), generator=generator)
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    changes = [
        {
            name: 0.05 * torch.randn(weight.shape, generator=generator)
            for name, weight in layer.mlp.experts.named_parameters()
        }
        for layer in plain.model.layers
    ]

    def merged(left_out: int | None) -> Any:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        for layer, change in zip(model.model.layers, changes, strict=True):
            for name, weight in layer.mlp.experts.named_parameters():
                weight.data += change[name]
                if left_out is not None and layer is model.model.layers[1]:
                    weight.data[left_out] -= change[name][left_out]
        return model

    before, adapted = qlora.float32_logits(plain, sample), qlora.float32_logits(merged(None), sample)
    qlora.compare_merged(merged(None).bfloat16(), before, adapted, 0.0, sample, "merged")
    with pytest.raises(qlora.ConfigError, match="rounding explains"):
        qlora.compare_merged(merged(2).bfloat16(), before, adapted, 0.0, sample, "merged")


# ------------------------------------------------------------------------------------
# Adapter files
# ------------------------------------------------------------------------------------


def spoil(folder, change) -> None:
    """Rewrite the names in an adapter's file."""
    file = folder / "adapter_model.safetensors"
    parts = load_file(file)
    save_file({change(name): tensor for name, tensor in parts.items() if change(name)}, file, {"format": "pt"})


CHANGES = {
    "another prefix": lambda name: name.replace("base_model.model.model.", "base_model.model.language_model."),
    "half of it": lambda name: name if ".layers.0." in name else None,
    "one name": lambda name: name.replace("layers.1.mlp.up_proj.lora_A", "layers.1.mlp.up_proj.lora_C"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "flags",
    [{}, {"do_train": False, "do_eval": True}, {"do_train": False, "merged_output_dir": "merged"}],
    ids=["train", "evaluate", "merge"],
)
def test_an_adapter_file_must_meet_the_model_whole(run_qlora, finished_run, tmp_path, flags, change):
    adapter = shutil.copytree(finished_run.output_dir, tmp_path / "adapter")
    spoil(adapter, CHANGES[change])
    flags = {name: tmp_path / value if name == "merged_output_dir" else value for name, value in flags.items()}
    run = run_qlora(adapter_name_or_path=adapter, **flags)
    last = run.stderr.splitlines()[-1]
    assert run.code == 2 and "Traceback" not in run.stderr
    assert last.startswith("error: ") and str(adapter) in last and "lora_" in last
    assert not (tmp_path / "merged").exists()


def test_a_checkpoint_must_meet_the_model_whole(run_qlora, finished_run):
    """Of another program, which lists no files and their hashes."""
    output = finished_run.output_dir
    for name in ("completed", "adapter_model.safetensors", "checkpoint-2/checkpoint.json"):
        (output / name).unlink()
    shutil.rmtree(output / "checkpoint-4")
    spoil(output / "checkpoint-2", CHANGES["half of it"])
    run = run_qlora(output_dir=output, learning_rate=1e-2)
    last = run.stderr.splitlines()[-1]
    assert run.code == 2 and last.startswith("error: ") and "checkpoint-2" in last and "14 of the model's" in last


def test_a_module_trained_whole_must_be_in_the_file(run_qlora, tmp_path):
    run = run_qlora(modules_to_save="lm_head", max_steps=1)
    adapter = shutil.copytree(run.output_dir, tmp_path / "adapter")
    spoil(adapter, lambda name: None if "lm_head" in name else name)
    again = run_qlora(adapter_name_or_path=adapter, output_dir=tmp_path / "again")
    last = again.stderr.splitlines()[-1]
    assert again.code == 2 and "lm_head" in last and str(adapter) in last


def test_adapters_that_peft_puts_elsewhere_are_an_error(models, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(models("llama"))
    asked = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    other = LoraConfig(target_modules=["q_proj", "up_proj"])
    monkeypatch.setattr(qlora, "get_peft_model", lambda model, config: get_peft_model(model, other))
    with pytest.raises(qlora.ConfigError, match=r"on 2 others and not on 0, first model.layers.0.mlp.up_proj"):
        qlora.attach_adapter(model, LoraConfig(target_modules=asked))


def test_an_adapter_of_experts_as_peft_makes_it_is_loaded(models, run_qlora, tmp_path):
    """peft adapts Mixtral's experts under the names that they had in transformers 4."""
    base = models("mixtral")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj", "w1", "w2", "w3"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    run = run_qlora(
        model_name_or_path=base, bits=32, adapter_name_or_path=tmp_path / "adapter", do_train=False, do_eval=True
    )
    assert run.code == 0
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_parameters"]
    assert "2 mlp.experts" in line_of(run, "adapters: ")


def test_an_adapter_with_the_names_of_transformers_4_is_loaded(models, tmp_path):
    """One of each of Mixtral's experts, as peft saved it then; plain peft gives the same logits."""
    base, ids = models("mixtral"), torch.arange(5, 30)[None]
    plain = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["w1", "w2", "w3"])
    )
    plain.save_pretrained(tmp_path / "adapter")
    sizes, generator = {"w1": (64, 128), "w2": (128, 64), "w3": (64, 128)}, torch.Generator().manual_seed(0)
    weights = {}
    for layer, expert, (name, (size, out)) in itertools.product(range(2), range(4), sizes.items()):
        key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
        weights[f"{key}.lora_A.weight"] = torch.randn(4, size, generator=generator)
        weights[f"{key}.lora_B.weight"] = torch.randn(out, 4, generator=generator) * 0.1
    save_file(weights, tmp_path / "adapter/adapter_model.safetensors", metadata={"format": "pt"})
    content = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    old = {"target_modules": [*sizes], "target_parameters": None, "rank_pattern": {}, "alpha_pattern": {}}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(content | old))
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    ours = qlora.attach_adapter(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    with torch.no_grad():
        bare = AutoModelForCausalLM.from_pretrained(base)(ids).logits
        logits = [model.eval()(ids).logits for model in (expected, ours)]
    assert torch.allclose(*logits, atol=1e-5) and not torch.allclose(logits[0], bare, atol=1e-2)


# ------------------------------------------------------------------------------------
# Predictions
# ------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(base, row: dict[str, str], count: int) -> str:
    """What plain transformers generates for one row, without padding and without a cache."""
    model, ids = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), [tiny.BOS]
    ids += row["input"].encode()[:63]
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == tiny.EOS:
            break
    start = 1 + len(row["input"].encode()[:63])
    return bytes(i for i in ids[start:] if i < 256).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("family", "alone"), [("rwkv", True), ("minimax", True), ("mamba", False), ("glm4_moe", False)]
)
def test_predictions_do_not_depend_on_the_batch(run_qlora, models, data, family, alone):
    """RWKV has no attention mask, MiniMax forgets it with a cache: their rows are predicted one at a time."""
    base = models(family)
    flags = {"do_train": False, "do_predict": True, "predict_with_generate": True, "max_new_tokens": 6, "bits": 32}
    flags |= {"source_max_len": 64, "target_max_len": 64, "per_device_eval_batch_size": 4}
    run = run_qlora(model_name_or_path=base, dataset=data, **flags)
    lines = (run.output_dir / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == [greedy(base, row, 6) for row in ROWS]
    assert ("one row at a time" in run.stderr) == alone


@pytest.mark.parametrize("size", [1, 40])
@pytest.mark.parametrize(("weight", "seen"), [(0.0, False), (0.03, True)])
def test_a_little_of_the_padding_in_the_logits_is_noticed(models, weight, seen, size):
    """Three hundredths, also where the first prompt is of one token."""
    model = AutoModelForCausalLM.from_pretrained(models("llama")).eval()
    forward = LlamaForCausalLM.forward

    def with_padding(input_ids=None, **kwargs):
        output = forward(model, input_ids=input_ids, **kwargs)
        padded = (input_ids == tiny.PAD).any(-1)[:, None, None]
        output.logits = output.logits + weight * padded * output.logits.flip(-1)
        return output

    model.forward = with_padding
    assert qlora.sees_padding(model, [97] * size, tiny.PAD, "cpu", torch.float32) == seen


@pytest.fixture
def undecided(models, tmp_path):
    """A mixture whose routers give every expert nearly the same: rounding to 16 bits decides where a token goes."""
    folder = shutil.copytree(models("mixtral", num_hidden_layers=4), tmp_path / "undecided")
    weights, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if name.endswith("gate.weight"):
            one = torch.randn(1, weight.shape[1], generator=generator)
            weights[name] = (one * (1 + torch.randint(-1, 2, weight.shape, generator=generator) / 128)).to(weight.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("bits", [4, 16])
def test_tokens_that_rounding_sends_to_other_experts_are_not_taken_for_padding(run_qlora, undecided, data, bits):
    """Otherwise its rows would be trained and predicted one at a time."""
    flags = {"bf16": True, "bits": bits, "padding_side": "left", "fast_path": False, "max_steps": 1}
    flags |= {"do_predict": True, "predict_with_generate": True, "per_device_eval_batch_size": 4, "max_new_tokens": 2}
    run = run_qlora(model_name_or_path=undecided, dataset=data, **flags)
    assert run.code == 0 and "takes padding for text" not in run.stderr


def test_a_mixture_in_16_bits_that_takes_padding_for_text_is_still_noticed(models, undecided):
    minimax, mixtral = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        for folder in (models("minimax"), undecided)
    )
    assert qlora.sees_padding(minimax, [97] * 40, tiny.PAD, "cpu", torch.bfloat16)
    assert not qlora.sees_padding(mixtral, [*range(97, 120)], tiny.PAD, "cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("model_type", "side"), [pytest.param("rwkv", "left", marks=pytest.mark.ci), ("cpmant", "right")]
)
def test_rows_are_trained_one_by_one_where_padding_is_taken_for_text(run_qlora, data, tmp_path, model_type, side):
    base, rows = tiny_classes.write_class(tmp_path / "base", model_type), tiny.support_rows(4)
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    run = run_qlora(model_name_or_path=base, dataset=file, bits=32, padding_side=side, **plain_loop.FLAGS)
    assert run.code == 0 and "one row at a time: " in run.stderr
    assert plain_loop.compare(run.output_dir, base, rows).largest < 2e-5


def test_a_masked_model_that_takes_padding_for_text_is_trained_row_by_row(run_qlora, tmp_path):
    """ConvBERT's convolutions."""
    base, rows = tiny_classes.write_class(tmp_path / "base", "convbert", masked=True), tiny.support_rows(4)
    file = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows)
    run = run_qlora(model_name_or_path=base, dataset=file, bits=32, **plain_loop.MASKED_FLAGS)
    assert run.code == 0 and "one row at a time: " in run.stderr
    assert plain_loop.compare(run.output_dir, base, rows, masked=True).largest < 2e-5


# ------------------------------------------------------------------------------------
# Files that do not fit
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (T5Config(), "--model_name_or_path: t5 is no causal language model"),
        (WhisperConfig(architectures=["WhisperForConditionalGeneration"]), "whisper is no causal language model"),
    ],
    ids=["t5", "whisper"],
)
def test_models_of_another_kind_are_one_short_line(run_qlora, models, tmp_path, config, line):
    config.save_pretrained(tmp_path / "base")
    run = run_qlora(model_name_or_path=tmp_path / "base")
    last = run.stderr.splitlines()[-1]
    assert run.code == 2 and last.startswith("error: ") and line in last and len(last) < 120


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 128}, "(320, 128), the file has (320, 64)"),
        ({"vocab_size": 384}, "lm_head.weight (384, 64), the file has (320, 64)"),
        ({"intermediate_size": 256}, "mlp.down_proj.weight (64, 256), the file has (64, 128)"),
        ({"num_hidden_layers": 1}, "fewer layers than the weights, which go on with model.layers.1."),
        ({"num_hidden_layers": 3}, "9 weights are not in it, first model.layers.2."),
        ({"quantization_config": {"quant_method": "squeeze", "bits": 3}}, "no known quantisation: squeeze"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_the_weights_is_one_line(run_qlora, models, tmp_path, change, named, bits):
    folder = shutil.copytree(models("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    run = run_qlora(model_name_or_path=folder, bits=bits, max_steps=1)
    last = run.stderr.splitlines()[-1]
    assert run.code == 2 and last.startswith(f"error: model {folder}: ") and named in last


def test_layers_that_predict_further_tokens_may_be_left_out(run_qlora, models, tmp_path):
    """DeepSeek-V3's weights go on with one that transformers does not use."""
    folder = shutil.copytree(models("deepseek_v3", num_hidden_layers=3), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}))
    assert run_qlora(model_name_or_path=folder, max_steps=1).code == 0


# ------------------------------------------------------------------------------------
# Adapters that other tools make
# ------------------------------------------------------------------------------------

OTHER_TOOLS = {
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [101, 116]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "experts": {"target_modules": ["q_proj", "w1", "w2", "w3"]},  # of Mixtral, as transformers 4 named them
}


@pytest.fixture
def other_adapter(models, tmp_path):
    """An adapter by plain peft, of random numbers: (folder of the base, folder of the adapter, peft's model)."""

    def make(kind, tie):
        torch.manual_seed(0)  # else the adapter's effect depends on the tests before
        base = models("mixtral" if kind == "experts" else "llama", tie=tie)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = get_peft_model(plain, LoraConfig(r=4, task_type="CAUSAL_LM", **OTHER_TOOLS[kind])).eval()
        torch.manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.data += 0.05 * torch.randn_like(parameter)
        adapted.save_pretrained(tmp_path / "adapter")
        return base, tmp_path / "adapter", adapted

    return make


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kind", OTHER_TOOLS)
def test_adapters_of_other_tools_are_evaluated_merged_and_trained_on(
    run_qlora, other_adapter, data, tmp_path, kind, tie
):
    base, folder, adapted = other_adapter(kind, tie)
    flags = {"model_name_or_path": base, "dataset": data, "adapter_name_or_path": folder, "bits": 32}
    merged, trained = tmp_path / "merged", tmp_path / "trained"
    run = run_qlora(**flags, do_train=False, do_eval=True, per_device_eval_batch_size=1, merged_output_dir=merged)
    expected = loss_of(adapted)
    assert run.code == 0 and run.json("metrics.json")["eval_loss"] == pytest.approx(expected, rel=2e-5)
    assert abs(expected - loss_of(AutoModelForCausalLM.from_pretrained(base))) > 1e-3
    assert loss_of(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)) == pytest.approx(
        expected, rel=5e-3
    )
    run = run_qlora(**flags, output_dir=trained, learning_rate=1e-2, lora_dtype="float32")
    before, after = (load_file(place / "adapter_model.safetensors") for place in (folder, trained))
    assert run.code == 0 and before.keys() == after.keys()
    own = [name for name in before if "base_layer" not in name]  # peft saves an embedding beside its adapter
    assert own and all(not torch.equal(before[name], after[name]) for name in own)


# ------------------------------------------------------------------------------------
# Models that see images, trained on text
# ------------------------------------------------------------------------------------

TEXT = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16},
    **{"num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 512, "pad_token_id": None},
    **{"bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS},
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
QWEN_IDS = {"image_token_id": 310, "video_token_id": 311, "vision_start_token_id": 312, "vision_end_token_id": 313}
LINEAR_ATTENTION = {
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]},
}
WITH_TOWERS: dict[str, dict] = {
    "gemma3": {
        "text_config": TEXT | {"sliding_window": 64, "query_pre_attn_scalar": 16},
        "vision_config": VISION,
        **{"image_token_index": 310, "boi_token_index": 311, "eoi_token_index": 312, "mm_tokens_per_image": 4},
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
        **{"image_token_index": 310, "image_seq_length": 4},
    },
    "qwen2_5_vl": {
        "text_config": TEXT | {"rope_parameters": ROPE},
        "vision_config": QWEN_VISION | {"patch_size": 14, "fullatt_block_indexes": [1]},
        **QWEN_IDS,
    },
    "qwen3_5": {
        "text_config": {
            **{**TEXT, **LINEAR_ATTENTION},
            "rope_parameters": ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
        },
        "vision_config": QWEN_VISION | {"patch_size": 14, "num_position_embeddings": 64},
        **QWEN_IDS,
    },
}


def write_with_tower(path, family):
    tiny.write_byte(path)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **WITH_TOWERS[family]))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text("{}")
    return path


@pytest.mark.parametrize("family", WITH_TOWERS)
def test_text_trains_through_the_published_class(run_qlora, data, tmp_path, family):
    """Adapters are on the language model alone, under the names it is published with; a merge keeps the tower."""
    base, merged = write_with_tower(tmp_path / "base", family), tmp_path / "merged"
    flags = {"dataset": data, "do_eval": True, "per_device_eval_batch_size": 1, "bits": 32, "learning_rate": 1e-2}
    run = run_qlora(model_name_or_path=base, merged_output_dir=merged, **flags)
    assert run.code == 0
    parts = load_file(run.output_dir / "adapter_model.safetensors")
    assert all(".language_model." in name for name in parts) and all(tensor.any() for tensor in parts.values())
    plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    expected = loss_of(PeftModel.from_pretrained(plain, run.output_dir).eval())
    assert run.json("metrics.json")["eval_loss"] == pytest.approx(expected, rel=2e-5)
    assert load_file(merged / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    assert (merged / "preprocessor_config.json").is_file()
    whole = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32).eval()
    assert loss_of(whole) == pytest.approx(expected, rel=1e-2)
    assert (
        run_qlora(model_name_or_path=base, output_dir=tmp_path / "4", **flags | {"bits": 4, "max_steps": 1}).code == 0
    )
