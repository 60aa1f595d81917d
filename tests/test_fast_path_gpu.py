"""The fast path on a GPU, in bf16: kernels against float64, and whole steps and runs against the libraries' own.

    python -m pytest tests/test_fast_path_gpu.py        four minutes at most on one H200; needs liger-kernel

In bf16 no two ways of computing agree to the last digit, so both are compared with the same weights in float64, and
the error of ours may not be larger than 1.1 times theirs. Attention's backward pass sums in varying order: two equal
passes differ by up to 1e-2 in the norm of a parameter's gradient.
"""

import copy
import gc
import math
import re
import sys
from functools import partial

import plain_loop
import pytest
import reference
import tiny
import tiny_classes
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

import qlora

pytestmark = pytest.mark.gpu
DEVICE, BF16 = "cuda", torch.bfloat16


def distance(a: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, in norm."""
    return float((a.double() - exact).norm() / exact.norm())


# ------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantised_weights_are_bitsandbytes_bit_for_bit(quant_type, double_quant, dtype):
    """Whole layers of real models, and shapes that fill neither a block of 64 nor a group of 32 or 256 blocks."""
    shapes = [(4096, 4096), (1024, 4096), (11008, 256), (8, 8), (1, 64), (33, 64), (257, 192), (3, 100), (5, 7)]
    for shape in shapes:
        for blocksize in (64, 128):
            weight = torch.randn(shape, device=DEVICE, dtype=dtype)
            layer = packed_layer(weight, blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type)
            expected = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            qlora.dense_weight(layer, dtype)  # compiles the kernel, which the next call launches at once
            got = qlora.dense_weight(layer, dtype)
            assert got.dtype == dtype and got.shape == shape
            assert torch.equal(got, expected), (shape, blocksize, (got - expected).abs().max())


def packed_layer(weight: torch.Tensor, **options) -> torch.nn.Module:
    packed, state = quantize_4bit(weight, **options)
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    layer.weight.quant_state = state
    return layer


def test_our_kernel_dequantises_where_it_can(monkeypatch):
    """bitsandbytes takes twice as long; a shape that does not fill its blocks is left to it."""
    calls = []
    monkeypatch.setattr(qlora, "dequantize_4bit", lambda *args: calls.append(1) or dequantize_4bit(*args))
    for shape, expected in [((128, 64), 0), ((3, 100), 1)]:
        weight = torch.randn(shape, device=DEVICE, dtype=BF16)
        qlora.dense_weight(packed_layer(weight, blocksize=64, quant_type="nf4"), BF16)
        assert len(calls) == expected


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh"])
def test_the_gated_activation_of_liger_kernel(name):
    """Product and gradients are no further from float64 than those of torch's own functions."""
    act = ACT2FN[name]
    kernels = qlora.gated_kernels(act, torch.empty(1, device=DEVICE))
    assert kernels is not None
    generator = torch.Generator(DEVICE).manual_seed(0)
    for shape in ((1, 64), (300, 1408), (7, 11008)):
        scales = (3, 1, 1)
        gate, up, grad = ((scale * torch.randn(shape, device=DEVICE, generator=generator)).to(BF16) for scale in scales)
        wide = [tensor.double().requires_grad_() for tensor in (gate, up)]
        exact = F.silu(wide[0]) * wide[1] if name == "silu" else F.gelu(wide[0], approximate="tanh") * wide[1]
        right = [exact.detach(), *torch.autograd.grad(exact, wide, grad.double())]
        values = gate.clone().requires_grad_(), up.clone().requires_grad_()
        product = act(values[0]) * values[1]
        eager = [product.detach(), *torch.autograd.grad(product, values, grad)]
        product = kernels[0](gate, up)[2]
        assert torch.equal(qlora.gated_product(act, gate, up), product)
        ours = [product, *qlora.gated_gradients(act, grad, gate.clone(), up.clone())]  # which it writes over
        for a, b, expected in zip(ours, eager, right, strict=True):
            assert a.dtype == BF16 and a.shape == shape
            assert distance(a, expected) <= 1.2 * distance(b, expected) + 1e-6


@pytest.mark.parametrize(("width", "dtype"), [(96, BF16), (768, torch.float32), (1500, BF16)])
def test_gate_and_share_of_experts_in_one_pass(width, dtype):
    """Values and all gradients as near to float64 as torch's own functions, in widths beside and above a block's."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    both, grad = (torch.randn(300, n, device=DEVICE, generator=generator).to(BF16) for n in (2 * width, width))
    shares = torch.rand(300, 1, device=DEVICE, generator=generator).to(dtype)

    def plain(both, shares):
        gate, up = both.chunk(2, dim=-1)
        return (F.silu(gate) * up * shares).to(both.dtype)

    def measured(function, wide):
        leaves = [x.to(torch.float64 if wide else x.dtype, copy=True).requires_grad_() for x in (both, shares)]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    exact, ours, theirs = measured(plain, True), measured(qlora.GatedShares.apply, False), measured(plain, False)
    for a, b, right in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype and distance(a, right) <= 1.05 * distance(b, right)


@pytest.mark.parametrize("width", [64, 1500, 2048])
def test_the_sum_of_the_rows_of_each_token(width):
    generator = torch.Generator(DEVICE).manual_seed(0)
    rows = torch.randn(1200, width, device=DEVICE, generator=generator).to(BF16)
    places = torch.randperm(1200, device=DEVICE, generator=generator).view(200, 6)
    expected = rows.double()[places].sum(1)
    assert distance(qlora.sum_rows(rows, places), expected) <= distance(expected.to(BF16), expected) + 1e-6


def frozen_head(words: int, width: int, generator: torch.Generator) -> torch.nn.Linear:
    head = torch.nn.Linear(width, words, bias=False, device=DEVICE, dtype=BF16).requires_grad_(False)
    head.weight.copy_(torch.randn(words, width, device=DEVICE, generator=generator))
    return head


@pytest.mark.parametrize(("words", "smoothing"), [(5, 0.0), (32000, 0.0), (32000, 0.1), (128256, 0.0)])
def test_the_kernel_for_cross_entropy(words, smoothing):
    """Loss as of the same bf16 logits in float64; gradient as near as rounding the logits' gradient to bf16 allows."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    tokens, width = 300, 64
    hidden = torch.randn(tokens, width, device=DEVICE, generator=generator).to(BF16).requires_grad_()
    head = frozen_head(words, width, generator)
    targets = torch.randint(words, (tokens,), device=DEVICE, generator=generator)
    loss = qlora.ChunkedCrossEntropy.apply(hidden, head.weight, None, targets, None, smoothing)
    (got,) = torch.autograd.grad(loss, hidden)

    logits = head(hidden.detach()).double().requires_grad_()  # bf16, as the kernel sees them
    right = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    assert loss.dtype == torch.float32 and abs(loss - right) <= 1e-4 * right
    (of_logits,) = torch.autograd.grad(right, logits)
    expected, plain = of_logits @ head.weight.double(), of_logits.to(BF16) @ head.weight
    assert distance(got, expected) <= 1.2 * distance(plain, expected) + 1e-6


@pytest.mark.parametrize("case", ["head that trains", "capped logits"])
def test_cross_entropy_in_chunks_on_a_gpu_without_the_kernel(case):
    """Several chunks of 261 tokens: near the error of whole logits."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    tokens, width, words, cap = 1500, 64, 128256, 20.0
    head = frozen_head(words, width, generator).requires_grad_(case == "head that trains")
    hidden = torch.randn(tokens, width, device=DEVICE, generator=generator).to(BF16).requires_grad_()
    targets = torch.randint(words, (tokens,), device=DEVICE, generator=generator)
    rule = partial(qlora.LOGIT_RULES[-1], cap) if case == "capped logits" else None
    leaves = [hidden, head.weight] if case == "head that trains" else [hidden]
    loss = qlora.ChunkedCrossEntropy.apply(hidden, head.weight, None, targets, rule, 0.0)
    got = torch.autograd.grad(loss / tokens, leaves)
    wide = [hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()]
    exact, whole = (F.linear(*pair) for pair in (wide, (hidden, head.weight)))
    exact, whole = (cap * torch.tanh(x / cap) if rule else x for x in (exact, whole.float()))
    exact, whole = (F.cross_entropy(x, targets) for x in (exact, whole))
    right, plain = torch.autograd.grad(exact, wide[: len(leaves)]), torch.autograd.grad(whole, leaves)
    assert loss.item() / tokens == pytest.approx(exact.item(), rel=1e-3)
    for ours, theirs, expected in zip(got, plain, right, strict=True):
        assert distance(ours, expected) <= 1.5 * distance(theirs, expected)  # each chunk's sum is rounded


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("grouped", [1, 4])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("lengths", [(100, 33, 1, 217), (128, 128, 128), (300,), (1, 1, 5)], ids=str)
def test_attention_end_to_end(lengths, size, grouped, window):
    """Values and gradients: near the error of the rows one by one through another of torch's kernels."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    heads = (8, 8 // grouped, 8 // grouped)
    made = [torch.randn(1, sum(lengths), n, size, device=DEVICE, generator=generator).to(BF16) for n in heads]
    leaves = [
        tensor.transpose(1, 2).requires_grad_() for tensor in made
    ]  # (1, heads, tokens, dim), as models have them
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    got, _ = qlora.varlen_attention(
        None, *leaves, None, scaling=size**-0.5, sliding_window=window, cu_seq_lens_q=starts, max_length_q=max(lengths)
    )
    assert got.shape == (1, sum(lengths), 8, size) and got.dtype == BF16
    grad = torch.randn(got.shape, device=DEVICE, generator=generator).to(BF16)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact, plain = row_by_row(wide, lengths, window), row_by_row(leaves, lengths, window)
    assert distance(got, exact.detach()) <= 2 * distance(plain, exact.detach()) + 1e-3
    ours, theirs = (torch.autograd.grad(out, leaves, grad) for out in (got, plain))
    for a, b, right in zip(ours, theirs, torch.autograd.grad(exact, wide, grad.double()), strict=True):
        assert distance(a, right) <= 2 * distance(b, right) + 1e-3


def row_by_row(tensors, lengths, window):
    """(1, tokens, heads, dim), with the mask written out."""
    pieces, start = [], 0
    for length in lengths:
        q, k, v = (t[:, :, start : start + length] for t in tensors)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        back = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
        seen = (back >= 0) & (back < (window or math.inf))
        pieces.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2))
        start += length
    return torch.cat(pieces, dim=1)


