"""The base model and its adapters: what is quantised, in which dtype, what trains, what is saved."""

import json
import math
import os
import shutil
from collections import defaultdict
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel, Trainer
from transformers.models.llama.modeling_llama import LlamaAttention

import qlora

# Every linear layer but the head, below its layer: attention, then MLP. {} is the layer's number.
_LLAMA = (
    "model.layers.{}.",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
LINEARS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(("llama", "llama_gqa", "mistral", "qwen2", "gemma"), _LLAMA),
    "gpt_neox": (
        "gpt_neox.layers.{}.",
        ("attention.query_key_value", "attention.dense"),
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "mpt": (
        "transformer.blocks.{}.",
        ("attn.Wqkv", "attn.out_proj"),
        ("ffn.up_proj", "ffn.down_proj"),
    ),
    "falcon": (
        "transformer.h.{}.",
        ("self_attention.query_key_value", "self_attention.dense"),
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "gpt2": ("transformer.h.{}.", ("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj")),
}


def linears(family: str, part: str = "all", layers: tuple[int, ...] = (0, 1)) -> set[str]:
    """Full names of a family's linear layers; `part` is attn, mlp or all."""
    stem, attn, mlp = LINEARS[family]
    leaves = {"attn": attn, "mlp": mlp, "all": attn + mlp}[part]
    return {stem.format(layer) + leaf for layer in layers for leaf in leaves}


def parse(folder: Path, **flags) -> qlora.Config:
    argv = ["--model_name_or_path", str(folder), "--lora_r", "4"]
    return qlora.parse_config(argv + [word for name, value in flags.items() for word in (f"--{name}", str(value))])


def load(folder: Path, **flags) -> PreTrainedModel:
    """The frozen base, as a run with these flags has it."""
    config = parse(folder, **flags)
    return qlora.load_model(config, qlora.load_model_config(config, str(folder)), str(folder))


def build(folder: Path, **flags):
    """The base with fresh adapters, or ready for a full fine-tune."""
    return qlora.make_trainable(load(folder, **flags), parse(folder, **flags), None)


def original(folder: Path) -> dict[str, torch.Tensor]:
    """The weights as they are on disk."""
    return load_file(folder / "model.safetensors")


def reference(folder: Path) -> PreTrainedModel:
    """The model as transformers alone loads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def a_batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[tiny.BOS, *b"Where is my wool", tiny.EOS]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def adapted(keys) -> set[str]:
    """The layers that the keys of an adapter, or its parameters' names, belong to."""
    names = {key.split(".lora_")[0] for key in keys if ".lora_" in key}
    return {name.removeprefix("base_model.model.") for name in names}


def adapter_of(run) -> dict[str, torch.Tensor]:
    assert run.code == 0
    return load_file(run.output_dir / "adapter_model.safetensors")


def error_of(run) -> str:
    """The one line with which a run that a user can mend ends."""
    lines = run.stderr.splitlines()
    assert run.code == 2 and "Traceback" not in run.stderr
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


@pytest.fixture
def trained(monkeypatch) -> list:
    """The models that the runs of this test train."""
    models, enable_fast_path = [], qlora.enable_fast_path

    def spy(model, *args):
        models.append(model)
        return enable_fast_path(model, *args)

    monkeypatch.setattr(qlora, "enable_fast_path", spy)
    return models


@pytest.fixture
def computed(monkeypatch) -> list[list[int]]:
    """For each training step of this test's runs: how often the first and the second layer are computed."""
    calls, counts = [], []
    forward, training_step = LlamaAttention.forward, qlora.QLoRATrainer.training_step

    def counting_step(*args, **kwargs):
        calls.clear()
        loss = training_step(*args, **kwargs)
        counts.append([calls.count(0), calls.count(1)])
        return loss

    monkeypatch.setattr(LlamaAttention, "forward", lambda *a, **k: calls.append(a[0].layer_idx) or forward(*a, **k))
    monkeypatch.setattr(qlora.QLoRATrainer, "training_step", counting_step)
    return counts


# ------------------------------------------------------------------------------------
# Quantisation
# ------------------------------------------------------------------------------------

# QLoRA paper, appendix E; and bitsandbytes' FP4: sign, two bits of exponent, one of mantissa.
NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
FP4 = [0.0, 0.0052083333, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1.0]
LEVELS = {"nf4": torch.tensor(NF4), "fp4": torch.tensor([*(-x for x in FP4[:0:-1]), *FP4])}


def rounded_4bit(weight: torch.Tensor, quant_type: str) -> torch.Tensor:
    """Each block of 64 weights divided by its largest, and rounded to the nearest level."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    levels = LEVELS[quant_type]
    nearest = (blocks[:, :, None] / scale[:, :, None] - levels).abs().argmin(dim=2)
    return (levels[nearest] * scale).reshape(weight.shape)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bit_weights(models, quant_type, double_quant):
    import bitsandbytes

    folder = models("llama")
    model = load(folder, bits=4, quant_type=quant_type, double_quant=double_quant)
    weights = original(folder)
    for name in linears("llama"):
        module, weight = model.get_submodule(name), weights[f"{name}.weight"]
        assert type(module) is bitsandbytes.nn.Linear4bit
        assert module.weight.dtype == torch.uint8 and module.weight.numel() == weight.numel() // 2
        state = module.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == (quant_type, double_quant, 64)
        got = bitsandbytes.functional.dequantize_4bit(module.weight, state)
        expected = rounded_4bit(weight, quant_type)
        tolerance = 0.02 * weight.abs().max() if double_quant else 1e-5
        # a weight half-way between two levels may go to either
        assert ((got - expected).abs() <= tolerance).float().mean() > 0.999
        assert torch.allclose(got, expected, atol=1e-5) != double_quant


def test_8_bit_weights(models):
    import bitsandbytes

    folder = models("llama")
    model, weights = load(folder, bits=8), original(folder)
    for name in linears("llama"):
        module, weight = model.get_submodule(name), weights[f"{name}.weight"]
        assert type(module) is bitsandbytes.nn.Linear8bitLt
        assert module.weight.dtype == torch.int8
        assert module.state.threshold == 6.0 and not module.state.has_fp16_weights
        largest = weight.abs().amax(dim=1, keepdim=True)  # of each row
        assert torch.allclose(module.weight.SCB, largest[:, 0], rtol=1e-3)
        difference = (module.weight - weight / largest * 127).abs()
        assert difference.max() < 0.6  # half a level, and fp16's rounding of the weight


@pytest.mark.parametrize("bits", [16, 32])
def test_16_and_32_bits_are_not_quantised(models, bits):
    folder = models("llama")
    config = parse(folder, bits=bits)
    assert qlora.quantisation_config(config, qlora.load_model_config(config, str(folder))) is None
    model, weights = load(folder, bits=bits), original(folder)
    assert getattr(model, "hf_quantizer", None) is None
    for name in linears("llama"):
        module = model.get_submodule(name)
        assert type(module) is torch.nn.Linear
        assert torch.equal(module.weight, weights[f"{name}.weight"])


def test_16_bit_with_bf16_holds_rounded_weights(models):
    folder = models("llama")
    model, weights = load(folder, bits=16, bf16=True), original(folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name].bfloat16()), name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", LINEARS)
def test_every_family_is_quantised_and_stays_near_the_original(models, family, bits):
    import bitsandbytes

    kind = {4: bitsandbytes.nn.Linear4bit, 8: bitsandbytes.nn.Linear8bitLt}[bits]
    model = load(models(family), bits=bits)
    assert {name for name, module in model.named_modules() if isinstance(module, kind)} == (linears(family))
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert not isinstance(module, kind) and module.weight.dtype == torch.float32
    with torch.no_grad():
        ids = a_batch()["input_ids"]
        got, expected = model(ids).logits, reference(models(family))(ids).logits
    error = (got - expected).square().mean() / expected.square().mean()
    assert 0 < error < {4: 0.2, 8: 0.005}[bits]


@pytest.mark.parametrize(
    ("flags", "load_dtype", "compute_dtype"),
    [
        ({}, torch.float32, torch.float32),
        ({"bf16": True}, torch.bfloat16, torch.bfloat16),
        ({"fp16": True}, torch.float32, torch.float16),  # unstable as a storage type
    ],
)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_dtypes(models, bits, flags, load_dtype, compute_dtype):
    config = parse(models("qwen2"), bits=bits, **flags)
    assert qlora.compute_dtype(config) == compute_dtype
    assert (config.training.bf16, config.training.fp16) == (
        compute_dtype == torch.bfloat16,
        compute_dtype == torch.float16,
    )
    model = load(models("qwen2", tie=False), bits=bits, **flags)
    layers = [model.get_submodule(name) for name in linears("qwen2")]
    if bits == 4:
        assert {layer.compute_dtype for layer in layers} == {compute_dtype}
    quantised = {id(layer.weight) for layer in layers} if bits < 16 else set()
    kept = {name: p.dtype for name, p in model.named_parameters() if id(p) not in quantised}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= kept.keys()
    assert set(kept.values()) == {load_dtype}, kept


class ProductDtypes(TorchDispatchMode):
    """Collects the dtypes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        product = function.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm")
        if product and args[0].shape[-1] > 1:  # positions times frequencies, in float32 with transformers 5.17
            self.dtypes.add(output.dtype)
        return output


@pytest.mark.parametrize("tie", [True, False])
def test_bf16_run_keeps_the_base_in_bf16_and_computes_in_it(models, run_qlora, trained, monkeypatch, tie):
    products, training_step = ProductDtypes(), qlora.QLoRATrainer.training_step

    def watched_step(*args, **kwargs):
        with products:
            return training_step(*args, **kwargs)

    monkeypatch.setattr(qlora.QLoRATrainer, "training_step", watched_step)
    run = run_qlora(model_name_or_path=models("llama", tie=tie), bf16=True, max_steps=1)
    assert {tensor.dtype for tensor in adapter_of(run).values()} == {torch.float32}
    assert products.dtypes == {torch.bfloat16}
    head, embeddings = trained[0].get_output_embeddings(), trained[0].get_input_embeddings()
    assert type(head) is torch.nn.Linear and (head.weight is embeddings.weight) == tie
    dtypes = {
        name: tensor.dtype
        for name, tensor in [*trained[0].named_parameters(), *trained[0].named_buffers()]
        if not name.endswith("inv_freq")
    }
    for name, dtype in dtypes.items():
        if "lora_" in name:
            assert dtype == torch.float32, name
        else:
            assert dtype in (torch.bfloat16, torch.uint8), name


NORMS = {  # in each layer, and after the last
    **dict.fromkeys(("llama", "llama_gqa", "mistral", "qwen2", "gemma"), (2, 1)),
    **dict.fromkeys(("gpt_neox", "mpt", "gpt2"), (2, 1)),
    "falcon": (1, 1),
}


def norm_in(dtype: torch.dtype, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm or LayerNorm with every step in `dtype`."""
    x, weight = x.to(dtype), module.weight.to(dtype)
    if not isinstance(module, torch.nn.LayerNorm):
        weight = weight + 1 if "Gemma" in type(module).__name__ else weight
        eps = getattr(module, "variance_epsilon", None) or module.eps
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight
    x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + module.eps) * weight
    return x if module.bias is None else x + module.bias.to(dtype)


@pytest.mark.parametrize("family", NORMS)
def test_norms_are_computed_in_float32(models, family):
    model = load(models(family), bits=4, bf16=True)
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    in_layer, after = NORMS[family]
    assert len(norms) == 2 * in_layer + after
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(64, 64, generator=generator) + 5).bfloat16()
    for module in norms:
        with torch.no_grad():
            got = module(x)
        assert got.dtype == torch.bfloat16
        expected = norm_in(torch.float32, module, x)
        # bf16 rounds by at most 2**-8; llama's norm rounds before and after its weight
        close = {"rtol": 2**-7, "atol": 1e-4}
        assert torch.allclose(got.float(), expected, **close)
        assert not torch.allclose(norm_in(torch.bfloat16, module, x).float(), expected, **close)


def test_prequantised_checkpoint_is_loaded_as_it_is(models, run_qlora, trained):
    folder = models("prequantised")  # nf4 without double quantisation
    stored = original(folder)
    flags = {"bits": 4, "quant_type": "fp4", "double_quant": True}
    run = run_qlora(model_name_or_path=folder, max_steps=1, **flags)
    assert "already quantised" in run.stderr
    assert adapted(adapter_of(run)) == linears("llama")
    for name in linears("llama"):
        weight = trained[0].base_model.model.get_submodule(name).base_layer.weight
        assert torch.equal(weight, stored[f"{name}.weight"]), name
        assert (weight.quant_state.quant_type, weight.quant_state.nested) == ("nf4", False)


def test_prequantised_checkpoint_stays_quantised_at_16_bits(models):
    model = load(models("prequantised"), bits=16)
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
    assert weight.dtype == torch.uint8 and weight.quant_state.quant_type == "nf4"


# ------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------


def test_gguf_file_and_folder_are_dequantised_once(models, run_qlora, trained, tmp_path):
    base = models("llama", tokenizer="sentencepiece")
    folder, cache = models("gguf", base=base), tmp_path / "cache"
    flags = {"cache_dir": cache, "bits": 16, "max_steps": 1, "learning_rate": 0}
    first = run_qlora(model_name_or_path=folder / tiny.GGUF_FILE, output_dir=tmp_path / "1", **flags)
    assert adapted(adapter_of(first)) == linears("llama")
    assert first.stderr.count("dequantising") == 1
    (made,) = cache.rglob("*.safetensors")
    before = made.stat()
    second = run_qlora(model_name_or_path=folder, output_dir=tmp_path / "2", **flags)
    assert second.code == 0 and "dequantising" not in second.stderr
    assert list(cache.rglob("*.safetensors")) == [made]
    assert (made.stat().st_ino, made.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    expected = original(base)
    for model in trained:
        layers = model.base_model.model
        for name in linears("llama"):
            got = layers.get_submodule(name).base_layer.weight
            assert torch.allclose(got.float(), expected[f"{name}.weight"], rtol=2**-8, atol=0)


def test_gguf_folder_with_two_files_is_refused(models, run_qlora, tmp_path):
    file = models("gguf") / tiny.GGUF_FILE
    shutil.copy(file, tmp_path / "a.gguf")
    shutil.copy(file, tmp_path / "b.gguf")
    assert str(tmp_path) in error_of(run_qlora(model_name_or_path=tmp_path))


def test_remote_code_needs_the_flag(models, run_qlora, monkeypatch):
    folder = models("remote_code")
    monkeypatch.chdir(folder.parent)  # a message is cut at 400 characters, and names the folder three times
    assert "trust_remote_code" in error_of(run_qlora(model_name_or_path=folder.name, max_steps=1))
    run = run_qlora(model_name_or_path=folder, max_steps=1, trust_remote_code=True)
    adapter = adapter_of(run)
    names = {f"blocks.{layer}.{leaf}" for layer in (0, 1) for leaf in ("wqkv", "wo", "up", "down")}
    assert adapted(adapter) == names
    assert all(tensor.any() for key, tensor in adapter.items() if "lora_B" in key)


@pytest.mark.parametrize(
    ("environment", "settings", "expected"),
    [
        ({}, {}, "auto"),
        ({"LOCAL_RANK": "1"}, {}, {"": 1}),
        ({}, {"use_cpu": True}, {"": "cpu"}),
        ({"LOCAL_RANK": "1"}, {"deepspeed": "zero2.json"}, None),
        ({"LOCAL_RANK": "1"}, {"fsdp": "full_shard"}, None),
    ],
)
def test_device_map(models, monkeypatch, environment, settings, expected):
    config = parse(models("llama"))
    for name, value in {"use_cpu": False, **settings}.items():
        object.__setattr__(config.training, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert qlora.device_map(config) == expected


def test_device_map_without_a_gpu_is_the_cpu(models, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = parse(models("llama"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert config.training.use_cpu
    assert qlora.device_map(config) in ("cpu", {"": "cpu"})


def test_max_memory_is_set_for_each_gpu(models, monkeypatch):
    class StopError(Exception):
        pass

    def from_pretrained(*args, **kwargs):
        raise StopError(kwargs)

    config = parse(models("llama"), max_memory_MB=1234)
    object.__setattr__(config.training, "use_cpu", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(StopError) as stop:
        folder = str(models("llama"))
        qlora.load_model(config, qlora.load_model_config(config, folder), folder)
    (options,) = stop.value.args
    assert options["max_memory"] == {0: "1234MB", 1: "1234MB"}
    assert options["device_map"] == "auto"


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "roberta", "llama"])
def test_the_positions_that_a_model_has_are_those_that_it_can_read(models, family):
    """One more than learned positions is an error of torch's; rotary ones go on."""
    masked = family in ("bert", "roberta")
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model = auto.from_pretrained(models("encoder", family=family) if masked else models(family)).eval()
    _, limit, made_for = qlora.model_sizes(model)
    longest = int(min(limit, made_for))
    ids = torch.full((1, longest + 1), 9)
    with torch.no_grad():
        model(input_ids=ids[:, :-1], attention_mask=torch.ones_like(ids[:, :-1]))
        if limit == math.inf:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        else:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_a_row_longer_than_learned_positions_is_one_line(run_qlora, models, tmp_path):
    rows = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [{"input": "a" * 600, "output": "b"}])
    run = run_qlora(model_name_or_path=models("gpt2"), dataset=rows, source_max_len=1024, max_steps=1)
    assert run.code == 2 and "the model takes 512: pass --source_max_len 512, less" in run.stderr.splitlines()[-1]


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_rope_scaling_stretches_the_positions(models, key):
    folder = models("llama")
    scaled = load(folder, bits=32, rope_scaling=json.dumps({key: "linear", "factor": 2.0}))
    plain = reference(folder)
    frequencies = scaled.model.rotary_emb.inv_freq
    assert torch.equal(frequencies, plain.model.rotary_emb.inv_freq / 2)
    # even positions of the stretched model are the positions of the plain one
    inputs = {name: a_batch()[name] for name in ("input_ids", "attention_mask")}
    positions = 2 * torch.arange(inputs["input_ids"].shape[1])[None]
    with torch.no_grad():
        expected = plain(**inputs).logits
        assert torch.allclose(scaled(**inputs, position_ids=positions).logits, expected, atol=1e-5)
        assert not torch.allclose(scaled(**inputs).logits, expected, atol=1e-2)


def test_rope_scaling_stretches_the_layers_that_see_all(models):
    """Gemma 3's other layers have rotary settings of their own."""
    folder = models("gemma3", layer_types=["full_attention", "sliding_attention"])
    stretched = load(folder, bits=32, rope_scaling='{"rope_type": "linear", "factor": 2.0}').model.rotary_emb
    plain = reference(folder).model.rotary_emb
    assert torch.equal(stretched.full_attention_inv_freq, plain.full_attention_inv_freq / 2)
    assert torch.equal(stretched.sliding_attention_inv_freq, plain.sliding_attention_inv_freq)


@pytest.mark.parametrize(
    ("family", "value"),
    [
        ("llama", "{rope_type: linear}"),
        ("llama", "2.0"),
        ("llama", '{"rope_type": "elastic", "factor": 2.0}'),
        ("llama", '{"rope_type": "linear"}'),
        ("llama", '{"rope_type": "linear", "factor": -2.0}'),
        ("llama", '{"rope_type": "linear", "factor": "2"}'),
        ("mpt", '{"rope_type": "linear", "factor": 2.0}'),
        ("gpt2", '{"rope_type": "linear", "factor": 2.0}'),
    ],
    ids=["not JSON", "not an object", "unknown type", "no factor", "negative", "text", "ALiBi", "supervised positions"],
)
def test_invalid_rope_scaling_is_an_error(models, run_qlora, family, value):
    run = run_qlora(model_name_or_path=models(family), rope_scaling=value, max_steps=1)
    assert "--rope_scaling" in error_of(run)


def test_flash_attention_falls_back_to_torchs_own_with_a_warning(models, caplog):
    folder = models("llama")
    qlora.warn_once.cache_clear()
    qlora.log.addHandler(caplog.handler)
    try:
        model = load(folder, use_flash_attention_2=True)
    finally:
        qlora.log.removeHandler(caplog.handler)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert any("flash-attn" in r.getMessage() and "torch's own" in r.getMessage() for r in warnings)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attn_implementation_is_passed_on(models, kernel):
    assert load(models("llama"), attn_implementation=kernel).config._attn_implementation == kernel


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncated_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 10_000)


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')


def _unknown_model_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "camel"}')


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


