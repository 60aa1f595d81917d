"""Correct before fast: every part of the fast path, alone and together, computes what the libraries do.

In float64, so that agreement is to the last digits: a relative error of 1e-9 in the loss and in every
gradient. Angles of left-padded positions are float32 whatever the model is, and agree as far.
"""

import random
import shutil
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import tiny
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import qlora

LENGTHS = (23, 5, 40, 17, 17, 2)  # of one window; several are longer than the sliding windows below
DOUBLE, SINGLE = 1e-9, 1e-5

NO_DROPOUT = {
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "opt": {"dropout": 0.0},
}


@pytest.fixture(scope="module", autouse=True)
def _on_a_cpu_in_float64():
    """Also where there is a GPU, and where transformers asks for a softmax in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(F, "softmax", reference.wide_softmax)
        yield


@pytest.fixture
def log_lines(caplog):
    """What the program logs."""
    qlora.log.addHandler(caplog.handler)
    qlora.log.setLevel("INFO")
    yield caplog
    qlora.log.removeHandler(caplog.handler)


# ------------------------------------------------------------------------------------
# Families: each part alone, and all together
# ------------------------------------------------------------------------------------

# Family -> its config, and whether rows lie end to end, the head is chunked, a recomputed layer leaves out its last
# product. None: whatever the try on the model finds; the numbers must agree all the same.
FAMILIES = {
    "llama": ("llama", {}, (True, True, True)),
    "llama tied": ("llama", {"tie": True}, (True, True, True)),
    "llama_gqa": ("llama_gqa", {}, (True, True, True)),
    "mistral": ("mistral", {"sliding_window": 8}, (True, True, True)),
    "qwen2": ("qwen2", {}, (True, True, True)),
    "qwen3": ("qwen3", {}, (True, True, True)),
    "gemma": ("gemma", {}, (True, True, True)),
    "gemma2": ("gemma2", {"sliding_window": 8}, (None, True, False)),  # a norm after the MLP; its logits are capped
    "gemma3": ("gemma3", {"sliding_window": 8}, (True, True, False)),
    "lfm2": ("lfm2", {}, (False, True, None)),  # its convolution would see the row before
    "gpt2": ("gpt2", NO_DROPOUT["gpt2"], (None, True, None)),
    "gpt_neox": ("gpt_neox", {}, (None, True, None)),
    "opt": ("opt", NO_DROPOUT["opt"], (None, True, None)),
    "falcon": ("falcon", {}, (None, True, None)),
    "mpt": ("mpt", {}, (False, True, None)),
}
GATED = ("llama", "mistral", "qwen", "gemma")  # q, k, v apart and a gated MLP: two fused calls a layer and one


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, models):
    """(name, reference, rows, what is expected of them)."""
    model, options, _ = FAMILIES[request.param]
    both = reference.make(models(model, **options), bits=16)
    rows = reference.rows_of(LENGTHS)
    return request.param, both, rows, reference.stock(both.stock, rows)


def test_what_is_found_out_about_a_family(family):
    name, both, _, _ = family
    for wanted, got in zip(FAMILIES[name][2], (both.fast.attention, both.fast.head, both.fast.skips_last), strict=True):
        assert wanted is None or wanted == bool(got)


def test_fused_functions_are_pefts_layers(family):
    name, both, rows, expected = family
    with reference.counted() as calls:
        got = reference.quick(both.quick, qlora.FastPath(), reference.window_of(rows))
    reference.assert_equal(got, expected, tolerance(name))
    if name.startswith(GATED):
        assert calls == {"FusedLoRA": 2 * 2, "FusedMLP": 2}  # of two layers
    elif name != "gpt2":  # its layers are no nn.Linear
        assert calls["FusedLoRA"] > 0


def test_rows_end_to_end_are_rows_alone(family):
    name, both, rows, expected = family
    if both.fast.attention is None:
        pytest.skip("rows of this family are padded")
    with reference.counted() as calls:
        got = reference.quick(both.stock, qlora.FastPath(attention=both.fast.attention), reference.window_of(rows))
    reference.assert_equal(got, expected, tolerance(name))
    assert calls == {"end_to_end_attention": 2}


def test_rows_filled_up_to_a_shape_are_rows_alone(family):
    name, both, rows, expected = family
    if both.fast.attention is None:
        pytest.skip("rows of this family are padded")
    got = reference.quick(
        both.stock, qlora.FastPath(attention=both.fast.attention), reference.window_of(rows), filled=True
    )
    reference.assert_equal(got, expected, tolerance(name))


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows_are_rows_alone(family, side):
    name, both, rows, expected = family
    if side == "left" and name in ("gpt2", "mpt"):
        pytest.skip("its positions count the padding")
    got = reference.quick(both.stock, qlora.FastPath(), reference.window_of(rows), side=side)
    reference.assert_equal(got, expected, SINGLE if side == "left" else tolerance(name))


def test_a_head_in_chunks_is_all_logits(family):
    name, both, rows, expected = family
    with reference.counted() as calls:
        got = reference.quick(both.stock, both.fast._replace(attention=None), reference.window_of(rows))
    reference.assert_equal(got, expected, tolerance(name))
    assert calls == {"ChunkedCrossEntropy": 1}


@pytest.mark.parametrize("layers", [1, 2])
def test_recomputed_layers_are_kept_layers(family, layers):
    name, both, rows, expected = family
    with reference.counted() as calls:
        got = reference.quick(both.stock, qlora.FastPath(), reference.window_of(rows), recomputed=layers)
    reference.assert_equal(got, expected, tolerance(name))
    assert calls == {"Recompute": layers, "again": layers}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("piece", [2**26, 10_000], ids=["whole", "in pieces of tokens"])
def test_fused_layers_recomputed_with_or_without_their_last_product(family, layers, piece, monkeypatch):
    name, both, rows, expected = family
    monkeypatch.setattr(qlora.FusedMLP, "PIECE", piece)
    fast = qlora.FastPath(skips_last=both.fast.skips_last)
    with reference.counted() as calls:
        got = reference.quick(both.quick, fast, reference.window_of(rows), recomputed=layers)
    reference.assert_equal(got, expected, tolerance(name))
    assert calls["again"] == layers
    if name.startswith(GATED):
        assert calls["FusedMLP"] == 2 + layers


def test_leaving_out_the_last_product_where_it_is_needed_would_show(family):
    """What is not a number reaches the gradients: the try before training can't overlook it."""
    name, both, rows, _ = family
    if both.fast.skips_last or not name.startswith(GATED):
        pytest.skip("safe here")
    got = reference.quick(both.quick, qlora.FastPath(skips_last=True), reference.window_of(rows), recomputed=2)
    assert not all(gradient.isfinite().all() for gradient in got.gradients.values())


def test_layers_that_take_more_than_their_input_are_recomputed_in_torchs_own_way(tmp_path, log_lines):
    """Gemma 4's: keys and values of an earlier layer, and an input of each layer's own."""
    if "gemma4_text" not in CONFIG_MAPPING:
        pytest.skip("these transformers do not know Gemma 4")
    shape = tiny.FAMILIES["gemma3"][1] | {"num_hidden_layers": 4, "global_head_dim": 16, "vocab_size": 260}
    shape |= {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 260, "num_kv_shared_layers": 2}
    shape |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
    shape.pop("query_pre_attn_scalar")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **shape)).save_pretrained(tmp_path)
    both, rows = reference.make(tmp_path, dtype=None, bits=16, objective="clm"), reference.rows_of(LENGTHS)
    assert not both.fast.by_input and "recomputed in torch's own way" in log_lines.text
    expected = reference.stock(both.stock, rows)
    for layers in (0, 2, 4):
        got = reference.quick(both.quick, both.fast, reference.window_of(rows), recomputed=layers)
        reference.assert_equal(got, expected, 1e-4)