# ------------------------------------------------------------------------------------
# Steps: every adapter's gradient
# ------------------------------------------------------------------------------------

WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}  # heads of 64
LENGTHS = (200, 64, 64, 33, 120, 7)
VARIANTS = {  # family, its shape, flags, with norms in one kernel and liger-kernel's rotary embedding
    "llama nf4": ("llama", WIDE, {"bits": 4}, True),
    "llama_gqa nf4": ("llama_gqa", WIDE, {"bits": 4}, True),
    "llama_gqa nf4, torch's norms": ("llama_gqa", WIDE, {"bits": 4}, False),
    "llama_gqa fp4, whole": ("llama_gqa", WIDE, {"bits": 4, "quant_type": "fp4", "double_quant": False}, False),
    "llama_gqa 16 bit": ("llama_gqa", WIDE, {"bits": 16}, True),
    "qwen2 nf4, bias": ("qwen2", WIDE, {"bits": 4, "lora_bias": "lora_only"}, True),
    "qwen3 nf4": ("qwen3", {**WIDE, "head_dim": 64}, {"bits": 4}, True),
    "gemma nf4": ("gemma", {**WIDE, "head_dim": 64}, {"bits": 4}, True),
    "mistral nf4, window": ("mistral", {**WIDE, "sliding_window": 40}, {"bits": 4}, True),
}