@pytest.mark.parametrize(
    "damage", [_no_weights, _truncated_weights, _broken_config, _unknown_model_type, _no_tokenizer]
)
def test_damaged_model_is_one_line(models, run_qlora, tmp_path, damage):
    folder = shutil.copytree(models("llama"), tmp_path / "model")
    damage(folder)
    error = error_of(run_qlora(model_name_or_path=folder, max_steps=1))
    assert str(folder) in error


@pytest.mark.parametrize("name", ["no/such-model", "/no/such/folder", "no-such.gguf"])
def test_missing_model_is_one_line(run_qlora, name):
    assert name in error_of(run_qlora(model_name_or_path=name))


# ------------------------------------------------------------------------------------
# Adapters
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", LINEARS)
def test_every_adapter_learns_and_nothing_else(models, tmp_path, family, tie):
    model = build(models(family, tie=tie), bits=4).train()
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embeddings.weight) == tie
    assert not any(hasattr(module, "lora_A") for module in (head, embeddings))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**a_batch()).loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_A" in name or "lora_B" in name for name in trainable)
    assert all(p.grad.abs().sum() > 0 for name, p in trainable.items() if "lora_B" in name)
    assert {p.dtype for p in trainable.values()} == {torch.float32}

    model.save_pretrained(tmp_path)
    expected = {f"base_model.model.{name}.lora_{matrix}.weight" for name in linears(family) for matrix in "AB"}
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == expected