def test_a_model_whose_rows_would_see_each_other_pads_them_and_says_so(models, log_lines):
    both = reference.make(models("lfm2"), bits=16)
    assert both.fast.attention is None and "rows that lie end to end would see each other" in log_lines.text


@pytest.mark.parametrize("name", ["nemotron", "doge"])
def test_a_model_that_does_not_hand_on_lengths_or_makes_its_own_mask_pads_its_rows(tmp_path, log_lines, name):
    torch.manual_seed(0)
    shape = tiny.FAMILIES["llama"][1] | {"vocab_size": 260, "num_key_value_heads": 4, "head_dim": 16}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape)).save_pretrained(tmp_path)
    both, rows = reference.make(tmp_path, dtype=None, bits=16, objective="clm"), reference.rows_of(LENGTHS)
    assert both.fast.attention is None and "rows are padded: " in log_lines.text
    got, expected = (
        reference.quick(both.quick, both.fast, reference.window_of(rows), recomputed=2),
        reference.stock(both.stock, rows),
    )
    if name == "nemotron":  # Doge's mask hides nothing in rows as short as these: the layer behind it has no gradient
        reference.assert_equal(got, expected, 1e-4)


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
    "afmoe": ({}, True),
    "beam": ({}, True),
    "cohere2": ({}, True),
    "cohere2_moe": ({}, True),
    "cwm": ({}, True),
    "dots1": ({"n_shared_experts": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}, True),
    "exaone4": ({}, True),
    "exaone_moe": ({}, True),
    "gemma3_text": ({}, True),
    "gemma4_text": (_GEMMA4 | {"num_kv_shared_layers": 0}, True),
    "kolibri1": ({}, True),
    "laguna": ({}, True),
    "mellum": ({}, True),
    "ministral": ({}, True),
    "ministral3": (_OWN, True),
    "mistral": (_OWN, True),
    "mixtral": (_OWN, True),
    "modernbert-decoder": ({}, True),
    "olmo3": ({}, True),
    "phi3": (_OWN, True),
    "qwen2": ({}, True),
    "qwen3": ({}, True),
    "qwen3_moe": (_OWN, True),
    "smollm3": ({}, True),
    "starcoder2": (_OWN, True),
    "llama4_text": (_CHUNKS, False),  # these have it in the mask alone
    "olmoe": (_OWN, False),
    "phimoe": (_OWN | {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0}, False),
    "qwen2_moe": ({}, False),
}


def spanned(name: str, longest: int, **options: Any) -> reference.Twins:
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


def assert_spanned(both: reference.Twins) -> None:
    """As rows, and as packs of them, what transformers' own model computes of padded rows."""
    rows = reference.rows_of(SPANNED_ROWS)
    expected = reference.quick(both.stock, qlora.FastPath(), reference.window_of(rows))
    packs = reference.window_of([{"pack": rows[:3]}, {"pack": rows[3:]}])
    for window, parts in ((reference.window_of(rows), None), (packs, [[0, 1, 2], [3, 4]])):
        reference.assert_equal(reference.quick(both.quick, both.fast, window, parts, recomputed=1), expected, 1e-3)


@pytest.mark.parametrize("name", SPANNED_FAMILIES)
def test_rows_longer_than_the_window_see_no_further_back(name, log_lines):
    """Rows of the try before training are shorter than the window, as a real one's always are."""
    options, end_to_end = SPANNED_FAMILIES[name]
    both = spanned(name, longest=70, **options)
    assert bool(both.fast.attention) == end_to_end
    assert ("rows are padded: " in log_lines.text) == (not end_to_end)
    assert_spanned(both)


@pytest.mark.parametrize("name", ["olmoe", "phimoe", "qwen2_moe"])
def test_a_window_as_long_as_any_row_needs_no_mask(name):
    options, _ = SPANNED_FAMILIES[name]
    both = spanned(name, longest=70, **{**options, "sliding_window": 70})
    assert both.fast.attention == qlora.VARLEN_ATTENTION
    assert_spanned(both)


def test_a_scale_by_the_place_in_the_micro_batch_is_noticed(log_lines):
    """That of Llama 4's layers without rotary embedding, in steps of 8192 tokens; here of 30."""
    scaled = {"attn_temperature_tuning": True, "floor_scale": 30, "attention_chunk_size": 512}
    both = spanned("llama4_text", longest=70, **_CHUNKS | scaled)
    assert both.fast.attention is None and "by the place in a micro-batch" in log_lines.text
    assert_spanned(both)
    both = spanned("llama4_text", longest=70, **_CHUNKS | {"attention_chunk_size": 512})
    assert both.fast.attention == qlora.VARLEN_ATTENTION
    assert_spanned(both)


class Engine(torch.nn.Module):
    """As DeepSpeed's wrapper, which always says that it trains."""

    def __init__(self, model) -> None:
        super().__init__()
        self.module = model

    def train(self, mode=True):
        self.module.train(mode)
        return self

    def forward(self, **inputs):
        return self.module(**inputs)


@pytest.mark.parametrize("training", [False, True])
def test_the_try_before_an_evaluation_leaves_dropout_off(models, monkeypatch, training):
    both = reference.make(models("llama"), bits=16)
    monkeypatch.setattr(qlora, "is_sharded", lambda config: True)
    model = Engine(both.quick).train(training)
    fast = qlora.choose_fast_path(model, reference.base_of(both.quick), both.config)
    assert fast.spread and fast.head is not None
    assert {module.training for module in both.quick.modules()} == {training}


def test_where_an_engine_spreads_the_weights_only_labelled_tokens_count(models):
    """Its backward pass begins at what the model gives back of all tokens, which may overflow in float16."""
    both = reference.make(models("llama"), bits=16)
    batch = qlora.padding_free_batch(reference.window_of(reference.rows_of([20])), [0])
    unlabelled = min({*range(20)} - {*batch["positions"].tolist()})
    base = reference.base_of(both.quick)

    def overflow(module, args, output):
        return output.index_fill(1, torch.tensor([unlabelled]), torch.inf)

    with qlora.attention_implementation(base, both.fast.attention):
        expected = qlora.summed_loss(both.quick, both.fast, batch)
        base.model.norm.register_forward_hook(overflow)
        loss = qlora.summed_loss(both.quick, both.fast._replace(spread=True), batch)
    assert loss.isfinite() and torch.equal(loss, expected) and loss.requires_grad


def test_the_try_leaves_the_windows_as_they_were():
    both = spanned("mistral", longest=70, **_OWN)
    found = [
        module.sliding_window
        for module in both.quick.modules()
        if isinstance(getattr(module, "sliding_window", None), int)
    ]
    assert reference.base_of(both.quick).config.sliding_window == 32 and set(found) <= {32}


CUTS = {  # of six members with 104 tokens
    "one by one": lambda window, padded: qlora.micro_batches(window, 1, qlora.NO_LIMIT, padded),
    "accumulated": lambda window, padded: qlora.micro_batches(window, 2, qlora.NO_LIMIT, padded),
    "accumulated, at most 30 tokens": lambda window, padded: qlora.micro_batches(window, 4, 30, padded),
    "regrouped, at most 60 tokens": lambda window, padded: qlora.micro_batches(window, None, 60, padded),
    "regrouped, all": lambda window, padded: qlora.micro_batches(window, None, qlora.NO_LIMIT, padded),
}