def test_liger_kernels_functions_stay_in_one_model(models):
    """Another model of the family, such as a merged one on the CPU, must not run into Triton."""
    folder = models("llama_gqa", **WIDE)
    config = reference.parse(folder, bits=16, bf16=True)
    base = qlora.load_model(config, qlora.load_model_config(config, str(folder)), str(folder))
    family = vars(sys.modules[type(base).__module__])
    before, forward = dict(family), type(base.model.layers[0].self_attn).forward
    qlora.fuse_norms(base)
    assert qlora.fuse_rotary(base) is None
    assert {name for name, value in family.items() if before.get(name) is not value} == set()
    assert type(base.model.layers[0].self_attn).forward is forward
    rotary = base.model.layers[1].self_attn.forward.args[-1]
    assert rotary.func is qlora.rotate and base.model.norm.forward.func is qlora.rms_norm
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
        got = base(input_ids=ids.to(DEVICE)).logits.cpu()
    assert qlora.logits_close(expected, got.float(), dtype=torch.bfloat16)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_error_of_every_adapters_gradient_is_no_larger_than_pefts(models, variant):
    """Over eight steps; peft's layers, padded rows and whole logits on one side, everything fast on the other."""
    family, shape, flags, liger = VARIANTS[variant]
    flags = {"bf16": True, "lora_r": 16, **flags}
    folder = models(family, initializer_range=0.05, **shape)
    config, stock = reference.parse(folder, **flags), reference.load(folder, **flags).train()
    exact = reference.widen(reference.unpack(copy.deepcopy(stock)))
    steps = [reference.rows_of(LENGTHS, seed) for seed in range(8)]
    right = [reference.stock(exact, rows) for rows in steps]
    theirs = [reference.quick(stock, qlora.FastPath(), reference.step_of(rows), bf16=True) for rows in steps]

    with reference.counted() as calls:
        base = qlora.load_model(config, qlora.load_model_config(config, str(folder)), str(folder))
        if liger:
            qlora.fuse_norms(base)
            assert qlora.fuse_rotary(base) is None
        model = qlora.make_trainable(base, config, None).train()
        fast = qlora.enable_fast_path(model, base, config)
        assert fast.attention == qlora.VARLEN_ATTENTION and fast.head is not None and not fast.off
        calls.clear()
        ours = [reference.quick(model, fast, reference.step_of(rows), bf16=True) for rows in steps]
        one = {"FusedLoRA": 2 * 2, "FusedMLP": 2, "AddFrozen": 2, "attention": 2, "head": 1}  # of two layers
        assert calls == {name: 8 * count for name, count in one.items()}
        calls.clear()
        again = reference.quick(model, fast, reference.step_of(steps[0]), recomputed=2, bf16=True)
        assert calls == {name: count * (1 if name in ("AddFrozen", "head") else 2) for name, count in one.items()}
    assert max(reference.errors(again, ours[0]).values()) < 1e-2  # sums in another order at most
    assert all(abs(a.loss - b.loss) <= 2e-3 * b.loss for a, b in zip(ours, right, strict=True))
    ratios = {}
    mine, peft = ([reference.errors(a, b) for a, b in zip(results, right, strict=True)] for results in (ours, theirs))
    for name in mine[0]:
        ratios[name] = math.hypot(*(errors[name] for errors in mine)) / math.hypot(*(errors[name] for errors in peft))
    print(f"{variant}: ratio of errors {min(ratios.values()):.2f} to {max(ratios.values()):.2f}")
    assert max(ratios.values()) <= 1.1, ratios