@pytest.mark.parametrize(
    ("family", "tie", "bits"),
    [("llama", False, 8), ("gpt2", True, 16), ("falcon", None, 4)],
)
def test_one_step_changes_every_adapter_and_saves_nothing_else(models, run_qlora, family, tie, bits):
    folder = models(family, tie=tie, tokenizer=partial(tiny.write_byte, pad=None))
    adapter = adapter_of(run_qlora(model_name_or_path=folder, bits=bits, max_steps=1))
    expected = {f"base_model.model.{name}.lora_{matrix}.weight" for name in linears(family) for matrix in "AB"}
    assert adapter.keys() == expected  # in particular no embedding, resized or not
    assert all(tensor.any() for tensor in adapter.values())  # lora_B starts at zero


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(models, bits):
    folder = models("llama")
    model = build(folder, bits=bits).train()
    generator = torch.Generator().manual_seed(0)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in parameters.items():
        if "lora_B" in name:  # while B is zero, A has no gradient
            parameter.data.normal_(std=0.1, generator=generator)
    calls: list[int] = []
    layer = model.base_model.model.model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    gradients = []
    for recompute in (True, False):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        model.zero_grad()
        calls.clear()
        model(**a_batch()).loss.backward()
        assert len(calls) == 1 + recompute
        gradients.append({name: p.grad.clone() for name, p in parameters.items()})
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-6), name


