"""Correct before fast: every part of the fast path, alone and together, computes what the libraries compute.

In float64, so that the loss and every gradient agree within a relative error of 1e-9. Rotary angles are float32 in any
model: where left padding shifts the positions, agreement ends at that precision.
"""

import contextlib
import copy
import itertools
import random
import re
import shutil
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import tiny
import tiny_classes
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import qlora

LENGTHS = (23, 5, 40, 17, 17, 2)  # of one step's rows; several are longer than the sliding windows below
DOUBLE, SINGLE = 1e-9, 1e-5


@pytest.fixture(scope="module", autouse=True)
def _on_a_cpu_in_float64():
    """Also where there is a GPU, and where transformers asks for a softmax in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(F, "softmax", reference.wide_softmax)
        yield


@contextlib.contextmanager
def counted_layers(model):
    """Count how often each layer runs, recomputation included: a list with one number a run."""
    calls: list[int] = []
    layers = qlora.decoder_layers(reference.base_of(model))
    first = [next(layer.children()) for layer in layers]  # hooks of the layer itself are not called again
    hooks = [part.register_forward_pre_hook(lambda *args, i=i: calls.append(i)) for i, part in enumerate(first)]
    yield calls
    for hook in hooks:
        hook.remove()


# ------------------------------------------------------------------------------------
# Families: each part alone, and all together
# ------------------------------------------------------------------------------------

# Family -> its config; whether rows lie end to end; whether the head is applied in chunks; how often two recomputed
# layers run AddFrozen. None: whatever the trial finds; the numbers must agree all the same.
FAMILIES: dict[str, tuple[str, dict[str, Any], bool | None, bool, int]] = {
    "llama": ("llama", {}, True, True, 2),
    "llama tied": ("llama", {"tie": True}, True, True, 2),
    "llama_gqa": ("llama_gqa", {}, True, True, 2),
    "mistral": ("mistral", {"sliding_window": 8}, True, True, 2),
    "qwen2": ("qwen2", {}, True, True, 2),
    "qwen3": ("qwen3", {}, True, True, 2),
    "gemma": ("gemma", {}, True, True, 2),
    "gemma2": ("gemma2", {"sliding_window": 8}, None, True, 4),  # a norm after the MLP; its logits are capped
    "gemma3": ("gemma3", {"sliding_window": 8}, True, True, 4),
    "lfm2": ("lfm2", {}, False, True, 0),  # its convolution would see the row before
    "gpt2": ("gpt2", {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}, None, True, 0),
    "gpt_neox": ("gpt_neox", {}, None, True, 0),
    "opt": ("opt", {"dropout": 0.0}, None, True, 0),
    "falcon": ("falcon", {}, None, True, 0),
    "mpt": ("mpt", {}, False, True, 0),
}
GATED = ("llama", "mistral", "qwen", "gemma")  # q, k, v apart and a gated MLP: two fused calls a layer and one


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, models):
    """Return (name, pair of models, rows, expected result)."""
    model, options, *_ = FAMILIES[request.param]
    both = reference.make(models(model, **options), bits=16)
    rows = reference.rows_of(LENGTHS)
    return request.param, both, rows, reference.stock(both.stock, rows)


def tolerance(name: str) -> float:
    """MPT makes its attention scores float32 by name."""
    return SINGLE if name == "mpt" else DOUBLE


def test_parts_that_a_family_takes(family):
    name, both, _, _ = family
    _, _, attention, head, _ = FAMILIES[name]
    assert attention is None or attention == bool(both.fast.attention)
    assert head == bool(both.fast.head) == bool(both.fast.body)
    assert bool(both.fast.off) == (both.fast.attention is None or name == "gpt2")
    assert name != "lfm2" or "they would see each other" in both.fast.lines()["not used"]
    line = both.fast.lines()["fast path"]
    assert ("padding-free rows" in line) == bool(both.fast.attention) and ("logits in chunks" in line) == head


def test_fused_functions_match_pefts_layers(family):
    name, both, rows, expected = family
    with reference.counted() as calls:
        got = reference.quick(both.quick, qlora.FastPath(), reference.step_of(rows))
    reference.assert_equal(got, expected, tolerance(name))
    if name.startswith(GATED):
        assert calls == {"FusedLoRA": 2 * 2, "FusedMLP": 2, "AddFrozen": 2}  # of two layers
    elif name != "gpt2":  # its layers are no nn.Linear
        assert calls["FusedLoRA"] > 0
    assert all(group.source is None and not group.outputs for group in both.fast.groups), "no autograd graph is held"


def test_padding_free_rows_match_single_rows(family):
    name, both, rows, expected = family
    if both.fast.attention is None:
        pytest.skip("rows of this family are padded")
    with reference.counted() as calls:
        got = reference.quick(both.stock, qlora.FastPath(attention=both.fast.attention), reference.step_of(rows))
    reference.assert_equal(got, expected, tolerance(name))
    assert calls == {"attention": 2}


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows_match_single_rows(family, side):
    name, both, rows, expected = family
    if side == "left" and name in ("gpt2", "mpt"):
        pytest.skip("its positions count the padding")
    got = reference.quick(both.stock, qlora.FastPath(), reference.step_of(rows), side=side)
    reference.assert_equal(got, expected, SINGLE if side == "left" else tolerance(name))


def test_a_head_in_chunks_matches_whole_logits(family):
    name, both, rows, expected = family
    with reference.counted() as calls:
        got = reference.quick(both.stock, both.fast._replace(attention=None), reference.step_of(rows))
    reference.assert_equal(got, expected, tolerance(name))
    assert calls == {"head": 1}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_recomputed_layers_match_kept_ones_and_leave_out_the_last_frozen_product(family, layers, small):
    """torch's checkpoint stops before AddFrozen, which saves nothing, unless a norm comes after the MLP."""
    name, both, rows, expected = family
    with reference.counted() as calls, counted_layers(both.quick) as layer_calls:
        got = reference.quick(both.quick, qlora.FastPath(), reference.step_of(rows), recomputed=layers, small=small)
    reference.assert_equal(got, expected, tolerance(name))
    assert sorted(layer_calls) == sorted([0, 1, *range(layers)])
    if name.startswith(GATED):
        assert calls["FusedLoRA"] == 2 * (2 + layers) and calls["FusedMLP"] == 2 + layers
        stops_early = FAMILIES[name][-1] == 2 and not small
        assert calls["AddFrozen"] == (2 if stops_early else 2 + layers)


CUTS = {  # of six rows with 104 tokens
    "one by one": lambda step, padded: qlora.micro_batches(step, 1, qlora.NO_LIMIT, padded),
    "accumulated": lambda step, padded: qlora.micro_batches(step, 2, qlora.NO_LIMIT, padded),
    "accumulated, at most 30 tokens": lambda step, padded: qlora.micro_batches(step, 4, 30, padded),
    "regrouped, at most 60 tokens": lambda step, padded: qlora.micro_batches(step, None, 60, padded),
    "regrouped, all": lambda step, padded: qlora.micro_batches(step, None, qlora.NO_LIMIT, padded),
}


@pytest.mark.parametrize("cut", ["accumulated, at most 30 tokens", "regrouped, at most 60 tokens", "packs"])
def test_everything_together_however_a_step_is_cut(family, cut):
    """A pack is rows of a dataset that travel together; the model sees them as rows."""
    name, both, rows, expected = family
    step = reference.step_of([{"pack": rows[:2]}, {"pack": rows[2:5]}, {"pack": rows[5:]}] if cut == "packs" else rows)
    assert step.lengths.tolist() == list(LENGTHS)
    parts = CUTS.get(cut, CUTS["accumulated"])(step, both.fast.attention is None)
    assert cut != "packs" or parts == [[0, 1, 2, 3, 4], [5]]
    with reference.counted() as calls, counted_layers(both.quick) as layer_calls:
        got = reference.quick(both.quick, both.fast, step, parts, recomputed=2)
    reference.assert_equal(got, expected, tolerance(name))
    assert calls["head"] == len(parts) and len(layer_calls) == 2 * 2 * len(parts)