def plain_experts(module, layers, x, chosen, shares):
    """A module of experts in the dtype of x, expert by expert."""

    def product(name, rows, expert):
        weight = qlora.stack_values(module._parameters[name], x.dtype)[expert]
        out = rows @ (weight if module.is_transposed else weight.T)
        if module.has_bias:
            out = out + getattr(module, f"{name}_bias")[expert].to(x.dtype)
        a, b = (factor[expert].to(x.dtype) for factor in qlora.expert_factors(layers[name], module.num_experts))
        return out + rows @ a.T @ b.T * layers[name].scaling["default"]

    out = torch.zeros_like(x)
    for expert in range(module.num_experts):
        tokens, places = (chosen == expert).nonzero().unbind(1)
        inner = module._apply_gate(product("gate_up_proj", x[tokens], expert))
        out = out.index_add(0, tokens, product("down_proj", inner, expert) * shares[tokens, places, None])
    return out


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_error_of_grouped_experts_is_no_larger_than_of_whole_stacks(models, family):
    """Output, input's gradient and every adapter's, of one layer on 300 tokens, against float64; an expert has none."""
    folder = models(family, hidden_size=256, initializer_range=0.05)
    config = reference.parse(folder, bits=4, bf16=True, lora_r=16)
    base = qlora.load_model(config, qlora.load_model_config(config, str(folder)), str(folder))
    model = qlora.make_trainable(base, config, None)
    assert qlora.group_experts(model) == []
    layer, layers = next(iter(qlora.adapted_experts(model).values()))
    module, generator = layer.get_base_layer(), torch.Generator(DEVICE).manual_seed(0)
    x, grad = (torch.randn(300, 256, device=DEVICE, dtype=BF16, generator=generator) for _ in range(2))
    scores = torch.rand(300, module.num_experts, device=DEVICE, dtype=BF16, generator=generator)
    scores[:, 1] = 0
    shares, chosen = scores.topk(2)

    def measured(forward, dtype):
        given = x.to(dtype, copy=True).requires_grad_()
        model.zero_grad()
        with torch.autocast(DEVICE, BF16, dtype == BF16):
            out = forward(module, layers, given, chosen, shares.to(dtype))
        out.backward(grad.to(out.dtype))
        factors = [p for p in layer.parameters() if p.requires_grad]  # the outer of two wrappers holds both adapters
        return [out.detach(), given.grad, *(p.grad.clone() for p in factors)]

    exact = measured(plain_experts, torch.float64)
    ways = (qlora.grouped_experts_forward, qlora.unpacked_experts_forward)
    ours, theirs = ([distance(a, b) for a, b in zip(measured(way, BF16), exact, strict=True)] for way in ways)
    print(family, ours, theirs)
    assert len(exact) == 6 and all(a <= 1.1 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


CUTS = {  # rows of a micro-batch or None, tokens, whether rows are padded, layers recomputed, whether rows are packed
    "accumulated": (1, qlora.NO_LIMIT, False, 0, False),
    "accumulated, padded": (2, qlora.NO_LIMIT, True, 0, False),
    "regrouped": (None, 260, False, 0, False),
    "regrouped, padded": (None, 260, True, 0, False),
    "packed": (1, qlora.NO_LIMIT, False, 0, True),
    "one layer of two recomputed": (None, qlora.NO_LIMIT, False, 1, False),
}


@pytest.mark.parametrize("family", ["llama_gqa", "gemma", "mistral"])
def test_however_a_step_is_cut_the_error_is_no_larger_than_pefts(models, family):
    """Padding-free, packed, regrouped, accumulated and recomputed, over eight steps, against float64."""
    shape = WIDE | {"gemma": {"head_dim": 64}, "mistral": {"sliding_window": 40}}.get(family, {})
    folder, flags = models(family, initializer_range=0.05, **shape), {"bits": 4, "bf16": True, "lora_r": 16}
    both = reference.make(folder, dtype=None, **flags)
    exact = reference.widen(reference.unpack(copy.deepcopy(both.stock)))
    squares: dict[str, float] = dict.fromkeys([*CUTS, "peft"], 0.0)
    for seed in range(8):
        rows = reference.rows_of(LENGTHS, seed)
        right = reference.stock(exact, rows)
        results = {"peft": reference.quick(both.stock, qlora.FastPath(), reference.step_of(rows), bf16=True)}
        for name, (at_once, tokens, padded, recomputed, packed) in CUTS.items():
            step = reference.step_of([{"pack": rows[i : i + 2]} for i in (0, 2, 4)] if packed else rows)
            parts = qlora.micro_batches(step, at_once, tokens, padded)
            fast = both.fast._replace(attention=None if padded else both.fast.attention)
            results[name] = reference.quick(both.quick, fast, step, parts, recomputed, bf16=True)
            assert abs(results[name].loss - right.loss) <= 2e-3 * right.loss
        for name, got in results.items():
            squares[name] += sum(error**2 for error in reference.errors(got, right).values())
    ratios = {name: math.sqrt(squares[name] / squares["peft"]) for name in CUTS}
    print(family, ratios)
    assert max(ratios.values()) <= 1.1, ratios


def test_the_error_in_8_bit_is_no_larger_than_pefts(models):
    """bitsandbytes rounds the layers' inputs to 8 bits too; ours does not."""
    folder = models("llama_gqa", initializer_range=0.05, **WIDE)
    flags = {"bits": 8, "bf16": True, "lora_r": 16}
    both = reference.make(folder, dtype=None, **flags)
    rows = reference.rows_of(LENGTHS)
    right = reference.stock(reference.widen(reference.unpack(reference.load(folder, **flags))).train(), rows)
    plain = reference.quick(both.stock, qlora.FastPath(), reference.step_of(rows), bf16=True)
    with reference.counted() as calls:
        fast = reference.quick(both.quick, both.fast, reference.step_of(rows), recomputed=2, bf16=True)
    assert calls["FusedLoRA"] and calls["FusedMLP"]
    ours, theirs = reference.errors(fast, right), reference.errors(plain, right)
    assert all(ours[name] <= 1.1 * theirs[name] for name in ours)


def test_dropout_draws_the_same_masks_again_when_a_layer_is_recomputed(models):
    folder = models("llama_gqa", initializer_range=0.05, **WIDE)
    both = reference.make(folder, dtype=None, bits=4, bf16=True, lora_dropout=0.1)
    reference.draw_alike(both.stock)
    step = reference.step_of(reference.rows_of(LENGTHS))
    results = []
    for model, layers in ((both.stock, 0), (both.quick, 0), (both.quick, 2)):
        torch.manual_seed(1)
        results.append(reference.quick(model, both.fast, step, recomputed=layers, bf16=True))
    torch.manual_seed(2)
    other = reference.quick(both.quick, both.fast, step, bf16=True)
    assert max(reference.errors(results[1], results[0]).values()) < 0.1
    assert max(reference.errors(results[2], results[1]).values()) < 1e-2
    assert min(reference.errors(other, results[0]).values()) > 0.1  # other masks


def test_weights_kept_dequantised_give_the_same_gradients(models):
    folder = models("llama_gqa", initializer_range=0.05, **WIDE)
    both = reference.make(folder, dtype=None, bits=4, bf16=True)
    step = reference.step_of(reference.rows_of(LENGTHS))
    packed = reference.quick(both.quick, both.fast, step, bf16=True)
    qlora.set_unpacked_layers(reference.base_of(both.quick), 2, BF16)
    dense = reference.quick(both.quick, both.fast, step, bf16=True)
    assert abs(packed.loss - dense.loss) <= 1e-5 * packed.loss
    assert max(reference.errors(dense, packed).values()) < 1e-2


def test_inputs_of_recomputed_layers_kept_in_cpu_memory_are_the_same(models):
    """Up to the noise of two equal passes; and the GPU holds two of them in place of eight."""
    folder = models("llama_gqa", initializer_range=0.05, **WIDE, num_hidden_layers=8)
    both = reference.make(folder, dtype=None, bits=4, bf16=True)
    step, results, peaks = reference.step_of(reference.rows_of([2000] * 8)), [], []
    for offload in (False, False, True):
        torch.cuda.reset_peak_memory_stats()
        results.append(reference.quick(both.quick, both.fast, step, recomputed=8, bf16=True, offload=offload))
        peaks.append(torch.cuda.max_memory_allocated())
    noise, difference = (max(reference.errors(other, results[0]).values()) for other in results[1:])
    print(f"offloaded against plain {difference:.2e}, plain against plain {noise:.2e}, peaks {peaks}")
    assert abs(results[2].loss - results[0].loss) <= 1e-5 * results[0].loss
    assert difference <= max(3 * noise, 1e-3)
    hidden = 16_000 * reference.base_of(both.quick).config.hidden_size * 2
    assert peaks[1] - peaks[2] > 4 * hidden


def test_the_trial_before_training_leaves_no_memory_behind(models):
    """Neither gradients nor an autograd graph nor another state of the generator."""
    folder = models("llama_gqa", initializer_range=0.05, **WIDE)
    config, model = reference.parse(folder, bits=4, bf16=True), reference.load(folder, bits=4, bf16=True)
    base, state, before = reference.base_of(model), torch.cuda.get_rng_state(), None
    qlora.enable_fast_path(model, base, config)
    for _ in range(2):
        fast = qlora.choose_fast_path(model, base, qlora.FastPath(), config)
        gc.collect()
        now = torch.cuda.memory_allocated()
        assert before is None or now <= before
        before = now
    assert fast.attention and fast.head is not None and torch.equal(torch.cuda.get_rng_state(), state)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_the_first_step_calibrates_the_prediction_and_leaves_nothing(models):
    """The calibrated prediction is within a tenth of what a larger step then takes."""
    folder = models("llama_gqa", initializer_range=0.05, **WIDE | {"num_hidden_layers": 8})
    both = reference.make(folder, dtype=None, bits=4, bf16=True)
    base = reference.base_of(both.quick)
    memory = qlora.memory_from_config(both.config, base.config)
    state, before = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    memory = qlora.measure_memory(memory, both.quick, base, both.fast, both.config)
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**20 and torch.equal(torch.cuda.get_rng_state(), state)
    torch.cuda.reset_peak_memory_stats()
    reference.quick(both.quick, both.fast, reference.step_of(reference.rows_of([500] * 64)), bf16=True)
    used = torch.cuda.max_memory_allocated() - before
    print(f"{used / 2**20:.0f} MiB used, {(memory.fixed + 32_000 * memory.per_token(0)) / 2**20:.0f} MiB predicted")
    assert used == pytest.approx(memory.fixed + 32_000 * memory.per_token(0), rel=0.15)


# ------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------

SLOW = {"fast_path": False, "recompute_layers": "none", "auto_batch": False}


def losses(run, name: str = "loss") -> torch.Tensor:
    return torch.tensor([e[name] for e in run.json("trainer_state.json")["log_history"] if name in e])


@pytest.fixture
def gpu_flags(models, tmp_path):
    """Flags of a run on the wide model, in bf16, on 96 rows of 100 to 300 tokens."""
    questions = [tiny.TEXT[31 * i : 31 * i + 40 + 3 * (i % 20)] for i in range(96)]
    rows = [{"input": text, "output": tiny.TEXT[7 * i : 7 * i + 60 + 2 * i]} for i, text in enumerate(questions)]
    return {
        "model_name_or_path": models("llama_gqa", initializer_range=0.05, **WIDE), "bf16": True,
        "dataset": tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows),
        "source_max_len": 200, "target_max_len": 300, "lora_r": 16, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4, "save_strategy": "no", "eval_dataset_size": 16,
    }  # fmt: skip