def test_gradient_checkpointing_in_a_run(run_qlora, tmp_path, computed):
    """With SGD the adapter's change is its gradient."""
    expected = {
        "default": ({}, [1, 1]),  # a machine has memory for that
        "off": ({"gradient_checkpointing": False}, [1, 1]),
        "none": ({"recompute_layers": "none"}, [1, 1]),
        "one": ({"recompute_layers": 1}, [2, 1]),
        "all": ({"recompute_layers": "all"}, [2, 2]),
    }
    adapters = []
    for name, (flags, counts) in expected.items():
        computed.clear()
        shared = {"optim": "sgd", "learning_rate": 1, "max_steps": 2, "save_strategy": "no"}
        adapters.append(adapter_of(run_qlora(output_dir=tmp_path / name, **shared, **flags)))
        assert computed == [counts] * 2, name
    for other in adapters[1:]:
        for name, tensor in adapters[0].items():
            assert torch.allclose(tensor, other[name], rtol=1e-4, atol=1e-6), name


def test_parameter_report_counts_true_parameters(models, run_qlora):
    """Vocabulary 320, hidden 64, intermediate 128, 2 layers, r 4."""
    layer = 4 * 64 * 64 + 3 * 64 * 128
    base = 320 * 64 + 2 * (layer + 2 * 64) + 64  # embeddings, layers with norms, last norm
    lora = 2 * 4 * (4 * (64 + 64) + 3 * (64 + 128))
    for bits, tie in [(4, True), (4, False), (8, False), (16, True)]:
        total = base + lora + (0 if tie else 320 * 64)
        first, *rest = qlora.parameter_report(build(models("llama", tie=tie), bits=bits))
        words = first.replace("||", "").split()
        assert first.startswith(f"trainable params: {lora:,} || all params: {total:,} || trainable: ")
        assert math.isclose(float(words[-2]), 100 * lora / total, rel_tol=1e-3)
        text = "\n".join(rest)
        in_float = total - (2 * layer if bits < 16 else 0)
        assert len(rest) == (2 if bits < 16 else 1) + 2  # and the kinds of layers with adapters and without
        assert f"{in_float:,}" in text and (bits >= 16 or f"{2 * layer:,}" in text)
    run = run_qlora(max_steps=1)
    total = base + lora + 320 * 64
    assert f"trainable params: {lora:,} || all params: {total:,} || trainable: " in run.stderr