def test_layers_that_take_more_than_their_input_are_recomputed(tmp_path):
    """Gemma 4's take keys and values of an earlier layer, and an input of their own."""
    if "gemma4_text" not in CONFIG_MAPPING:
        pytest.skip("these transformers do not know Gemma 4")
    shape = tiny.FAMILIES["gemma3"][1] | {"num_hidden_layers": 4, "global_head_dim": 16, "vocab_size": 260}
    shape |= {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 260, "num_kv_shared_layers": 2}
    shape |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
    shape.pop("query_pre_attn_scalar")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **shape)).save_pretrained(tmp_path)
    both, rows = reference.make(tmp_path, dtype=None, bits=16, objective="clm"), reference.rows_of(LENGTHS)
    expected = reference.stock(both.stock, rows)
    for layers, small in itertools.product((0, 2, 4), (False, True)):
        got = reference.quick(both.quick, both.fast, reference.step_of(rows), recomputed=layers, small=small)
        reference.assert_equal(got, expected, 1e-4)


def test_few_tokens_are_recomputed_without_hooks(models, monkeypatch):
    """By torch's older kind of checkpoint, which asks for nothing but the layer's input, and by the newer one above."""
    both, kinds = reference.make(models("llama"), bits=16), []
    original = torch.utils.checkpoint.checkpoint

    def spy(run, *args, use_reentrant, **options):
        kinds.append(use_reentrant)
        return original(run, *args, use_reentrant=use_reentrant, **options)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", spy)
    base = reference.base_of(both.quick)
    for tokens, gpus, expected in ((2047, 1, True), (2048, 1, False), (2047, 2, False)):
        monkeypatch.setattr(type(both.config.training), "world_size", gpus)
        qlora.apply_step_plan(base, qlora.StepPlan(None, tokens, 2), both.config)
        kinds.clear()
        base.train()(input_ids=torch.arange(8)[None])
        assert kinds == [expected] * 2


def test_inputs_of_recomputed_layers_kept_in_cpu_memory_are_the_same(models):
    both = reference.make(models("llama"), bits=16)
    step = reference.step_of(reference.rows_of(LENGTHS))
    expected, got = (
        reference.quick(both.quick, both.fast, step, recomputed=2, offload=offload) for offload in (False, True)
    )
    reference.assert_equal(got, expected, 0.0)


# ------------------------------------------------------------------------------------
# The trial before training: rows that would see each other are padded
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nemotron", "doge"])
def test_a_model_that_ignores_lengths_or_makes_its_own_mask_pads_its_rows(tmp_path, name):
    torch.manual_seed(0)
    shape = tiny.FAMILIES["llama"][1] | {"vocab_size": 260, "num_key_value_heads": 4, "head_dim": 16}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape)).save_pretrained(tmp_path)
    both, rows = reference.make(tmp_path, dtype=None, bits=16, objective="clm"), reference.rows_of(LENGTHS)
    assert both.fast.attention is None and "rows are padded: " in both.fast.lines()["not used"]
    if name == "nemotron":  # Doge's mask hides nothing in rows as short as these: the layer behind it has no gradient
        got = reference.quick(both.quick, both.fast, reference.step_of(rows), recomputed=2)
        reference.assert_equal(got, reference.stock(both.stock, rows), 1e-4)


class ScaledEmbeddings(LlamaForCausalLM):
    """Changes what enters its body."""

    def forward(self, input_ids=None, **kwargs):
        return super().forward(**kwargs | {"inputs_embeds": 1.01 * self.model.embed_tokens(input_ids)})


class ScaledStates(LlamaForCausalLM):
    """Changes what its body hands to the head."""

    def forward(self, input_ids=None, **kwargs):
        kwargs = {name: kwargs[name] for name in ("attention_mask", "position_ids") if name in kwargs}
        states = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(1.01 * states))


@pytest.mark.parametrize(
    ("kind", "chunks"), [(ScaledEmbeddings, False), (ScaledStates, False), (LlamaForCausalLM, True)]
)
def test_a_model_that_changes_states_a_little_computes_whole_logits(kind, chunks):
    torch.manual_seed(0)
    base = kind(LlamaConfig(**tiny.FAMILIES["llama"][1], vocab_size=260))
    model = qlora.make_trainable(base, reference.parse("none", bits=16, objective="clm"), None)
    both = reference.make("none", model, dtype=None, bits=16, objective="clm")
    assert (both.fast.body is not None) == chunks
    rows = reference.rows_of(LENGTHS)
    got = reference.quick(both.quick, both.fast, reference.step_of(rows))
    reference.assert_equal(got, reference.stock(both.stock, rows), 1e-4)


# Every family of transformers 5.23 whose attention reaches back over a window or a chunk only and that may take rows
# end to end: what its config needs beside SPANNED, and whether it does where rows are longer than the window.
SPANNED = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 260,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.1,
    "pad_token_id": 0, "bos_token_id": 256, "eos_token_id": 257, "num_local_experts": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "sliding_window": 32, "use_sliding_window": True,
    "max_window_layers": 0, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
_OWN = {"layer_types": None}  # all layers are of one kind, or the family says which are not
_CHUNKS = {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 32, "sliding_window": None}
_CHUNKS |= {"no_rope_layers": [1, 0], "intermediate_size_mlp": 128, "attn_temperature_tuning": False}
_GEMMA4 = {"global_head_dim": 16, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 260}
SPANNED_FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    **dict.fromkeys(
        ["afmoe", "beam", "cohere2", "cohere2_moe", "cwm", "exaone4", "exaone_moe", "gemma3_text", "kolibri1", "laguna",
         "mellum", "ministral", "modernbert-decoder", "olmo3", "qwen2", "qwen3", "smollm3"], ({}, True)),
    **dict.fromkeys(["ministral3", "mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2"], (_OWN, True)),
    "dots1": ({"n_shared_experts": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}, True),
    "gemma4_text": (_GEMMA4 | {"num_kv_shared_layers": 0}, True),
    "llama4_text": (_CHUNKS, False),  # these have it in the mask alone
    "olmoe": (_OWN, False),
    "phimoe": (_OWN | {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0}, False),
    "qwen2_moe": ({}, False),
}  # fmt: skip


def spanned(name: str, longest: int, **options: Any) -> reference.Pair:
    """A tiny model of the family, its rows of at most so many tokens."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"these transformers do not know {name}")
    shape = {key: value for key, value in (SPANNED | options).items() if value is not None}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape)).float()
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    flags = {"bits": 16, "model_max_len": longest, "objective": "clm"}
    model = qlora.make_trainable(base, reference.parse("none", **flags), None)
    return reference.make("none", model, dtype=None, **flags)


SPANNED_ROWS = (70, 45, 40, 17, 33)


def assert_spanned(both: reference.Pair) -> None:
    """As rows and as packs, the model must give what transformers computes from padded rows."""
    rows = reference.rows_of(SPANNED_ROWS)
    expected = reference.quick(both.stock, qlora.FastPath(), reference.step_of(rows))
    packs = reference.step_of([{"pack": rows[:3]}, {"pack": rows[3:]}])
    for step, parts in ((reference.step_of(rows), None), (packs, [[0, 1, 2], [3, 4]])):
        reference.assert_equal(reference.quick(both.quick, both.fast, step, parts, recomputed=1), expected, 1e-3)


@pytest.mark.parametrize("name", SPANNED_FAMILIES)
def test_rows_longer_than_the_window_see_no_further_back(name):
    """The trial's rows are shorter than the window, as a real model's always are."""
    options, padding_free = SPANNED_FAMILIES[name]
    both = spanned(name, longest=70, **options)
    assert bool(both.fast.attention) == padding_free
    assert any(reason.startswith("rows are padded: ") for reason in both.fast.off) == (not padding_free)
    assert_spanned(both)


@pytest.mark.parametrize("name", ["olmoe", "phimoe", "qwen2_moe"])
def test_a_window_as_long_as_any_row_needs_no_mask(name):
    options, _ = SPANNED_FAMILIES[name]
    both = spanned(name, longest=70, **{**options, "sliding_window": 70})
    assert both.fast.attention == qlora.VARLEN_ATTENTION
    assert_spanned(both)


def test_attention_scaled_by_the_position_in_a_micro_batch_is_noticed():
    """That of Llama 4's layers without rotary embedding, in steps of 8192 tokens; here of 30."""
    scaled = {"attn_temperature_tuning": True, "floor_scale": 30, "attention_chunk_size": 512}
    both = spanned("llama4_text", longest=70, **_CHUNKS | scaled)
    assert both.fast.attention is None and "by the position in a micro-batch" in both.fast.lines()["not used"]
    assert_spanned(both)
    both = spanned("llama4_text", longest=70, **_CHUNKS | {"attention_chunk_size": 512})
    assert both.fast.attention == qlora.VARLEN_ATTENTION
    assert_spanned(both)