@pytest.mark.parametrize("cut", CUTS)
def test_everything_together_in_every_way_of_cutting_a_window(family, cut):
    name, both, rows, expected = family
    window = reference.window_of(rows)
    parts = CUTS[cut](window, both.fast.attention is None)
    with reference.counted() as calls:
        got = reference.quick(both.quick, both.fast, window, parts, recomputed=2)
    reference.assert_equal(got, expected, tolerance(name))
    assert calls["ChunkedCrossEntropy"] == len(parts) and calls["again"] == 2 * len(parts)


def test_packs_are_their_rows(family):
    """A pack is rows of a dataset that travel together; the model sees them as rows."""
    name, both, rows, expected = family
    packs = [{"pack": rows[:2]}, {"pack": rows[2:5]}, {"pack": rows[5:]}]
    window = reference.window_of(packs)
    assert window.rows == [2, 3, 1] and window.lengths == list(LENGTHS)
    parts = qlora.micro_batches(window, 2, qlora.NO_LIMIT, both.fast.attention is None)
    assert parts == [[0, 1, 2, 3, 4], [5]]
    reference.assert_equal(
        reference.quick(both.quick, both.fast, window, parts, recomputed=1), expected, tolerance(name)
    )


def tolerance(name: str) -> float:
    """Of a family: MPT makes its attention scores float32 by name."""
    return SINGLE if name == "mpt" else DOUBLE


class PlacedDropout:
    """Stands for torch.native_dropout: a token's mask depends on its row and place in it, however the rows lie."""

    def __init__(self, monkeypatch) -> None:
        generator = torch.Generator().manual_seed(0)
        self.drawn = torch.rand(len(LENGTHS), max(LENGTHS), 512, generator=generator)
        for name in ("padded_batch", "end_to_end_batch"):
            monkeypatch.setattr(qlora, name, partial(self.noted, getattr(qlora, name), name == "padded_batch"))
        monkeypatch.setattr(torch, "native_dropout", self.dropped)

    def noted(self, make, padded, window, members, *args):
        longest = max(window.lengths[i] for i in members)
        places = [self.drawn[i, : longest if padded else window.lengths[i]] for i in members]
        self.drawn_of_batch = torch.cat(places)
        return make(window, members, *args)

    def dropped(self, x, p, train):
        if not train:
            return x, None
        mask = (self.drawn_of_batch[:, : x.shape[-1]] >= p).view(x.shape)
        return x * mask / (1 - p), mask


WAYS = {  # of computing one window: how it is cut, layers recomputed, and what of the fast path is left out
    "padding-free": ("regrouped, all", 0, {}),
    "padded": ("regrouped, all", 0, {"attention": None}),
    "accumulated": ("accumulated", 0, {}),
    "regrouped": ("regrouped, at most 60 tokens", 0, {}),
    "recomputed": ("regrouped, all", 2, {}),
    "all logits": ("regrouped, all", 0, {"head": None, "post": None}),
    "everything": ("regrouped, at most 60 tokens", 2, {}),
}


@pytest.mark.parametrize(("bits", "dropout"), [(4, 0.0), (4, 0.1), (8, 0.1), (16, 0.1)])
@pytest.mark.parametrize("name", ["llama", "llama_gqa", "qwen2", "gemma", "mistral"])
def test_every_way_gives_one_loss_and_one_gradient(models, monkeypatch, name, bits, dropout):
    """In every precision of the base, with and without dropout of the same masks: as peft's layers on padded rows."""
    model, options, _ = FAMILIES[name]
    both = reference.make(models(model, **options), bits=bits, lora_dropout=dropout)
    if dropout:
        reference.draw_alike(both.stock)
        PlacedDropout(monkeypatch)
    rows = reference.rows_of(LENGTHS)
    window = reference.window_of(rows)
    packs = reference.window_of([{"pack": rows[:2]}, {"pack": rows[2:4]}, {"pack": rows[4:]}])
    expected = reference.quick(both.stock, qlora.FastPath(), window)
    for cut, recomputed, left_out in WAYS.values():
        fast = both.fast._replace(**left_out)
        parts = CUTS[cut](window, fast.attention is None)
        reference.assert_equal(reference.quick(both.quick, fast, window, parts, recomputed), expected, DOUBLE)
    parts = qlora.micro_batches(packs, 1, qlora.NO_LIMIT, False)
    reference.assert_equal(reference.quick(both.quick, both.fast, packs, parts), expected, DOUBLE)
    if dropout:  # what the masks are good for
        both.stock.eval()
        assert min(reference.errors(reference.quick(both.stock, qlora.FastPath(), window), expected).values()) > 1e-3


# ------------------------------------------------------------------------------------
# Flags that change what the layers compute
# ------------------------------------------------------------------------------------