def test_lora_dtype_bfloat16_is_pure(models, run_qlora, trained):
    run = run_qlora(lora_dtype="bfloat16", bf16=True, max_steps=1, use_dora=True)
    adapter = adapter_of(run)
    assert {tensor.dtype for tensor in adapter.values()} == {torch.bfloat16}
    kept = {p.dtype for p in trained[0].parameters()}
    assert kept == {torch.bfloat16, torch.uint8}
    assert all(tensor.any() for key, tensor in adapter.items() if "lora_B" in key)


def test_a_seed_gives_one_initialisation(run_qlora, tmp_path):
    first, again, other = (
        adapter_of(run_qlora(output_dir=tmp_path / str(i), max_steps=1, learning_rate=0, **flags))
        for i, flags in enumerate([{"seed": 7}, {"seed": 7, "bits": 16}, {"seed": 8}])
    )
    for key, tensor in first.items():
        assert torch.equal(tensor, again[key]), key
        assert torch.equal(tensor, other[key]) == ("lora_B" in key)  # zeros


@pytest.mark.parametrize("family", LINEARS)
def test_lora_modules_groups(models, family):
    folder = models(family)
    model = load(folder, bits=16)
    for part in ("attn", "mlp", "attn,mlp"):
        targets = qlora.lora_targets(model, parse(folder, lora_modules=part).lora)
        got = {  # as peft reads a list: full names, or the last parts of them
            name for name, _ in model.named_modules() if any(f".{name}".endswith(f".{target}") for target in targets)
        }
        assert got == linears(family, "all" if "," in part else part), part