def test_the_trial_restores_the_windows_and_the_module_state():
    both = spanned("mistral", longest=70, **_OWN)
    base = reference.base_of(both.quick)
    windows = [getattr(module, "sliding_window", None) for module in base.modules()]
    assert base.config.sliding_window == 32 and {value for value in windows if isinstance(value, int)} <= {32}
    assert base.config._attn_implementation != qlora.VARLEN_ATTENTION


class Engine(torch.nn.Module):
    """Like DeepSpeed's wrapper, which always says that it trains."""

    def __init__(self, model) -> None:
        super().__init__()
        self.module = model

    def train(self, mode=True):
        self.module.train(mode)
        return self

    def forward(self, **inputs):
        return self.module(**inputs)


@pytest.mark.parametrize("training", [False, True])
def test_the_trial_on_a_sharded_model_leaves_dropout_as_it_was(models, training):
    both = reference.make(models("llama"), bits=16)
    model, fast = Engine(both.quick).train(training), qlora.FastPath(sharded=True)
    fast = qlora.choose_fast_path(model, reference.base_of(both.quick), fast, both.config)
    assert fast.attention and fast.head is None, "an engine gathers the head's weight inside the model's forward alone"
    assert {module.training for module in both.quick.modules()} == {training}


def test_a_sharded_model_computes_logits_of_labelled_tokens_only(models):
    """Logits of the others may overflow in float16, where the backward pass of all logits begins."""
    both = reference.make(models("llama"), bits=16)
    batch = qlora.padding_free_batch(reference.step_of(reference.rows_of([20])), [0])
    unlabelled = min({*range(20)} - {*batch["positions"].tolist()})
    base = reference.base_of(both.quick)

    def overflow(module, args, output):
        return output.index_fill(1, torch.tensor([unlabelled]), torch.inf)

    sharded = qlora.FastPath(attention=both.fast.attention, sharded=True)
    with qlora.attention_implementation(base, both.fast.attention):
        expected = qlora.summed_loss(both.quick, both.fast, batch)
        base.model.norm.register_forward_hook(overflow)
        loss = qlora.summed_loss(both.quick, sharded, batch)
    assert loss.isfinite() and torch.allclose(loss.double(), expected, rtol=1e-6) and loss.requires_grad


# ------------------------------------------------------------------------------------
# Precisions, dropout and flags that change what the layers compute
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bits"), [("llama_gqa", 4), ("qwen2", 8), ("mistral", 4)])
def test_quantised_bases_give_one_loss_and_one_gradient_however_a_step_is_cut(models, name, bits):
    model, options, *_ = FAMILIES[name]
    both = reference.make(models(model, **options), bits=bits)
    step = reference.step_of(reference.rows_of(LENGTHS))
    expected = reference.quick(both.stock, qlora.FastPath(), step)
    left_out = ({}, {"attention": None}, {"body": None, "head": None}, {}, {})
    for (cut, make), off, recomputed in zip(CUTS.items(), left_out, (0, 1, 2, 2, 2), strict=True):
        fast = both.fast._replace(**off)
        parts = make(step, fast.attention is None)
        got = reference.quick(both.quick, fast, step, parts, recomputed)
        assert max(reference.errors(got, expected).values()) <= DOUBLE, cut