def test_fifty_steps_fast_and_stock_are_one_curve(run_qlora, tmp_path, gpu_flags):
    """As near to each other as two stock runs are whose sums alone come in another order, of other micro-batches."""
    flags = {**gpu_flags, "max_steps": 50, "learning_rate": 1e-3, "max_grad_norm": 1.0, "do_eval": True}
    with reference.counted() as calls:
        fast = run_qlora(output_dir=tmp_path / "fast", recompute_layers="all", **flags)
    assert all(calls[name] >= 50 for name in (*reference.FUNCTIONS, "head", "attention"))
    assert re.search(r"fast path +fused LoRA, padding-free rows, logits in chunks\n", fast.stderr)
    assert "not used" not in fast.stderr
    with reference.counted() as calls:
        slow = run_qlora(output_dir=tmp_path / "slow", **flags, **SLOW)
        other = run_qlora(output_dir=tmp_path / "other", **flags, **SLOW | {"auto_batch": True})
    assert not calls
    curve, stock, again = losses(fast), losses(slow), losses(other)
    assert len(curve) == 50 and curve[-1] < curve[0] - 1
    noise, away = ((its - stock).abs().mean() / stock.mean() for its in (again, curve))
    print(f"fast against stock {away:.2e}, stock against stock {noise:.2e}")
    assert away <= max(3 * noise, 2e-3)
    ours, theirs = (run.json("all_results.json") for run in (fast, slow))
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-2)
    assert ours["train_tokens"] == theirs["train_tokens"]