@pytest.mark.parametrize("value", ["query", "lm_head", "embed_tokens"])
def test_unknown_lora_modules_are_an_error(run_qlora, value):
    error = error_of(run_qlora(lora_modules=value))
    assert value in error and "q_proj" in error


@pytest.mark.parametrize("flags", [{"layers_to_freeze": 1}, {"layer_freeze_ratio": 0.5}])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mpt", "gpt2"])
def test_frozen_layers_get_no_adapters(models, family, flags):
    model = build(models(family), bits=16, **flags)
    assert adapted(n for n, _ in model.named_parameters()) == linears(family, layers=(1,))


@pytest.mark.parametrize("flags", [{"layers_to_freeze": 2}, {"layer_freeze_ratio": 1.0}])
def test_freezing_every_layer_is_an_error(run_qlora, flags):
    assert next(iter(flags)) in error_of(run_qlora(**flags))


@pytest.mark.parametrize(("init", "starts_at_zero"), [("gaussian", True), ("pissa", False)])
def test_init_lora_weights_is_passed_on(models, init, starts_at_zero):
    model = build(models("llama"), bits=32, init_lora_weights=init)
    b = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(b) == 14 and all(bool(p.any()) != starts_at_zero for p in b)


@pytest.mark.parametrize(("init", "bits"), [("xavier", 16), ("pissa", 4)])
def test_unsupported_init_lora_weights_are_an_error(run_qlora, init, bits):
    assert init in error_of(run_qlora(init_lora_weights=init, bits=bits)).lower()