# Variant -> family, flags, calls of FusedLoRA and FusedMLP in each of two layers. With dropout or without.
VARIANTS: dict[str, tuple[str, dict[str, Any], tuple[float, float]]] = {
    "nf4": ("llama_gqa", {"bits": 4}, (2, 1)),
    "nf4, plain constants": ("llama_gqa", {"bits": 4, "double_quant": False, "lora_dropout": 0.1}, (2, 1)),
    "fp4": ("llama_gqa", {"bits": 4, "quant_type": "fp4"}, (2, 1)),
    "nf4 gpt_neox": ("gpt_neox", {"bits": 4, "lora_dropout": 0.1}, (4, 0)),
    "nf4 qwen3": ("qwen3", {"bits": 4, "lora_dropout": 0.1}, (2, 1)),
    "8 bit": ("llama_gqa", {"bits": 8}, (2, 1)),
    "8 bit gemma": ("gemma", {"bits": 8, "lora_dropout": 0.1}, (2, 1)),
    "16 bit": ("llama_gqa", {"lora_dropout": 0.1}, (2, 1)),
    "rslora, bias, nf4": (
        "qwen2", {"use_rslora": True, "lora_bias": "all", "bits": 4, "lora_alpha": 7.5, "lora_dropout": 0.1}, (2, 1)),
    "rslora, bias, 8 bit": ("qwen2", {"use_rslora": True, "lora_bias": "lora_only", "bits": 8}, (2, 1)),
    "every bias": ("qwen2", {"lora_bias": "all"}, (2, 1)),
    "bias of norms too": ("gpt_neox", {"lora_bias": "all"}, (4, 0)),
    "attn": ("llama_gqa", {"lora_modules": "attn", "lora_dropout": 0.1}, (2, 0)),
    "mlp": ("llama_gqa", {"lora_modules": "mlp", "lora_dropout": 0.1}, (0, 1)),
    "q_proj": ("llama_gqa", {"lora_modules": "q_proj"}, (1, 0)),
    "q and v": ("llama_gqa", {"lora_modules": "q_proj,v_proj", "lora_dropout": 0.1}, (1, 0)),
    "gate and down": ("llama_gqa", {"lora_modules": "gate_proj,down_proj"}, (2, 0)),
    "frozen layer": ("llama_gqa", {"layers_to_freeze": 1, "lora_dropout": 0.1}, (1, 0.5)),
    "large rank": ("llama_gqa", {"lora_r": 96}, (2, 1)),  # more than the layers are wide
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_functions_under_every_flag(models, variant):
    """The same rows, end to end, with the same masks: without and with the fused functions and recomputation."""
    name, flags, (fused, mlp) = VARIANTS[variant]
    both = reference.make(models(name), **{"bits": 16, **flags})
    if dropout := "lora_dropout" in flags:
        reference.draw_alike(both.stock)
    step = reference.step_of(reference.rows_of(LENGTHS))
    torch.manual_seed(1)
    expected = reference.quick(both.stock, both.fast, step)
    for recomputed in (0, 1, 2):
        torch.manual_seed(1)
        with reference.counted() as calls:
            got = reference.quick(both.quick, both.fast, step, recomputed=recomputed)
        reference.assert_equal(got, expected, DOUBLE)
        assert recomputed or (calls["FusedLoRA"], calls["FusedMLP"]) == (2 * fused, 2 * mlp)
    if dropout:  # the masks matter
        torch.manual_seed(2)
        other = reference.quick(both.quick, both.fast, step)
        assert min(reference.errors(other, expected).values()) > 1e-3


def test_layers_of_different_rank_and_scaling_share_an_input(models):
    """As an adapter from elsewhere may have them."""
    folder = models("llama_gqa")
    for dropout in (0.0, 0.1):
        config = LoraConfig(
            r=4, rank_pattern={"q_proj": 2, "v_proj": 8}, alpha_pattern={"k_proj": 32, "up_proj": 1},
            lora_dropout=dropout, target_modules="all-linear", init_lora_weights=False,
        )  # fmt: skip
        both = reference.make(folder, get_peft_model(reference.load(folder, bits=16).unload(), config), bits=16)
        reference.draw_alike(both.stock) if dropout else None
        step = reference.step_of(reference.rows_of(LENGTHS))
        torch.manual_seed(1)
        expected = reference.quick(both.stock, both.fast, step)
        torch.manual_seed(1)
        with reference.counted() as calls:
            got = reference.quick(both.quick, both.fast, step, recomputed=2)
        reference.assert_equal(got, expected, DOUBLE)
        assert calls["FusedLoRA"] == 2 * 2 * 2


def test_layers_that_draw_random_numbers_draw_them_again_when_recomputed():
    """PhiMoE multiplies its router's input with noise, by 1 % as published: dropout by another name."""
    jitter = {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3}
    both = spanned("phimoe", longest=70, **_OWN | jitter)
    base, step, results = reference.base_of(both.quick), reference.step_of(reference.rows_of((40, 33))), []
    batch = qlora.padded_batch(step, [0, 1], 0, "right")
    for recomputed in (0, 2):
        plan = qlora.StepPlan(None, qlora.NO_LIMIT, recomputed)
        qlora.apply_step_plan(base, plan, both.config)
        torch.manual_seed(1)
        loss = qlora.summed_loss(both.quick, both.fast, batch)
        loss.backward()
        results.append(reference.result_of(both.quick, loss))
    reference.assert_equal(results[1], results[0], 1e-5)


def test_an_adapters_own_dropout_is_drawn_again_when_recomputed(models):
    """An adapter to start from keeps its dropout, whatever --lora_dropout says."""
    both = reference.make(models("llama"), bits=16, lora_dropout=0.5)
    config = reference.parse(models("llama"), bits=16, lora_dropout=0.0)
    base, step, results = reference.base_of(both.quick), reference.step_of(reference.rows_of((40, 33))), []
    for recomputed in (0, 2):
        qlora.apply_step_plan(base, qlora.StepPlan(None, qlora.NO_LIMIT, recomputed), config)
        both.quick.zero_grad()
        torch.manual_seed(1)
        loss = qlora.summed_loss(both.quick, both.fast, qlora.padded_batch(step, [0, 1], 0, "right"))
        loss.backward()
        results.append(reference.result_of(both.quick, loss))
    reference.assert_equal(results[1], results[0], DOUBLE)


@pytest.mark.parametrize("kind", ["DoRA", "bias in lora_B"])
def test_adapters_of_another_kind_keep_pefts_functions(models, kind):
    folder, flags = models("llama"), {"bits": 16, "use_dora": kind == "DoRA"}
    model, adapted = reference.load(folder, **flags), 14
    if kind != "DoRA":
        config = LoraConfig(r=4, lora_bias=True, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model, adapted = get_peft_model(reference.load(folder, bits=16).unload(), config), 4
    both, rows = reference.make(folder, model, **flags), reference.rows_of(LENGTHS)
    assert f"{adapted} adapted layers keep peft's functions, first " in both.fast.lines()["not used"]
    with reference.counted() as calls:
        got = reference.quick(both.quick, both.fast, reference.step_of(rows), recomputed=2)
    reference.assert_equal(got, reference.stock(both.stock, rows), DOUBLE)
    assert calls == {"attention": 4, "head": 1}


def test_a_layer_is_recomputed_in_the_precision_that_it_was_computed_in(models):
    """Weights in float32 and products in bf16, as --fp16 has it with its own dtype: autocast is off by then."""
    both = reference.make(models("llama_gqa"), dtype=None, bits=16)
    step = reference.step_of(reference.rows_of(LENGTHS))
    for model in (both.quick, both.stock):
        expected = reference.quick(model, both.fast, step, bf16=True)
        got = reference.quick(model, both.fast, step, recomputed=2, bf16=True)
        reference.assert_equal(got, expected, 1e-6)
        wide = reference.quick(model, both.fast, step)
        assert max(reference.errors(wide, expected).values()) > 1e-3  # what bf16 changes


def test_a_few_tokens_go_through_pefts_layers_unless_they_are_trained_on(models):
    """In training each rank must add up gradients in one order, however few rows it has."""
    both = reference.make(models("llama"), bits=16)
    rows = reference.rows_of((4, 7))
    ids = torch.tensor([rows[0]["input_ids"]])
    with reference.counted() as calls, torch.no_grad():
        got = both.quick.eval()(input_ids=ids).logits
        assert torch.allclose(got, both.stock.eval()(input_ids=ids).logits)
        assert not calls
    both.quick.train(), both.stock.train()
    with reference.counted() as calls:
        got = reference.quick(both.quick, both.fast, reference.step_of(rows))
    reference.assert_equal(got, reference.stock(both.stock, rows), DOUBLE)
    assert calls["FusedLoRA"] and calls["FusedMLP"]


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_kept_dequantised_are_the_packed_ones(models, monkeypatch, bits):
    both = reference.make(models("llama_gqa"), bits=bits)
    base, step = reference.base_of(both.quick), reference.step_of(reference.rows_of(LENGTHS))
    expected = reference.quick(both.quick, both.fast, step)
    calls, dequantise = [], qlora.dequantize_4bit
    monkeypatch.setattr(qlora, "dequantize_4bit", lambda *args: calls.append(1) or dequantise(*args))
    # seven weights a layer, forward and backward; the first three need no gradient of their input
    for layers, count in {1: 14, 2: 0, 0: 25}.items():
        qlora.set_unpacked_layers(base, layers, torch.float64)
        calls.clear()
        got = reference.quick(both.quick, both.fast, step)
        reference.assert_equal(got, expected, 0.0)
        assert len(calls) == (count if bits == 4 else 0)
    assert not [module for module in base.modules() if getattr(module, "unpacked", None) is not None]


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "esm"])
def test_encoders_are_fused_and_recomputed(models, name):
    """Masked language models: padded rows, whole logits; each layer for itself, as its names are not the usual ones."""
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    both = reference.make(models("encoder", family=name, **dropout), bits=16, objective="mlm")
    assert both.fast.groups and both.fast._replace(groups=()) == qlora.FastPath()
    step = qlora.collate_step(reference.rows_of((23, 5, 17), vocabulary=30), masked=True)["step"]
    expected = reference.quick(both.stock, both.fast, step)
    for recomputed in (0, 2):
        with reference.counted() as calls:
            got = reference.quick(both.quick, both.fast, step, recomputed=recomputed)
        reference.assert_equal(got, expected, DOUBLE)
        per_layer = 8 if name == "deberta-v2" else 6  # which projects relative positions too
        assert calls["FusedLoRA"] == (2 + recomputed) * per_layer


def test_adapters_switched_off_are_the_base(models):
    both = reference.make(models("llama"), bits=16)
    ids = torch.arange(40)[None]
    with torch.no_grad(), both.quick.disable_adapter(), both.stock.disable_adapter():
        expected = both.stock(input_ids=ids).logits
        assert torch.equal(both.quick(input_ids=ids).logits, expected)
    with torch.no_grad():
        assert (both.quick(input_ids=ids).logits - expected).abs().max() > 0.1


def test_a_shared_input_is_computed_once_and_never_mistaken_for_another(models):
    both = reference.make(models("llama_gqa"), bits=16)
    models_ = (reference.base_of(model.eval()) for model in (both.quick, both.stock))
    quick, stock = (model.model.layers[0].self_attn for model in models_)
    x, y = torch.randn(2, 1, 20, 64, dtype=torch.float64)
    with reference.counted() as calls, torch.no_grad():
        for name, value in [("v", x), ("q", x), ("k", x), ("q", y), ("q", y), ("k", x), ("k", y), ("v", x.clone())]:
            layers = getattr(quick, f"{name}_proj"), getattr(stock, f"{name}_proj")
            assert torch.allclose(layers[0](value), layers[1](value), rtol=1e-12, atol=1e-12)
    assert calls["FusedLoRA"] == 6  # the first three calls are one
    group = next(group for group in both.fast.groups if group.outputs)
    group.forget()
    assert group.source is None and not group.outputs


# ------------------------------------------------------------------------------------
# The head
# ------------------------------------------------------------------------------------