# Norms, rotary embeddings or positions of their own; scripts/check_models.py --gpu trains all classes.
CLASSES = ["qwen3_next", "qwen3_5_text", "gemma4_text", "glm4", "gpt_oss", "deepseek_v3", "nemotron_h", "falcon_mamba"]


@pytest.mark.parametrize("name", [*CLASSES, "granitemoehybrid", "recurrent_gemma", "masked/camembert"])
def test_a_class_trains_as_a_plain_loop_trains_it_on_the_cpu(run_qlora, tmp_path, name):
    masked, rows = name.startswith("masked/"), tiny.support_rows(4)
    base = tiny_classes.write_class(tmp_path / "base", name.rpartition("/")[2], masked)
    flags = {"dataset": tiny.rows_to_jsonl(tmp_path / "rows.jsonl", rows), "bits": 32}
    flags |= plain_loop.MASKED_FLAGS | {"objective": "mlm"} if masked else plain_loop.FLAGS
    run = run_qlora(model_name_or_path=base, **flags)
    difference = plain_loop.compare(run.output_dir, base, rows, masked=masked)
    assert run.code == 0 and difference.largest < 1e-4 and not difference.names


def test_memory_that_runs_out_is_not_the_end(run_qlora, tmp_path, gpu_flags, monkeypatch):
    """Really: the allocator may use little more than the weights and a few rows take."""
    flags = {**gpu_flags, "max_steps": 2, "per_device_train_batch_size": 32, "optim": "sgd", "learning_rate": 0.1}
    flags |= {"gradient_accumulation_steps": 2, "eval_dataset_size": 4}
    choose = qlora.choose_step_plan

    def too_large(*args):  # as if the plan had been wrong
        plan, lines = choose(*args)
        return plan._replace(rows=None, tokens=qlora.NO_LIMIT, recomputed=0, unpacked=0), lines

    monkeypatch.setattr(qlora, "choose_step_plan", too_large)
    enough = run_qlora(output_dir=tmp_path / "enough", **flags)
    assert enough.code == 0 and "memory ran out" not in enough.stderr
    peak = torch.cuda.max_memory_allocated()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    share = (before + 0.5 * (peak - before)) / total
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        short = run_qlora(output_dir=tmp_path / "short", **flags)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert short.code == 0 and "memory ran out" in short.stderr
    assert torch.allclose(losses(short), losses(enough), rtol=2e-3)
    got, expected = (load_file(run.output_dir / "adapter_model.safetensors") for run in (short, enough))
    for name, tensor in expected.items():
        assert (got[name] - tensor).norm() <= 0.02 * tensor.norm(), name