def test_missing_or_unfitting_adapter_is_an_error(models, run_qlora, tmp_path):
    missing = tmp_path / "none"
    assert str(missing) in error_of(run_qlora(adapter_name_or_path=missing))
    build(models("llama"), bits=16).save_pretrained(tmp_path / "llama")
    run = run_qlora(model_name_or_path=models("llama_gqa"), adapter_name_or_path=tmp_path / "llama")
    assert str(tmp_path / "llama") in error_of(run)


# ------------------------------------------------------------------------------------
# Full fine-tune
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tie", "flags", "dtype", "frozen"),
    [
        (True, {"bits": 16, "bf16": True}, torch.bfloat16, ()),
        (False, {"bits": 16}, torch.float32, ()),
        (False, {"bits": 32, "layers_to_freeze": 1}, torch.float32, ("model.layers.0.",)),
    ],
)
def test_full_finetune(models, run_qlora, tie, flags, dtype, frozen):
    folder = models("llama", tie=tie)
    run = run_qlora(
        model_name_or_path=folder,
        full_finetune=True,
        optim="adamw_torch",
        learning_rate=0.05,
        max_steps=1,
        **flags,
    )
    assert run.code == 0 and "adapter_model.safetensors" not in run.files()
    after, before = original(run.output_dir), original(folder)
    assert after.keys() == before.keys()  # tied or not, as the base is
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        changed = not torch.equal(tensor, before[name].to(dtype))
        assert changed == (not name.startswith(("model.embed_tokens.", *frozen))), name
    assert run.json("config.json")["tie_word_embeddings"] == tie
    ids = a_batch()["input_ids"]
    assert reference(run.output_dir)(ids).logits.isfinite().all()