def test_cross_entropy_in_chunks(monkeypatch):
    """35 tokens of 2**20 words, 32 tokens at a time; with a bias, a cap, smoothing and a head that trains."""
    torch.manual_seed(0)
    words, tokens, cap, smoothing = 2**20, 35, 3.0, 0.1
    head, targets = torch.nn.Linear(2, words).double(), torch.randint(words, (tokens,))
    hidden = torch.randn(tokens, 2).double().requires_grad_()
    rule = partial(qlora.LOGIT_RULES[-1], cap)
    leaves, chunks, head_logits = [hidden, *head.parameters()], [], qlora.head_logits
    monkeypatch.setattr(qlora, "head_logits", lambda part, *args: chunks.append(len(part)) or head_logits(part, *args))
    loss = qlora.ChunkedCrossEntropy.apply(hidden, head.weight, head.bias, targets, rule, smoothing)
    got = torch.autograd.grad(loss / 7, leaves)
    assert chunks == [32, 3]
    logits = cap * torch.tanh(head(hidden) / cap)
    right = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    assert torch.allclose(loss, right, rtol=1e-12)
    for a, b in zip(got, torch.autograd.grad(right / 7, leaves), strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm() and b.norm() > 0


def test_the_mean_over_a_step_is_not_rounded_to_bf16():
    """1 / 1013 in bf16 is 0.3 % less: every gradient would be."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1013, 16, generator=generator).bfloat16().requires_grad_()
    head = torch.nn.Linear(16, 50, bias=False).bfloat16()
    targets = torch.randint(50, (1013,), generator=generator)
    loss = qlora.ChunkedCrossEntropy.apply(hidden, head.weight, None, targets, None, 0.0) * (1 / 1013)
    got = torch.autograd.grad(loss, hidden)[0].double().flatten()
    wide = hidden.detach().double().requires_grad_()
    exact = F.cross_entropy(F.linear(wide, head.weight.detach().double()), targets)
    right = torch.autograd.grad(exact, wide)[0].flatten()
    assert got @ right / (right @ right) == pytest.approx(1.0, abs=5e-4)


def test_a_step_without_supervised_tokens_has_a_loss_of_zero_and_gradients(models):
    both = reference.make(models("llama"), bits=16)
    step = reference.step_of([{"input_ids": list(range(20)), "labels": [qlora.IGNORE] * 20}])
    got = reference.quick(both.quick, both.fast, step)
    assert got.loss == 0 and not any(gradient.any() for gradient in got.gradients.values())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 3.0}),
        ("llama", {}),
    ],
)
def test_models_that_scale_or_cap_their_logits(models, family, options):
    both = reference.make(models(family, **options), bits=16)
    assert both.fast.head is not None and (both.fast.logit_rule is not None) == bool(options)
    step = reference.step_of(reference.rows_of(LENGTHS))
    got = reference.quick(both.stock, both.fast._replace(attention=None), step, smoothing=0.1)
    batch = qlora.padded_batch(step, [*range(len(LENGTHS))], 0, "right")
    whole = qlora.summed_loss(both.stock, qlora.FastPath(), batch, 0.1) / reference.supervised(step)
    whole.backward()
    reference.assert_equal(got, reference.result_of(both.stock, whole), 1e-6)  # whole logits are made float32


def test_logits_changed_in_an_unknown_way_are_computed_whole(models, monkeypatch):
    monkeypatch.setattr(qlora, "LOGIT_RULES", ())
    fast = reference.make(models("gemma2", final_logit_softcapping=2.0), bits=16).fast
    assert fast.head is fast.body is None and "whole logits: Gemma2ForCausalLM" in fast.lines()["not used"]


# Each config calls by another name what its model does to the logits.
_MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
_XLSTM = {"num_heads": 4, "chunk_size": 16, "qk_dim_factor": 1.0, "v_dim_factor": 1.0, "max_inference_chunksize": 64}
_GRIFFIN = {"lru_width": 64, "attention_window_size": 64, "num_hidden_layers": 3, "num_key_value_heads": 1}
OWN_NAMES = {
    "falcon_h1": _MAMBA | {"lm_head_multiplier": 0.97},
    "recurrent_gemma": _GRIFFIN | {"logits_soft_cap": 30.0},
    "xlstm": _XLSTM | {"output_logit_soft_cap": 30.0},
}


@pytest.mark.parametrize("name", OWN_NAMES)
def test_a_small_change_of_the_logits_is_found_whatever_the_config_calls_it(name):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 260, "pad_token_id": 0, "eos_token_id": 257}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape | OWN_NAMES[name])).float().eval()
    config = reference.parse("none", bits=16, full_finetune=True, objective="clm")
    fast = qlora.enable_fast_path(base, base, config)
    batch = qlora.padded_batch(reference.step_of(reference.rows_of((32, 32))), [0, 1], 0, "right")
    with torch.no_grad():
        expected = base(input_ids=batch["input_ids"]).logits.flatten(0, 1)[batch["positions"]]
        got = qlora.supervised_logits(base, fast, batch)
    assert fast.head is not None and torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_factor_that_no_config_holds_means_whole_logits(models, monkeypatch):
    forward = LlamaForCausalLM.forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = 0.999 * output.logits
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    both = reference.make(models("llama"), bits=16)
    assert both.fast.head is None and "whole logits: LlamaForCausalLM" in both.fast.lines()["not used"]


def test_whatever_the_trial_raises_means_padded_rows(models, monkeypatch):
    def surprised(*args, **kwargs):
        raise TypeError("unsupported operand")

    monkeypatch.setattr(qlora, "varlen_attention", surprised)
    both = reference.make(models("llama"), bits=16)
    reason = "rows are padded: end to end they fail in LlamaForCausalLM: unsupported operand"
    assert both.fast.attention is None and both.fast.lines()["not used"] == reason


@pytest.mark.parametrize("tie", [False, True])
def test_a_full_finetune_trains_the_head_in_chunks(models, tie):
    """Not where it is tied to the embedding, which does not train."""
    both = reference.make(models("llama", tie=tie), bits=16, full_finetune=True)
    rows = reference.rows_of(LENGTHS)
    with reference.counted() as calls:
        got = reference.quick(both.quick, both.fast, reference.step_of(rows), recomputed=2)
    reference.assert_equal(got, reference.stock(both.stock, rows), DOUBLE)
    assert calls == {"head": 1, "attention": 4}
    assert ("lm_head.weight" in got.gradients) == (not tie)
    assert "model.norm.weight" in got.gradients and "model.embed_tokens.weight" not in got.gradients


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_module_that_peft_trains_whole(models, module):
    both = reference.make(models("llama"), bits=16, modules_to_save=module)
    rows = reference.rows_of(LENGTHS)
    got = reference.quick(both.quick, both.fast, reference.step_of(rows), recomputed=2)
    reference.assert_equal(got, reference.stock(both.stock, rows), DOUBLE)
    assert any(module in name for name in got.gradients)


# ------------------------------------------------------------------------------------
# bf16
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama_gqa", "gemma"])
def test_the_error_in_bf16_is_no_larger_than_pefts(models, family):
    """Of every kind of adapter, over six steps, against the same weights in float64."""
    both = reference.make(models(family), dtype=None, bits=4, bf16=True, lora_r=16)
    exact = reference.widen(reference.unpack(reference.load(models(family), bits=4, bf16=True, lora_r=16))).train()
    squares: dict[str, list[float]] = {}
    for seed in range(6):
        rows = reference.rows_of((64, 40, 40, 17), seed)
        right = reference.stock(exact, rows)
        plain = reference.quick(both.stock, qlora.FastPath(), reference.step_of(rows), bf16=True)
        with reference.counted() as calls:
            fast = reference.quick(both.quick, both.fast, reference.step_of(rows), recomputed=2, bf16=True)
        assert all(calls[name] for name in (*reference.FUNCTIONS, "head", "attention"))
        ours, theirs = reference.errors(fast, right), reference.errors(plain, right)
        for name in ours:
            kind = name.split(".layers.")[1].split(".", 1)[1]
            sums = squares.setdefault(kind, [0.0, 0.0])
            sums[0] += ours[name] ** 2
            sums[1] += theirs[name] ** 2
    ratios = {kind: (a / b) ** 0.5 for kind, (a, b) in squares.items()}
    print(ratios)
    assert len(ratios) == 14
    assert max(ratios.values()) <= 1.1, ratios


# ------------------------------------------------------------------------------------
# Norms and rotary embeddings, which are replaced on a GPU only
# ------------------------------------------------------------------------------------

# Class -> how many of its norms become one kernel, and how often two layers rotate by another function.
REPLACED = {
    "llama": (5, 2),
    "gemma": (5, 2),  # adds 1 to the norms' weights
    "gemma4_text": (16, 0),  # rotates q and k one after the other; the norm of the values has no weight
    "glm4": (9, 0),  # rotates pairs of neighbours
    "qwen3_next": (7, 0),  # a gated norm wants a second input; rotates a part of each head
    "gpt_oss": (5, 0),  # passes half of the angles
    "granitemoehybrid": (5, 0),  # Mamba-2 passes a gate to its norms
    "falcon_mamba": (3, 0),  # the weights of some norms only seem to be there
    "olmo2": (9, 2),
    "gpt2": (0, 0),
}


class RotatesInPlace:
    """What liger-kernel's function does: the result takes the memory of the input."""

    def __init__(self) -> None:
        self.calls = 0

    def apply(self, q, k, cos, sin):
        self.calls += 1
        half = q.shape[-1] // 2
        for x in (q, k):
            first, second = x[..., :half].clone(), x[..., half:].clone()
            x[..., :half] = first * cos[:, None, :, :half] - second * sin[:, None, :, :half]
            x[..., half:] = second * cos[:, None, :, half:] + first * sin[:, None, :, half:]
        return q, k


@pytest.mark.parametrize("family", REPLACED)
@torch.no_grad()
def test_norms_and_rotary_embeddings_of_one_model_are_replaced_where_they_compute_the_same(
    tmp_path, monkeypatch, family
):
    folder, ids = tiny_classes.write_class(tmp_path / "base", family), torch.arange(40)[None]
    model, untouched = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    expected, rotation = untouched(input_ids=ids).logits, RotatesInPlace()
    monkeypatch.setattr(qlora, "liger_ops", SimpleNamespace(LigerRopeFunction=rotation))
    qlora.fuse_norms(model)
    why = qlora.fuse_rotary(model)
    fused = sum("forward" in vars(module) and "Norm" in type(module).__name__ for module in model.modules())
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (fused, rotation.calls) == REPLACED[family]
    assert ("its own" in (why or "")) == (family in ("gemma4_text", "glm4", "gpt_oss"))
    assert torch.equal(untouched(input_ids=ids).logits, expected) and rotation.calls == REPLACED[family][1]
    copied = copy.deepcopy(model)(input_ids=ids).logits  # as peft copies what trains whole
    torch.testing.assert_close(copied, expected, rtol=1e-4, atol=1e-4)
    assert rotation.calls == 2 * REPLACED[family][1]


# ------------------------------------------------------------------------------------
# Attention of rows that lie end to end
# ------------------------------------------------------------------------------------


def attention_row_by_row(q, k, v, lengths, window, scale):
    """Softmax over what each token may see, written out; q, k, v: (1, heads, tokens, dim)."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    row = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)])
    place = torch.tensor([i for length in lengths for i in range(length)])
    back = place[:, None] - place[None, :]
    seen = (row[:, None] == row[None, :]) & (back >= 0) & (back < (window or 10**9))
    scores = (q @ k.transpose(2, 3)) * scale
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


ROWS = [(19,), (1,), (1, 1, 1), (8, 8, 8), (5, 1, 13, 8), (8, 8, 9)]  # of one length go through another kernel


@pytest.mark.parametrize("window", [None, 1, 7, 8, 100])
@pytest.mark.parametrize("lengths", ROWS, ids=str)
@pytest.mark.parametrize("grouped", [1, 2])
def test_attention_end_to_end(lengths, window, grouped):
    generator = torch.Generator().manual_seed(0)
    heads = (4, 4 // grouped, 4 // grouped)
    tensors = [torch.randn(1, n, sum(lengths), 8, generator=generator, dtype=torch.float64) for n in heads]
    q, k, v = (t.requires_grad_() for t in tensors)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    got, weights = qlora.varlen_attention(
        None, q, k, v, None, scaling=0.3, sliding_window=window, cu_seq_lens_q=starts, max_length_q=max(lengths)
    )
    right = attention_row_by_row(q, k, v, lengths, window, 0.3)
    assert weights is None and got.shape == right.shape == (1, sum(lengths), 4, 8)
    assert got.is_contiguous(), "some models take a view of it"
    assert torch.allclose(got, right, rtol=1e-12, atol=1e-12)
    grad = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), grad), torch.autograd.grad(right, (q, k, v), grad), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_rows_of_one_length_are_a_batch_to_the_kernel(monkeypatch):
    """Where no window cuts them; others go one by one."""
    shapes, plain = [], F.scaled_dot_product_attention

    def spy(q, *args, **kwargs):
        shapes.append(tuple(q.shape))
        return plain(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q = torch.randn(1, 4, 24, 8)
    for window, expected in [(None, [(3, 4, 8, 8)]), (8, [(3, 4, 8, 8)]), (7, [(1, 4, 8, 8)] * 3)]:
        shapes.clear()
        qlora.varlen_attention(
            None, q, q, q, None, sliding_window=window, cu_seq_lens_q=torch.tensor([0, 8, 16, 24]), max_length_q=8
        )
        assert shapes == expected


# ------------------------------------------------------------------------------------
# Steps and micro-batches
# ------------------------------------------------------------------------------------


def step_with(lengths: list[int], counts: list[int] | None = None) -> qlora.StepBatch:
    """A step whose members have these lengths; `counts` is the number of members of each dataset row."""
    tokens = torch.zeros(sum(lengths), dtype=torch.long)
    return qlora.StepBatch(tokens, tokens, torch.tensor(lengths), counts or [1] * len(lengths), [""] * len(lengths))


def size(lengths: list[int], padded: bool) -> int:
    return max(lengths) * len(lengths) if padded else sum(lengths)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [None, 1, 3])
def test_micro_batches_hold_every_member_once_and_keep_the_limits(rows, padded):
    generator = random.Random(0)
    for _ in range(500):
        packed = generator.random() < 0.5
        counts = [generator.randint(1, 4) if packed else 1 for _ in range(generator.randint(1, 12))]
        lengths = [generator.choice((1, 2, 7, 30, 64)) for _ in range(sum(counts))]
        step, limit = step_with(lengths, counts), generator.choice((1, 10, 64, 100, 256, qlora.NO_LIMIT))
        parts = qlora.micro_batches(step, rows, limit, padded)
        assert sorted(i for part in parts for i in part) == list(range(len(lengths))) and all(parts)
        assert all(len(part) == 1 or size([lengths[i] for i in part], padded) <= limit for part in parts)
        if rows is not None or not padded:
            assert [i for part in parts for i in part] == list(range(len(lengths)))
        if rows is not None:  # of the dataset, in their order: a part never holds members of more
            row_of = [i for i, count in enumerate(counts) for _ in range(count)]
            assert all(len({row_of[i] // rows for i in part}) == 1 for part in parts)
        if limit == qlora.NO_LIMIT:
            assert len(parts) == (1 if rows is None else -(-len(counts) // rows))


def test_micro_batches_by_example():
    cut = partial(qlora.micro_batches, step_with([30, 10, 20, 40], [1, 2, 1]))
    assert cut(1, 1000, False) == [[0], [1, 2], [3]]  # rows of the dataset, of which the second is a pack
    assert cut(2, 1000, True) == [[0, 1, 2], [3]]
    assert cut(2, 50, False) == [[0, 1], [2], [3]]
    assert cut(2, 5, False) == [[0], [1], [2], [3]]  # no row is cut
    assert cut(None, 1000, False) == [[0, 1, 2, 3]]
    assert cut(None, 60, False) == [[0, 1], [2], [3]]  # shares of a half, and a fiftieth
    assert cut(None, 60, True) == [[3], [0, 2], [1]]  # the longest first, so that little is padded


def test_a_step_is_cut_into_even_shares():
    """One micro-batch nearly full and one nearly empty would take the time of two full ones."""
    assert [len(part) for part in qlora.micro_batches(step_with([10] * 24), None, 200, False)] == [12, 12]


# ------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------

SLOW = {"fast_path": False, "recompute_layers": "none"}


def losses(run, name: str = "loss") -> list[float]:
    return [entry[name] for entry in run.json("trainer_state.json")["log_history"] if name in entry]


def adapter(run) -> dict[str, torch.Tensor]:
    return load_file(run.output_dir / "adapter_model.safetensors")


def assert_adapters_equal(run, expected, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    got = adapter(run)
    for name, tensor in adapter(expected).items():
        assert torch.allclose(got[name], tensor, rtol=rtol, atol=atol), name


@pytest.fixture
def trainers(monkeypatch):
    """Return the trainers that `prepare` made for the runs of this test."""
    made, prepare = [], qlora.prepare
    monkeypatch.setattr(qlora, "prepare", lambda *args: made.append(prepare(*args)) or made[-1])
    return made


@pytest.mark.ci
def test_fifty_steps_fast_and_slow_are_one_curve(run_qlora, tmp_path, trainers, models):
    """And the adapter of the fast run gives the same logits in plain peft."""
    folder = models("llama_gqa")
    flags = {"model_name_or_path": folder, "max_steps": 50, "save_steps": 50, "gradient_accumulation_steps": 2}
    flags |= {"learning_rate": 1e-3, "max_grad_norm": 1.0, "do_eval": True}
    with reference.counted() as calls:
        fast = run_qlora(output_dir=tmp_path / "fast", auto_batch=True, **flags)
    assert all(calls[name] >= 50 for name in (*reference.FUNCTIONS, "head", "attention"))
    with reference.counted() as calls:
        slow = run_qlora(output_dir=tmp_path / "slow", **flags, **SLOW)
    assert not calls and re.search("not used +--fast_path False\n", slow.stderr)
    assert fast.code == slow.code == 0 and len(losses(fast)) == 50
    assert losses(fast)[-1] < losses(fast)[0] - 1  # it learns
    assert losses(fast) == pytest.approx(losses(slow), rel=1e-4)
    assert losses(fast, "grad_norm") == pytest.approx(losses(slow, "grad_norm"), rel=1e-3)
    ours, theirs = (run.json("all_results.json") for run in (fast, slow))
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-4)
    assert ours["train_tokens"] == theirs["train_tokens"]

    ids = torch.tensor([[tiny.BOS, *b"Order 3: where is my coffee? It should be here by now."]])
    trained, config = trainers[0].model.eval(), reference.parse(folder)
    base = qlora.load_model(config, qlora.load_model_config(config, str(folder)), str(folder))
    with torch.no_grad(), reference.counted() as calls:
        expected = trained(input_ids=ids).logits
        before = base(input_ids=ids).logits
        alone = PeftModel.from_pretrained(base, fast.output_dir).eval()(input_ids=ids).logits
    assert calls == {"FusedLoRA": 4, "FusedMLP": 2, "AddFrozen": 2} and (alone - before).abs().max() > 0.1
    assert torch.allclose(alone, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_a_packed_run_matches_the_unpacked_one(run_qlora, models, tmp_path, family):
    """All 24 rows in each step, however many packs that is; OLMoE's own window of 16 tokens is in its mask alone."""
    flags = {"per_device_train_batch_size": 24, "bits": 16, "optim": "sgd", "learning_rate": 0.5, "max_steps": 2}
    flags |= {"source_max_len": 64, "target_max_len": 64, "max_grad_norm": 1.0, "save_strategy": "no"}
    flags["model_name_or_path"] = models(family, **({"sliding_window": 16} if family == "olmoe" else {}))
    plain = run_qlora(output_dir=tmp_path / "plain", **flags, **SLOW)
    with reference.counted() as calls:
        packed = run_qlora(output_dir=tmp_path / "packed", packing=True, auto_batch=True, **flags)
    assert "packing: 24 rows in " in packed.stderr
    assert (family == "olmoe") == ("rows are padded: in OlmoeForCausalLM" in packed.stderr)
    assert bool(calls["attention"] > 4) == (family == "llama")  # more than the trial before training
    assert losses(packed) == pytest.approx(losses(plain), rel=1e-5)
    assert losses(packed, "grad_norm") == pytest.approx(losses(plain, "grad_norm"), rel=1e-4)
    assert_adapters_equal(packed, plain, rtol=1e-4, atol=1e-6)


def unknown_model(path, source):
    """A model that the fast path knows nothing of: layers of another class, blocks and a head of its own."""
    shutil.copytree(source, path)
    code, weights = (path / "modeling_toy.py").read_text(), load_file(path / "model.safetensors")
    changes = {
        "class ToyBlock(GradientCheckpointingLayer)": "class ToyBlock(nn.Module)",
        "supports_gradient_checkpointing = True": "supports_gradient_checkpointing = False",
        "nn.Linear(size, 3 * size, bias=False)": "Conv1D(3 * size, size)",
        "nn.Linear(size, size, bias=False)": "Conv1D(size, size)",
        "nn.Linear(size, 2 * size)": "Conv1D(2 * size, size)",
        "nn.Linear(2 * size, size)": "Conv1D(size, 2 * size)",
        "self.lm_head(x)": "3 * torch.tanh(self.lm_head(x))",
        "from torch import nn\n": "from torch import nn\nfrom transformers.pytorch_utils import Conv1D\n",
    }
    for old, new in changes.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    (path / "modeling_toy.py").write_text(code)
    for name in [name for name in weights if name.startswith("blocks.") and "norm" not in name]:
        if name.endswith(".weight"):
            weights[name] = weights[name].t().contiguous()
            weights.setdefault(name.replace(".weight", ".bias"), torch.zeros(weights[name].shape[1]))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("unknown", [False, True], ids=["known in part", "unknown"])
def test_a_model_that_the_fast_path_does_not_know_trains_without_it(run_qlora, models, tmp_path, unknown):
    folder = models("remote_code")
    folder = unknown_model(tmp_path / "all_its_own", folder) if unknown else folder
    flags = {"model_name_or_path": folder, "trust_remote_code": True, "bits": 16, "learning_rate": 1e-2}
    with reference.counted() as calls:
        fast = run_qlora(output_dir=tmp_path / "fast", recompute_layers="all", **flags)
    slow = run_qlora(output_dir=tmp_path / "slow", **flags, **SLOW)
    assert fast.code == slow.code == 0 and (fast.output_dir / "completed").exists()
    assert "rows are padded: in ToyForCausalLM they would see each other" in fast.stderr
    assert "whole logits: ToyForCausalLM" in fast.stderr, "it has no body apart from its head"
    assert not calls if unknown else set(calls) == {"FusedLoRA"}
    assert unknown == ("8 adapted layers keep peft's functions" in fast.stderr)
    assert unknown == ("gradient_checkpointing: ToyForCausalLM does not support it" in fast.stderr)
    assert losses(fast)[-1] < losses(fast)[0]
    assert losses(fast) == pytest.approx(losses(slow), rel=1e-5)
    assert_adapters_equal(fast, slow, rtol=1e-3, atol=1e-5)


class Memory:
    """Run out of memory in training where `fails(tokens of the micro-batch, number of the call)` is true.

    The error comes after the forward pass, when random numbers are drawn and an autograd graph is there. Tensors of a
    failed pass must be gone when the next one begins, or there would be as little memory as before.
    """

    def __init__(self, monkeypatch):
        self.plain, self.step = qlora.summed_loss, qlora.QLoRATrainer.training_step
        self.training = False
        self.set_up(lambda tokens, call: False)
        monkeypatch.setattr(qlora, "summed_loss", self.summed_loss)
        monkeypatch.setattr(qlora.QLoRATrainer, "training_step", lambda *args, **kwargs: self.watched(*args, **kwargs))

    def set_up(self, fails) -> list[int]:
        """Return the list that fills with the tokens of the micro-batches."""
        self.fails, self.seen, self.alive = fails, [], []
        return self.seen

    def watched(self, *args, **kwargs):
        self.training = True
        try:
            return self.step(*args, **kwargs)
        finally:
            self.training = False

    def summed_loss(self, model, fast, batch, smoothing=0.0):
        if not self.training:
            return self.plain(model, fast, batch, smoothing)
        assert not [tensor for tensor in self.alive if tensor() is not None]
        self.seen.append(batch["input_ids"].numel())
        loss = self.plain(model, fast, batch, smoothing)
        if self.fails(self.seen[-1], len(self.seen)):
            activations = torch.zeros(8)
            self.alive.append(weakref.ref(activations))
            self.alive.append(weakref.ref(loss))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss


@pytest.fixture
def memory(monkeypatch):
    return Memory(monkeypatch)


@pytest.fixture
def planned(monkeypatch):
    """Return a function that changes the step plan of the runs that follow: `planned(unpacked=2)`."""
    choose = qlora.choose_step_plan

    def change(**values):
        def changed(*args):
            plan, lines = choose(*args)
            return plan._replace(**values), lines

        monkeypatch.setattr(qlora, "choose_step_plan", changed)

    return change


SMALL = {"source_max_len": 16, "target_max_len": 16, "optim": "sgd", "learning_rate": 0.5, "max_steps": 3}
SMALL |= {"per_device_train_batch_size": 4, "bits": 16, "lora_dropout": 0.1, "max_grad_norm": 1.0}
SMALL |= {"recompute_layers": "all", "offload_activations": True}


def complaints(run) -> list[str]:
    return [line for line in run.stderr.splitlines() if "memory ran out" in line]


@pytest.mark.parametrize(("fast_path", "auto_batch"), [(True, False), (False, True)])
def test_out_of_memory_repeats_the_step_in_smaller_micro_batches(
    run_qlora, tmp_path, monkeypatch, memory, planned, fast_path, auto_batch
):
    """The run matches one that had small micro-batches from the start, dropout included."""
    plans, make_room = [], qlora.QLoRATrainer._make_room
    monkeypatch.setattr(
        qlora.QLoRATrainer, "_make_room", lambda self, *args: [make_room(self, *args), plans.append(self.plan)]
    )
    flags = {**SMALL, "fast_path": fast_path, "auto_batch": auto_batch}
    seen = memory.set_up(lambda tokens, call: tokens > 70)
    run = run_qlora(output_dir=tmp_path / "short", **flags)
    assert run.code == 0 and seen[0] > 70 and max(seen[2:]) <= 70
    lines = complaints(run)
    assert len(lines) == len(plans) == 1 and "step 1: " in lines[0] and str(plans[0]) in lines[0]

    planned(**plans[0]._asdict())
    memory.set_up(lambda tokens, call: False)
    small = run_qlora(output_dir=tmp_path / "small", **flags)
    assert not complaints(small)
    assert losses(run) == pytest.approx(losses(small), rel=1e-6)
    assert_adapters_equal(run, small, rtol=1e-6, atol=1e-7)


def test_out_of_memory_in_a_later_micro_batch_takes_back_the_gradients_of_the_earlier(run_qlora, tmp_path, memory):
    flags = {**SMALL, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "lora_dropout": 0.0}
    flags |= {"auto_batch": False}
    expected = run_qlora(output_dir=tmp_path / "enough", **flags)
    seen = memory.set_up(lambda tokens, call: call == 5)  # the second of the second step
    run = run_qlora(output_dir=tmp_path / "short", **flags)
    assert len(complaints(run)) == 1 and "step 2: " in complaints(run)[0]
    assert len(seen) == 3 + 2 + 6 + 6  # of three steps of six rows
    assert losses(run) == pytest.approx(losses(expected), rel=1e-6)
    assert losses(run, "grad_norm") == pytest.approx(losses(expected, "grad_norm"), rel=1e-5)
    assert_adapters_equal(run, expected)


def test_out_of_memory_recomputes_more_layers_before_rows_are_parted(run_qlora, tmp_path, memory):
    flags = {**SMALL, "recompute_layers": "none", "auto_batch": False}
    expected = run_qlora(output_dir=tmp_path / "enough", **flags)
    seen = memory.set_up(lambda tokens, call: call <= 2)
    with reference.counted() as calls:
        run = run_qlora(output_dir=tmp_path / "short", **flags)
    first, second = complaints(run)
    assert "0 layers recomputed" in first and "repeating it with 4 rows" in first
    assert "1 layers recomputed" in first and "2 layers recomputed" in second
    assert len(seen) == 2 + 3 and len(set(seen)) <= 3
    assert calls["FusedMLP"] - calls["AddFrozen"] == 2 * 3  # of both layers in three steps
    assert losses(run) == pytest.approx(losses(expected), rel=1e-6)
    assert_adapters_equal(run, expected)


def test_out_of_memory_offloads_the_inputs_of_recomputed_layers_before_rows_are_parted(run_qlora, tmp_path, memory):
    flags = {**SMALL, "offload_activations": False, "auto_batch": False, "lora_dropout": 0.0}
    expected = run_qlora(output_dir=tmp_path / "enough", **flags)
    seen = memory.set_up(lambda tokens, call: call <= 2)
    run = run_qlora(output_dir=tmp_path / "short", **flags)
    first, second = complaints(run)
    assert "repeating it with 4 rows" in first and first.endswith(
        "2 layers recomputed, inputs in CPU memory, 0 kept dequantised"
    )
    assert "tokens at once, 2 layers recomputed, inputs in CPU memory" in second and seen[:3] == [128, 128, 64]
    assert losses(run) == pytest.approx(losses(expected), rel=1e-6)
    assert_adapters_equal(run, expected)


def test_out_of_memory_drops_dequantised_weights_first_and_repeats_random_numbers_of_every_gpu(
    run_qlora, tmp_path, memory, monkeypatch, planned
):
    """Layers of one process may lie on several: a generator of our own stands in for a second GPU's."""
    second, taken = torch.Generator().manual_seed(7), []
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [second.get_state()])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: taken.append(second.set_state(*states)))

    def dropped(x, p, train):
        """A mask of the second GPU's generator."""
        mask = torch.rand(x.shape, generator=second) >= p
        return x * mask / (1 - p), mask

    monkeypatch.setattr(torch, "native_dropout", dropped)
    planned(unpacked=2)
    flags = {**SMALL, "bits": 4, "recompute_layers": "none"}
    expected = run_qlora(output_dir=tmp_path / "enough", **flags)
    second.manual_seed(7)
    memory.set_up(lambda tokens, call: call == 2)  # the second step, after its forward pass
    run = run_qlora(output_dir=tmp_path / "short", **flags)
    (line,) = complaints(run)
    assert "2 kept dequantised; repeating it with" in line and line.endswith("0 kept dequantised") and len(taken) == 1
    assert losses(run) == pytest.approx(losses(expected), rel=1e-6)
    assert_adapters_equal(run, expected)