VARIANTS = {
    "nf4": ("llama_gqa", {"bits": 4}),
    "nf4, constants whole": ("llama_gqa", {"bits": 4, "double_quant": False}),
    "fp4": ("llama_gqa", {"bits": 4, "quant_type": "fp4"}),
    "fp4, constants whole": ("llama_gqa", {"bits": 4, "quant_type": "fp4", "double_quant": False}),
    "nf4 qwen2": ("qwen2", {"bits": 4}),
    "nf4 gemma": ("gemma", {"bits": 4}),
    "nf4 gpt_neox": ("gpt_neox", {"bits": 4}),
    "8 bit": ("llama_gqa", {"bits": 8}),
    "8 bit qwen2": ("qwen2", {"bits": 8}),
    "nf4 qwen3": ("qwen3", {"bits": 4}),
    "nf4 mistral": ("mistral", {"bits": 4}),
    "8 bit gemma": ("gemma", {"bits": 8}),
    "8 bit mistral": ("mistral", {"bits": 8}),
    "16 bit": ("llama_gqa", {}),
    "rslora, bias, nf4": ("qwen2", {"use_rslora": True, "lora_bias": "all", "bits": 4, "lora_alpha": 7.5}),
    "rslora, bias, 8 bit": ("qwen2", {"use_rslora": True, "lora_bias": "lora_only", "bits": 8}),
    "rslora": ("llama_gqa", {"use_rslora": True, "lora_alpha": 7.5}),
    "every bias": ("qwen2", {"lora_bias": "all"}),
    "adapted layers' bias": ("qwen2", {"lora_bias": "lora_only"}),
    "bias of norms too": ("gpt_neox", {"lora_bias": "all"}),
    "nf4, bias": ("qwen2", {"bits": 4, "lora_bias": "all"}),
    "attn": ("llama_gqa", {"lora_modules": "attn"}),
    "mlp": ("llama_gqa", {"lora_modules": "mlp"}),
    "q_proj": ("llama_gqa", {"lora_modules": "q_proj"}),
    "q and v": ("llama_gqa", {"lora_modules": "q_proj,v_proj"}),
    "gate and down": ("llama_gqa", {"lora_modules": "gate_proj,down_proj"}),
    "frozen layer": ("llama_gqa", {"layers_to_freeze": 1}),
    "large rank": ("llama_gqa", {"lora_r": 96}),  # more than the layers are wide
}
FUSED_CALLS = {  # FusedLoRA and FusedMLP in each of two layers, where it is not two and one
    "nf4 gpt_neox": (4, 0), "bias of norms too": (4, 0), "attn": (2, 0), "mlp": (0, 1), "q_proj": (1, 0),
    "q and v": (1, 0), "gate and down": (2, 0), "frozen layer": (1, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_functions_under_every_flag(models, variant, dropout):
    """The same rows, end to end, with the same masks: without and with the fused functions and recomputation."""
    name, flags = VARIANTS[variant]
    both = reference.make(models(name), **{"bits": 16, "lora_dropout": dropout, **flags})
    if dropout:
        reference.draw_alike(both.stock)
    window = reference.window_of(reference.rows_of(LENGTHS))
    torch.manual_seed(1)
    expected = reference.quick(both.stock, both.fast, window)
    fused, mlp = FUSED_CALLS.get(variant, (2, 1))
    for recomputed in (0, 1, 2):
        torch.manual_seed(1)
        with reference.counted() as calls:
            got = reference.quick(both.quick, both.fast, window, recomputed=recomputed)
        reference.assert_equal(got, expected, DOUBLE)
        if not recomputed:
            assert (calls["FusedLoRA"], calls["FusedMLP"]) == (2 * fused, 2 * mlp)
    if dropout:  # what the masks are good for
        torch.manual_seed(2)
        other = reference.quick(both.quick, both.fast, window)
        assert min(reference.errors(other, expected).values()) > 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_layers_of_different_rank_and_scaling_share_an_input(models, dropout):
    """As an adapter from elsewhere may have them."""
    folder = models("llama_gqa")
    model = reference.load(folder, bits=16).unload()
    ranks, alphas = {"q_proj": 2, "v_proj": 8}, {"k_proj": 32, "up_proj": 1}
    config = LoraConfig(
        r=4, rank_pattern=ranks, alpha_pattern=alphas, lora_dropout=dropout, target_modules="all-linear",
        init_lora_weights=False,
    )  # fmt: skip
    both = reference.make(folder, get_peft_model(model, config), bits=16)
    reference.draw_alike(both.stock) if dropout else None
    window = reference.window_of(reference.rows_of(LENGTHS))
    torch.manual_seed(1)
    expected = reference.quick(both.stock, both.fast, window)
    torch.manual_seed(1)
    with reference.counted() as calls:
        got = reference.quick(both.quick, both.fast, window, recomputed=2)
    reference.assert_equal(got, expected, DOUBLE)
    assert calls["FusedLoRA"] == 2 * 2 * 2


def test_dora_stays_with_peft_and_a_line_says_so(models, log_lines):
    both = reference.make(models("llama"), bits=16, use_dora=True)
    assert "14 adapted layers stay with peft's own functions" in log_lines.text
    rows = reference.rows_of(LENGTHS)
    with reference.counted() as calls:
        got = reference.quick(both.quick, both.fast, reference.window_of(rows), recomputed=2)
    reference.assert_equal(got, reference.stock(both.stock, rows), DOUBLE)
    assert not calls["FusedLoRA"] and not calls["FusedMLP"] and calls["again"] == calls["end_to_end_attention"] // 2


def test_a_bias_in_lora_b_stays_with_peft(models, log_lines):
    folder = models("llama")
    config = LoraConfig(r=4, lora_bias=True, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    both = reference.make(folder, get_peft_model(reference.load(folder, bits=16).unload(), config), bits=16)
    assert "4 adapted layers stay with peft's own functions" in log_lines.text
    rows = reference.rows_of(LENGTHS)
    with reference.counted() as calls:
        got = reference.quick(both.quick, both.fast, reference.window_of(rows))
    reference.assert_equal(got, reference.stock(both.stock, rows), DOUBLE)
    assert not calls["FusedLoRA"]


def test_a_layer_is_recomputed_in_the_precision_that_it_was_computed_in(models):
    """Weights in float32 and products in bf16, as --fp16 has it with its own kind: autocast is off by then."""
    both = reference.make(models("llama_gqa"), dtype=None, bits=16)
    window = reference.window_of(reference.rows_of(LENGTHS))
    for model, fast in ((both.quick, both.fast), (both.stock, both.fast)):
        expected = reference.quick(model, fast, window, bf16=True)
        got = reference.quick(model, fast, window, recomputed=2, bf16=True)
        reference.assert_equal(got, expected, 1e-6)
        assert (
            max(reference.errors(reference.quick(model, fast, window), expected).values()) > 1e-3
        )  # what bf16 changes


def test_a_few_tokens_go_through_pefts_layers_unless_they_are_trained_on(models):
    """In training each process must add up gradients in one order, however few rows it has."""
    both = reference.make(models("llama"), bits=16)
    rows = reference.rows_of((4, 7))
    ids = torch.tensor([rows[0]["input_ids"]])
    with reference.counted() as calls, torch.no_grad():
        got = both.quick.eval()(input_ids=ids).logits
        assert torch.allclose(got, both.stock.eval()(input_ids=ids).logits)
        assert not calls["FusedLoRA"] and not calls["FusedMLP"]
    both.quick.train(), both.stock.train()
    with reference.counted() as calls:
        got = reference.quick(both.quick, both.fast, reference.window_of(rows))
    reference.assert_equal(got, reference.stock(both.stock, rows), DOUBLE)
    assert calls["FusedLoRA"] and calls["FusedMLP"]


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_kept_unpacked_are_the_packed_ones(models, monkeypatch, bits):
    both = reference.make(models("llama_gqa"), bits=bits)
    base, window = reference.base_of(both.quick), reference.window_of(reference.rows_of(LENGTHS))
    expected = reference.quick(both.quick, both.fast, window)
    unpacked, plain = [], qlora.dequantize_4bit
    monkeypatch.setattr(qlora, "dequantize_4bit", lambda *args: unpacked.append(1) or plain(*args))
    # seven weights a layer, forward and backward; the first three need no gradient of their input
    for layers, count in {1: 14, 2: 0, 0: 25}.items():
        qlora.set_unpacked_layers(base, layers, torch.float64)
        unpacked.clear()
        got = reference.quick(both.quick, both.fast, window)
        reference.assert_equal(got, expected, 0.0)
        assert len(unpacked) == (count if bits == 4 else 0)
    held = [module for module in base.modules() if getattr(module, "unpacked", None) is not None]
    assert not held


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v2", "esm"])
def test_encoders_are_fused_and_recomputed(models, name):
    """Masked language models: padded rows, all logits; each layer for itself, as its names are not the usual ones."""
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    both = reference.make(models("encoder", family=name, **dropout), bits=16, objective="mlm")
    assert both.fast == qlora.FastPath(skips_last=True)
    window = qlora.collate_step(reference.rows_of((23, 5, 17), vocabulary=30), masked=True)["step"]
    expected = reference.quick(both.stock, both.fast, window)
    for recomputed in (0, 2):
        with reference.counted() as calls:
            got = reference.quick(both.quick, both.fast, window, recomputed=recomputed)
        reference.assert_equal(got, expected, DOUBLE)
        per_layer = 8 if name == "deberta-v2" else 6  # which projects relative positions too
        assert calls["FusedLoRA"] == (2 + recomputed) * per_layer and calls["again"] == recomputed


def test_positions_that_all_layers_share_and_train_are_recomputed_in_torchs_own_way(models):
    """DeBERTa's relative ones, in a full fine-tune."""
    both = reference.make(models("encoder", family="deberta-v2"), bits=32, full_finetune=True, objective="mlm")
    assert not both.fast.by_input


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
    quick, stock = (
        reference.base_of(model).model.layers[0].self_attn for model in (both.quick.eval(), both.stock.eval())
    )
    x, y = torch.randn(2, 1, 20, 64, dtype=torch.float64)
    with reference.counted() as calls, torch.no_grad():
        for name, value in [("v", x), ("q", x), ("k", x), ("q", y), ("q", y), ("k", x), ("k", y), ("v", x.clone())]:
            layers = getattr(quick, f"{name}_proj"), getattr(stock, f"{name}_proj")
            assert torch.allclose(layers[0](value), layers[1](value), rtol=1e-12, atol=1e-12)
    assert calls["FusedLoRA"] == 6  # the first three calls are one


# ------------------------------------------------------------------------------------
# The head
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_cross_entropy_in_chunks(monkeypatch, bias, cap, smoothing):
    """70 tokens, 2**18 words: 64 tokens at a time. With a head that trains, as in a full fine-tune."""
    generator = torch.Generator().manual_seed(0)
    words, width, tokens = 2**18, 4, 70
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(words, width, generator=generator, dtype=torch.float64).requires_grad_()
    offset = torch.randn(words, generator=generator, dtype=torch.float64).requires_grad_() if bias else None
    targets = torch.randint(words, (tokens,), generator=generator)
    post = None if cap is None else partial(qlora._apply_rules, [(qlora.LOGIT_RULES["final_logit_softcapping"], cap)])
    leaves = [hidden, weight] + ([offset] if bias else [])

    chunks, linear = [], F.linear
    with monkeypatch.context() as patch:
        patch.setattr(qlora.F, "linear", lambda part, *args: chunks.append(len(part)) or linear(part, *args))
        loss = qlora.ChunkedCrossEntropy.apply(hidden, weight, offset, targets, post, smoothing)
    assert chunks == [64, 6]
    got = torch.autograd.grad(loss / 7, leaves)
    logits = F.linear(hidden, weight, offset)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    right = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    assert loss.dtype == torch.float64 and torch.allclose(loss, right, rtol=1e-12)
    for a, b in zip(got, torch.autograd.grad(right / 7, leaves), strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm() and b.norm() > 0


def test_evaluation_computes_no_gradient_of_a_head(monkeypatch):
    """Of one that trains in a full fine-tune: 2 GiB in float32, for 128256 words of 4096."""
    head, states, targets, made = torch.nn.Linear(8, 50), torch.randn(5, 8), torch.arange(5), []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda *args, **named: made.append(args) or zeros_like(*args, **named))
    with torch.no_grad():
        loss = qlora._chunked(qlora.FastPath(head=head), targets, 0.0, states)
    assert not made and torch.allclose(loss, F.cross_entropy(head(states), targets, reduction="sum"))
    qlora._chunked(qlora.FastPath(head=head), targets, 0.0, states).backward()
    assert made and head.weight.grad.any()


def test_the_mean_over_a_window_is_not_rounded_to_bf16():
    """1 / 1013 in bf16 is 0.3 % less: every gradient would be."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1013, 16, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(50, 16, generator=generator).bfloat16()
    targets = torch.randint(50, (1013,), generator=generator)
    loss = qlora.ChunkedCrossEntropy.apply(hidden, weight, None, targets, None, 0.0) * (1 / 1013)
    got = torch.autograd.grad(loss, hidden)[0].double().flatten()
    wide = hidden.detach().double().requires_grad_()
    right = torch.autograd.grad(F.cross_entropy(F.linear(wide, weight.double()), targets), wide)[0].flatten()
    assert got @ right / (right @ right) == pytest.approx(1.0, abs=5e-4)


def test_no_token_to_learn_is_a_loss_of_zero_with_gradients(models):
    both = reference.make(models("llama"), bits=16)
    rows = [{"input_ids": list(range(20)), "labels": [qlora.IGNORE] * 20}]
    got = reference.quick(both.quick, both.fast, reference.window_of(rows))
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
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_a_model_does_to_its_logits(models, family, options, smoothing):
    both = reference.make(models(family, **options), bits=16)
    assert both.fast.head is not None
    rows = reference.rows_of(LENGTHS)
    fast = both.fast._replace(attention=None)
    got = reference.quick(both.stock, fast, reference.window_of(rows), smoothing=smoothing)
    batch = qlora.padded_batch(reference.window_of(rows), list(range(len(rows))), 0, "right")
    whole = qlora.summed_loss(both.stock, qlora.FastPath(), batch, smoothing) / reference.supervised(
        reference.window_of(rows)
    )
    whole.backward()
    reference.assert_equal(got, reference.found(both.stock, whole), 1e-6)  # the whole logits are taken as float32


def test_logits_that_a_model_changes_in_a_way_of_its_own_are_computed_whole(models, monkeypatch, log_lines):
    monkeypatch.setattr(qlora, "LOGIT_RULES", {})
    both = reference.make(models("gemma2", final_logit_softcapping=2.0), bits=16)
    assert both.fast.head is None and "logits are computed whole" in log_lines.text


@pytest.mark.parametrize("tie", [False, True])
def test_a_full_finetune_trains_the_head_in_chunks(models, tie):
    """Not where it is tied to the embedding, which does not train."""
    both = reference.make(models("llama", tie=tie), bits=16, full_finetune=True)
    rows = reference.rows_of(LENGTHS)
    with reference.counted() as calls:
        got = reference.quick(both.quick, both.fast, reference.window_of(rows), recomputed=2)
    reference.assert_equal(got, reference.stock(both.stock, rows), DOUBLE)
    assert calls["ChunkedCrossEntropy"] == 1 and calls["again"] == 2
    assert ("lm_head.weight" in got.gradients) == (not tie)
    assert "model.norm.weight" in got.gradients and "model.embed_tokens.weight" not in got.gradients


def test_a_head_that_peft_trains_whole(models):
    both = reference.make(models("llama"), bits=16, modules_to_save="lm_head")
    rows = reference.rows_of(LENGTHS)
    got = reference.quick(both.quick, both.fast, reference.window_of(rows), recomputed=2)
    reference.assert_equal(got, reference.stock(both.stock, rows), DOUBLE)
    assert any("lm_head" in name for name in got.gradients)


def test_an_embedding_that_peft_trains_whole(models):
    both = reference.make(models("llama"), bits=16, modules_to_save="embed_tokens")
    rows = reference.rows_of(LENGTHS)
    got = reference.quick(both.quick, both.fast, reference.window_of(rows), recomputed=2)
    reference.assert_equal(got, reference.stock(both.stock, rows), DOUBLE)
    assert any("embed_tokens" in name for name in got.gradients)


# ------------------------------------------------------------------------------------
# bf16
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama_gqa", "qwen2", "gemma"])
def test_the_error_in_bf16_is_no_larger_than_pefts(models, family):
    """Of every kind of adapter, over six windows, against the same weights in float64."""
    both = reference.make(models(family), dtype=None, bits=4, bf16=True, lora_r=16)
    exact = reference.widen(reference.unpack(reference.load(models(family), bits=4, bf16=True, lora_r=16))).train()
    squares: dict[str, list[float]] = {}
    for seed in range(6):
        rows = reference.rows_of((64, 40, 40, 17), seed)
        right = reference.stock(exact, rows)
        plain = reference.quick(both.stock, qlora.FastPath(), reference.window_of(rows), bf16=True)
        with reference.counted() as calls:
            fast = reference.quick(both.quick, both.fast, reference.window_of(rows), recomputed=2, bf16=True)
        assert all(calls[name] for name in (*reference.FUNCTIONS, "end_to_end_attention"))
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


SHAPES = {
    "one row": (19,),
    "one token": (1,),
    "rows of one token": (1, 1, 1),
    "rows of one length": (8, 8, 8),
    "rows of any length": (5, 1, 13, 8),
    "a longer row among rows of one length": (8, 8, 9),
}


@pytest.mark.parametrize("window", [None, 1, 7, 8, 100])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grouped", [1, 2])
def test_attention_end_to_end(shape, window, grouped):
    lengths = SHAPES[shape]
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
# Windows and micro-batches
# ------------------------------------------------------------------------------------


def random_window(generator: random.Random) -> qlora.StepBatch:
    """Up to 12 rows of the dataset, of one member each or packed."""
    packed = generator.random() < 0.5
    counts = [generator.randint(1, 4) if packed else 1 for _ in range(generator.randint(1, 12))]
    tokens = [torch.zeros(generator.choice((1, 2, 7, 30, 64)), dtype=torch.long) for _ in range(sum(counts))]
    return qlora.StepBatch(tokens, tokens, counts, [""] * len(tokens))


def size(lengths: list[int], padded: bool) -> int:
    return max(lengths) * len(lengths) if padded else sum(lengths)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [None, 1, 3])
def test_micro_batches_hold_every_member_once_and_keep_the_limits(rows, padded):
    generator = random.Random(0)
    for _ in range(500):
        window, limit = random_window(generator), generator.choice((1, 10, 64, 100, 256, qlora.NO_LIMIT))
        parts, lengths = qlora.micro_batches(window, rows, limit, padded), window.lengths
        assert sorted(i for part in parts for i in part) == list(range(len(lengths))) and all(parts)
        assert all(len(part) == 1 or size([lengths[i] for i in part], padded) <= limit for part in parts)
        if rows is not None or not padded:
            assert [i for part in parts for i in part] == list(range(len(lengths)))
        if rows is not None:  # of the dataset, in their order: a part never holds members of more
            row_of = [i for i, count in enumerate(window.rows) for _ in range(count)]
            assert all(len({row_of[i] // rows for i in part}) == 1 for part in parts)
        if limit == qlora.NO_LIMIT:
            assert len(parts) == (1 if rows is None else -(-len(window.rows) // rows))


def test_micro_batches_by_example():
    tokens = [torch.zeros(n) for n in (30, 10, 20, 40)]
    cut = partial(qlora.micro_batches, qlora.StepBatch(tokens, tokens, [1, 2, 1], [""] * 4))
    assert cut(1, 1000, False) == [[0], [1, 2], [3]]  # rows of the dataset, of which the second is a pack
    assert cut(2, 1000, True) == [[0, 1, 2], [3]]
    assert cut(2, 50, False) == [[0, 1], [2], [3]]
    assert cut(2, 5, False) == [[0], [1], [2], [3]]  # no row is cut
    assert cut(None, 1000, False) == [[0, 1, 2, 3]]
    assert cut(None, 60, False) == [[0, 1], [2], [3]]  # shares of a half, and a fiftieth
    assert cut(None, 60, True) == [[3], [0, 2], [1]]  # the longest first, so that little is padded


def test_a_window_is_cut_into_even_shares():
    """One micro-batch nearly full and one nearly empty would take the time of two full ones."""
    tokens = [torch.zeros(10)] * 24
    window = qlora.StepBatch(tokens, tokens, [1] * 24, [""] * 24)
    assert [len(part) for part in qlora.micro_batches(window, None, 200, False)] == [12, 12]


# ------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------

SLOW = {"padding_free": False, "fused_lora": False, "chunked_head": False, "recompute_layers": "none"}


def losses(run, name: str = "loss") -> list[float]:
    return [entry[name] for entry in run.json("trainer_state.json")["log_history"] if name in entry]


def adapter(run) -> dict[str, torch.Tensor]:
    return load_file(run.output_dir / "adapter_model.safetensors")


def assert_adapters_equal(run, expected, rtol: float, atol: float) -> None:
    got = adapter(run)
    for name, tensor in adapter(expected).items():
        assert torch.allclose(got[name], tensor, rtol=rtol, atol=atol), name


@pytest.fixture
def trained(monkeypatch):
    """What qlora.assemble gave the runs of this test."""
    made, assemble = [], qlora.assemble
    monkeypatch.setattr(qlora, "assemble", lambda *args: made.append(assemble(*args)) or made[-1])
    return made


def test_fifty_steps_fast_and_slow_are_one_curve(run_qlora, tmp_path, trained, models):
    """And the adapter of the fast run gives the same logits in plain peft."""
    folder = models("llama_gqa")
    flags = {"model_name_or_path": folder, "max_steps": 50, "save_steps": 50, "gradient_accumulation_steps": 2}
    flags |= {"learning_rate": 1e-3, "max_grad_norm": 1.0, "do_eval": True}
    with reference.counted() as calls:
        fast = run_qlora(output_dir=tmp_path / "fast", auto_batch=True, **flags)
    assert all(calls[name] >= 50 for name in (*reference.FUNCTIONS, "again", "end_to_end_attention"))
    with reference.counted() as calls:
        slow = run_qlora(output_dir=tmp_path / "slow", **flags, **SLOW)
    assert calls == {"Recompute": 2, "again": 2}  # in the try before training
    assert fast.code == slow.code == 0 and len(losses(fast)) == 50
    assert losses(fast)[-1] < losses(fast)[0] - 1  # it learns
    assert losses(fast) == pytest.approx(losses(slow), rel=1e-4)
    assert losses(fast, "grad_norm") == pytest.approx(losses(slow, "grad_norm"), rel=1e-3)
    ours, theirs = (run.json("all_results.json") for run in (fast, slow))
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-4)
    assert ours["train_tokens"] == theirs["train_tokens"]

    ids = torch.tensor([[tiny.BOS, *b"Order 3: where is my coffee? It should be here by now."]])
    ours, config = trained[0][0].eval(), reference.parse(folder)
    base = qlora.load_model(config, qlora.load_model_config(config, str(folder)), str(folder))
    with torch.no_grad(), reference.counted() as calls:
        expected = ours(input_ids=ids).logits
        before = base(input_ids=ids).logits
        alone = PeftModel.from_pretrained(base, fast.output_dir).eval()(input_ids=ids).logits
    assert calls == {"FusedLoRA": 4, "FusedMLP": 2} and (alone - before).abs().max() > 0.1
    assert torch.allclose(alone, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_a_packed_run_is_the_unpacked_one(run_qlora, models, tmp_path, family):
    """All 24 rows in each window, however many packs that is; OLMoE's own one of 16 tokens is in its mask alone."""
    flags = {"per_device_train_batch_size": 24, "bits": 16, "optim": "sgd", "learning_rate": 0.5, "max_steps": 2}
    flags |= {"source_max_len": 64, "target_max_len": 64, "max_grad_norm": 1.0, "save_strategy": "no"}
    flags["model_name_or_path"] = models(family, **({"sliding_window": 16} if family == "olmoe" else {}))
    plain = run_qlora(output_dir=tmp_path / "plain", **flags, **SLOW)
    with reference.counted() as calls:
        packed = run_qlora(output_dir=tmp_path / "packed", packing=True, auto_batch=True, **flags)
    assert "packing: 24 rows in " in packed.stderr
    assert (family == "olmoe") == ("rows are padded: in OlmoeForCausalLM" in packed.stderr)
    assert bool(calls["end_to_end_attention"] > 4) == (family == "llama")  # more than the try before training
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
def test_a_model_that_the_fast_path_does_not_know_trains_on_the_stock_path(run_qlora, models, tmp_path, unknown):
    folder = models("remote_code")
    folder = unknown_model(tmp_path / "all_its_own", folder) if unknown else folder
    flags = {"model_name_or_path": folder, "trust_remote_code": True, "bits": 16, "learning_rate": 1e-2}
    with reference.counted() as calls:
        fast = run_qlora(output_dir=tmp_path / "fast", auto_batch=True, **flags)
    slow = run_qlora(output_dir=tmp_path / "slow", **flags, **SLOW)
    assert fast.code == slow.code == 0 and (fast.output_dir / "completed").exists()
    assert "rows are padded: ToyForCausalLM does not take rows that lie end to end" in fast.stderr
    if unknown:
        assert not calls, calls
        assert "8 adapted layers stay with peft's own functions" in fast.stderr
        assert "logits are computed whole: ToyForCausalLM" in fast.stderr
    else:  # its layers and its head are ordinary
        assert calls["FusedLoRA"] and calls["ChunkedCrossEntropy"] and calls["again"]
    assert losses(fast)[-1] < losses(fast)[0]
    assert losses(fast) == pytest.approx(losses(slow), rel=1e-5)
    assert_adapters_equal(fast, slow, rtol=1e-3, atol=1e-5)


class Memory:
    """In training, `fails(tokens of the micro-batch, number of the call)` is an out-of-memory error.

    It comes after the forward pass, when random numbers are drawn and a tape is there. What lived in a pass that
    failed must be gone when the next one begins, or there would be as little memory as before.
    """

    def __init__(self, monkeypatch):
        self.plain, self.step = qlora.summed_loss, qlora.QLoRATrainer.training_step
        self.training = False
        self.set_up(lambda tokens, call: False)
        monkeypatch.setattr(qlora, "summed_loss", self.summed_loss)
        monkeypatch.setattr(qlora.QLoRATrainer, "training_step", lambda *args, **kwargs: self.watched(*args, **kwargs))

    def set_up(self, fails) -> list[int]:
        """Returns the list that fills with the tokens of the micro-batches."""
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
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss


@pytest.fixture
def memory(monkeypatch):
    return Memory(monkeypatch)


SMALL = {"source_max_len": 16, "target_max_len": 16, "optim": "sgd", "learning_rate": 0.5, "max_steps": 3}
SMALL |= {"per_device_train_batch_size": 4, "bits": 16, "lora_dropout": 0.1, "max_grad_norm": 1.0}


def complaints(run) -> list[str]:
    return [line for line in run.stderr.splitlines() if "memory ran out" in line]


@pytest.mark.parametrize("auto_batch", [True, False])
@pytest.mark.parametrize("padding_free", [True, False])
def test_out_of_memory_repeats_the_window_in_smaller_micro_batches(
    run_qlora, tmp_path, monkeypatch, memory, padding_free, auto_batch
):
    """The run is the one that had small micro-batches from the start, dropout included."""
    ends, make_room = [], qlora.QLoRATrainer._make_room
    monkeypatch.setattr(
        qlora.QLoRATrainer, "_make_room", lambda self, *args: [make_room(self, *args), ends.append(self.sizes)]
    )
    flags = {**SMALL, "padding_free": padding_free, "auto_batch": auto_batch}
    seen = memory.set_up(lambda tokens, call: tokens > 70)
    run = run_qlora(output_dir=tmp_path / "short", **flags)
    assert run.code == 0 and seen[0] > 70 and max(seen[2:]) <= 70
    lines = complaints(run)
    assert len(lines) == len(ends) == 1 and "step 1: " in lines[0] and str(ends[0]) in lines[0]

    choose = qlora.choose_step_plan
    monkeypatch.setattr(qlora, "choose_step_plan", lambda *args: (ends[-1], choose(*args)[1]))
    memory.set_up(lambda tokens, call: False)
    small = run_qlora(output_dir=tmp_path / "small", **flags)
    assert not complaints(small)
    assert losses(run) == pytest.approx(losses(small), rel=1e-6)
    assert_adapters_equal(run, small, rtol=1e-6, atol=1e-7)


def test_out_of_memory_in_a_later_micro_batch_takes_back_the_gradients_of_the_earlier(run_qlora, tmp_path, memory):
    flags = {**SMALL, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "lora_dropout": 0.0}
    expected = run_qlora(output_dir=tmp_path / "enough", **flags)
    seen = memory.set_up(lambda tokens, call: call == 5)  # the second of the second step
    run = run_qlora(output_dir=tmp_path / "short", **flags)
    assert len(complaints(run)) == 1 and "step 2: " in complaints(run)[0]
    assert len(seen) == 3 + 2 + 6 + 6  # of three windows of six rows
    assert losses(run) == pytest.approx(losses(expected), rel=1e-6)
    assert losses(run, "grad_norm") == pytest.approx(losses(expected, "grad_norm"), rel=1e-5)
    assert_adapters_equal(run, expected, rtol=1e-5, atol=1e-6)


def test_out_of_memory_recomputes_more_layers_before_rows_are_parted(run_qlora, tmp_path, memory):
    flags = {**SMALL, "recompute_layers": "none"}
    expected = run_qlora(output_dir=tmp_path / "enough", **flags)
    seen = memory.set_up(lambda tokens, call: call <= 2)
    with reference.counted() as calls:
        run = run_qlora(output_dir=tmp_path / "short", **flags)
    assert ["0 of 2 layers" in complaints(run)[0], "1 of 2 layers" in complaints(run)[1]] == [True, True]
    assert len(complaints(run)) == 2 and len(seen) == 2 + 3
    assert calls["again"] == 2 + 2 * 3  # in the try before training and in three steps
    assert losses(run) == pytest.approx(losses(expected), rel=1e-6)
    assert_adapters_equal(run, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def many_shapes(models, tmp_path):
    """Flags of a run whose micro-batches have many shapes, each of them several times."""
    questions = [tiny.TEXT[31 * i : 31 * i + 10 + 3 * (i % 9)] for i in range(40)]
    rows = [{"input": text, "output": tiny.TEXT[7 * i : 7 * i + 20 + 2 * (i % 13)]} for i, text in enumerate(questions)]
    return {
        "model_name_or_path": models("llama_gqa"), "bits": 4, "dataset": tiny.rows_to_jsonl(tmp_path / "r.jsonl", rows),
        "max_steps": 24, "learning_rate": 0.2, "optim": "sgd", "per_device_train_batch_size": 2, "save_strategy": "no",
        "gradient_accumulation_steps": 3, "recompute_layers": "all", "auto_batch": True, "max_grad_norm": 1.0,
    }  # fmt: skip


@pytest.fixture
def graphs_chosen(monkeypatch):
    """Call it for runs whose layers are graphs, on a CPU too, with what stands for a recording."""
    choose = qlora.choose_step_plan

    def choose_graphs(*args):
        sizes, plan = choose(*args)
        return sizes._replace(graphs=True, tokens=100), plan

    def patch(recorded):
        monkeypatch.setattr(qlora, "recorded", recorded)
        monkeypatch.setattr(qlora, "choose_step_plan", choose_graphs)

    return patch


def test_layers_as_graphs_train_as_layers_that_are_recomputed(
    run_qlora, tmp_path, many_shapes, graphs_chosen, monkeypatch
):
    """What keeps a graph's inputs and gradients, over windows of many shapes; here a graph calls what it recorded."""
    flags, made, replayed = many_shapes, [], []
    plain = run_qlora(output_dir=tmp_path / "plain", **flags)

    def recorded(function, device):
        made.append(function)
        return SimpleNamespace(replay=lambda: replayed.append(1) or function())

    graphs_chosen(recorded)
    graphs = run_qlora(output_dir=tmp_path / "graphs", **flags)
    assert len(made) >= 12 and len(replayed) > 40 and "in CUDA graphs" in graphs.stderr
    monkeypatch.setattr(qlora.Graphed, "most", 2)
    made.clear()
    few = run_qlora(output_dir=tmp_path / "few", **flags)
    assert len(made) == 2 * 2 * 2, "shapes, layers, passes; other shapes are launched"
    assert losses(few) == pytest.approx(losses(plain), rel=1e-4)

    def cannot(function, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs_chosen(cannot)
    failed = run_qlora(output_dir=tmp_path / "failed", **flags)
    assert failed.code == 2 and "error: --cuda_graphs: LlamaDecoderLayer can't be recorded" in failed.stderr
    assert losses(graphs) == pytest.approx(losses(plain), rel=1e-4)
    assert losses(graphs, "grad_norm") == pytest.approx(losses(plain, "grad_norm"), rel=1e-3)


def test_out_of_memory_in_a_recording_repeats_the_step_without_graphs(run_qlora, tmp_path, many_shapes, graphs_chosen):
    flags, made = {**many_shapes, "max_steps": 8}, []

    def short(function, device):
        made.append(function)
        if len(made) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return SimpleNamespace(replay=function)

    plain = run_qlora(output_dir=tmp_path / "plain", **flags)
    graphs_chosen(short)
    run = run_qlora(output_dir=tmp_path / "short", **flags)
    (line,) = complaints(run)
    assert run.code == 0 and len(made) == 6 and "in CUDA graphs" not in line
    assert losses(run) == pytest.approx(losses(plain), rel=1e-4)
    assert losses(run, "grad_norm") == pytest.approx(losses(plain, "grad_norm"), rel=1e-3)


@pytest.mark.parametrize(
    ("dtype", "changed", "able"),
    [("bfloat16", {}, True), ("float16", {}, True), ("float32", {}, False), ("bfloat16", {"head_dim": 12}, False),
     ("bfloat16", {"attention_dropout": 0.1}, False)],
)  # fmt: skip
def test_layers_are_graphs_only_where_attention_is_one_kernel(models, monkeypatch, dtype, changed, able):
    """In others a recording would come to lengths that only the GPU knows, and end the run."""
    base = reference.base_of(reference.load(models("llama_gqa"), bits=4))
    monkeypatch.setattr(base, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    for name, value in {"head_dim": 16, **changed}.items():
        monkeypatch.setattr(base.config, name, value)
    assert qlora.graphable(base, qlora.FastPath(attention=qlora.VARLEN_ATTENTION), getattr(torch, dtype)) is able


def test_out_of_memory_drops_weights_kept_unpacked_first(run_qlora, tmp_path, memory):
    flags = {**SMALL, "bits": 4, "unpacked_layers": "all"}
    expected = run_qlora(output_dir=tmp_path / "enough", **flags)
    memory.set_up(lambda tokens, call: call == 1)
    run = run_qlora(output_dir=tmp_path / "short", **flags)
    (line,) = complaints(run)
    assert "2 kept unpacked; repeating it with" in line and line.endswith("0 kept unpacked")
    assert losses(run) == pytest.approx(losses(expected), rel=1e-6)
    assert_adapters_equal(run, expected, rtol=1e-5, atol=1e-6)


def test_out_of_memory_takes_back_the_random_numbers_of_every_gpu(run_qlora, tmp_path, memory, monkeypatch):
    """Layers of one process may lie on several: a generator of our own stands for a second GPU's."""
    second, taken = torch.Generator().manual_seed(7), []
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [second.get_state()])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: taken.append(second.set_state(*states)))

    def dropped(x, p, train):
        """A mask of the second GPU's generator."""
        mask = torch.rand(x.shape, generator=second) >= p
        return x * mask / (1 - p), mask

    monkeypatch.setattr(torch, "native_dropout", dropped)
    flags = {**SMALL, "bits": 4, "unpacked_layers": "all", "recompute_layers": "none"}
    expected = run_qlora(output_dir=tmp_path / "enough", **flags)
    second.manual_seed(7)
    memory.set_up(lambda tokens, call: call == 2)  # the second step, after its forward pass
    run = run_qlora(output_dir=tmp_path / "short", **flags)
    assert len(complaints(run)) == len(taken) == 1
    assert losses(run) == pytest.approx(losses(expected), rel=1e-6)
    assert_adapters_equal(run, expected, rtol=1e-5, atol=1e-6)


def test_out_of_memory_with_nothing_left_to_make_smaller_is_one_line(run_qlora, memory):
    seen = memory.set_up(lambda tokens, call: True)
    run = run_qlora(**SMALL)
    lines = run.stderr.splitlines()
    assert run.code == 2 and "Traceback" not in run.stderr
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "memory" in lines[-1] and "--source_max_len" in lines[-1]
    assert len(seen) > 2 and seen[-1] <= 32  # down to a single row
    assert not (run.output_dir / "completed").exists()


def test_memory_that_runs_out_between_layers_of_one_input_leaves_no_tape(run_qlora, models, memory, monkeypatch):
    """Qwen 3 takes a norm of q before it asks for k, which is there already and holds the whole tape."""
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
    """To send it would wait for the GPU before each step. A device that holds nothing stands for one."""
    kept, found = qlora.QLoRATrainer.get_batch_samples, []

    def watched(self, iterator, number, device):
        batches, items = kept(self, iterator, number, torch.device("meta"))
        found.append(items.device.type)
        return batches, items

    monkeypatch.setattr(qlora.QLoRATrainer, "get_batch_samples", watched)
    assert run_qlora(max_steps=1).code == 0 and set(found) == {"cpu"}


def test_noise_on_embeddings_depends_on_a_rows_own_length(run_qlora):
    """NEFTune divides it by the root of the row's length: rows that lie end to end would be one long row."""
    with reference.counted() as calls:
        run = run_qlora(neftune_noise_alpha=5, max_steps=1)
    assert run.code == 0 and "rows are padded: " in run.stderr and not calls["end_to_end_attention"]


@pytest.mark.parametrize(
    ("flags", "off"),
    [
        ({"padding_free": False}, "end_to_end_attention"),
        ({"attn_implementation": "eager"}, "end_to_end_attention"),
        ({"fused_lora": False}, "FusedLoRA"),
        ({"chunked_head": False}, "ChunkedCrossEntropy"),
    ],
)
def test_each_part_has_its_switch(run_qlora, flags, off):
    with reference.counted() as calls:
        assert run_qlora(max_steps=1, **flags).code == 0
    parts = {"end_to_end_attention", "FusedLoRA", "ChunkedCrossEntropy", "Recompute"}
    assert not calls[off] and all(calls[name] for name in parts - {off})