def test_full_finetune_of_a_prequantised_checkpoint_is_an_error(models, run_qlora):
    run = run_qlora(model_name_or_path=models("prequantised"), full_finetune=True, bits=16)
    assert "quantised" in error_of(run)


def test_a_model_without_gradient_checkpointing_trains_and_says_so(run_qlora, models, monkeypatch):
    """Its layers are not of transformers' kind that can be recomputed one by one."""
    monkeypatch.setattr("transformers.LlamaPreTrainedModel.supports_gradient_checkpointing", False)
    monkeypatch.setattr(qlora, "decoder_layers", lambda model: [])
    run = run_qlora(model_name_or_path=models("llama"), max_steps=1, recompute_layers="all")
    assert run.code == 0 and "nothing is recomputed" in run.stderr


@pytest.mark.parametrize("flags", [{}, {"full_finetune": True, "bits": 32}], ids=str)
def test_frozen_layers_are_not_recomputed(run_qlora, computed, flags):
    """No gradient passes through them: recomputing them would be wasted work."""
    assert run_qlora(layers_to_freeze=1, max_steps=1, recompute_layers="all", **flags).code == 0
    assert computed == [[1, 2]]


def test_mixed_precision_leaves_no_float32_copy_of_embeddings_and_head(run_qlora, monkeypatch):
    """peft's prepare_model_for_kbit_training would make one. Only the adapters are float32."""
    dtypes, train = defaultdict(set), Trainer.train

    def spy(self, *args, **kwargs):
        for name, parameter in self.model.named_parameters():
            dtypes[parameter.dtype].add(name.split(".")[-2])
        return train(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", spy)
    assert run_qlora(bf16=True, max_steps=1).code == 0
    assert dtypes[torch.float32] == {"default"}  # lora_A.default.weight, lora_B.default.weight
    assert {"embed_tokens", "lm_head", "norm"} <= dtypes[torch.bfloat16]