def test_out_of_memory_with_nothing_left_to_make_smaller_is_one_line(run_qlora, memory):
    seen = memory.set_up(lambda tokens, call: True)
    run = run_qlora(**SMALL)
    lines = run.stderr.splitlines()
    assert run.code == 2 and "Traceback" not in run.stderr
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "memory" in lines[-1] and "--source_max_len" in lines[-1]
    assert len(seen) > 2 and seen[-1] <= 32  # down to a single row
    assert not (run.output_dir / "completed").exists()


def test_memory_that_runs_out_between_layers_of_one_input_leaves_no_graph(run_qlora, models, memory, monkeypatch):
    """Qwen 3 takes a norm of q before it asks for k, which is there already and holds the whole autograd graph."""
    forward, norm, calls = qlora.FusedLoRA.forward, Qwen3RMSNorm.forward, []

    def watched(ctx, *args):
        memory.alive.append(weakref.ref(ctx))
        return forward(ctx, *args)

    def short(self, x):
        calls.extend([x.shape] * (memory.training and x.ndim == 4))
        if len(calls) == 3:  # q of the second layer
            calls.append(x.shape)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return norm(self, x)

    monkeypatch.setattr(qlora.FusedLoRA, "forward", staticmethod(watched))
    monkeypatch.setattr(Qwen3RMSNorm, "forward", short)
    flags = SMALL | {"recompute_layers": "none", "model_name_or_path": models("qwen3")}
    run = run_qlora(**flags)
    assert run.code == 0 and len(complaints(run)) == 1


def test_the_number_of_tokens_stays_on_the_cpu(run_qlora, monkeypatch):
    """Sending it to the GPU would wait for the GPU before each step. A meta device stands in for one."""
    original, devices = qlora.QLoRATrainer.get_batch_samples, []

    def watched(self, iterator, number, device):
        batches, items = original(self, iterator, number, torch.device("meta"))
        devices.append(items.device.type)
        return batches, items

    monkeypatch.setattr(qlora.QLoRATrainer, "get_batch_samples", watched)
    assert run_qlora(max_steps=1).code == 0 and set(devices) == {"cpu"}


@pytest.mark.parametrize("flags", [{"neftune_noise_alpha": 5}, {"attn_implementation": "eager"}], ids=str)
def test_flags_that_need_padded_rows_keep_the_other_parts(run_qlora, flags):
    """NEFTune divides its noise by the root of a row's length: rows that lie end to end would be one long row."""
    with reference.counted() as calls:
        run = run_qlora(max_steps=1, **flags)
    assert run.code == 0 and f"rows are padded: --{next(iter(flags))}" in run.stderr and not calls["attention"]
    assert all(calls[name] for name in (*reference.FUNCTIONS, "head"))
