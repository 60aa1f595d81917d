"""The fast path on a GPU, in bf16: kernels against float64, and whole steps and runs against the libraries' own.

    python -m pytest tests/test_fast_path_gpu.py

In bf16 no two ways of computing agree to the last digit, so both are compared with the same weights in float64, and
the error of ours may not be larger than 1.1 times theirs.
"""

import contextlib
import copy
import gc
import math
import re
import sys

import pytest
import reference
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import qlora

pytestmark = pytest.mark.gpu
DEVICE, BF16 = "cuda", torch.bfloat16


def assert_rounded(got: torch.Tensor, exact: torch.Tensor) -> None:
    """Float32's result rounded to bf16 once: half a unit in the last of its eight binary places at most."""
    assert got.dtype == BF16
    assert ((got.double() - exact).abs() <= 1.01 * 2**-8 * exact.abs() + 1e-5).all()


def distance(a: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, in norm."""
    return float((a.double() - exact).norm() / exact.norm())


@contextlib.contextmanager
def unpatched():
    """liger-kernel replaces functions in transformers' modules; put them back."""
    named = {
        name: module for name, module in sys.modules.items() if re.match(r"transformers\.models\..*\.modeling_", name)
    }
    kept = {name: dict(vars(module)) for name, module in named.items()}
    try:
        yield
    finally:
        for name, module in named.items():
            vars(module).update(kept[name])


# ------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_unpacked_weights_are_bitsandbytes_to_the_bit(quant_type, double_quant, dtype):
    """Whole layers of real models, and shapes that fill neither a block of 64 nor a group of 32 or 256 blocks."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for rows, columns in [
        (4096, 4096),
        (1024, 4096),
        (11008, 256),
        (8, 8),
        (1, 64),
        (33, 64),
        (257, 192),
        (3, 100),
        (5, 7),
    ]:
        for blocksize in (64, 128):
            weight = torch.randn(rows, columns, device=DEVICE, dtype=dtype)
            packed, state = quantize_4bit(
                weight, blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type
            )
            layer = torch.nn.Module()
            layer.weight = torch.nn.Parameter(packed, requires_grad=False)
            layer.weight.quant_state = state
            expected = dequantize_4bit(packed, state)
            got = qlora.dense_weight(layer, dtype)
            assert got.dtype == dtype and got.shape == (rows, columns)
            assert torch.equal(got, expected), (rows, columns, blocksize, (got - expected).abs().max())


def test_the_kernel_unpacks_where_it_can(monkeypatch):
    """Not bitsandbytes, which takes twice as long; a shape that does not fill its blocks is left to it."""
    from bitsandbytes.functional import quantize_4bit

    calls, plain = [], qlora.dequantize_4bit
    monkeypatch.setattr(qlora, "dequantize_4bit", lambda *args: calls.append(1) or plain(*args))
    for shape, expected in [((128, 64), 0), ((3, 100), 1)]:
        packed, state = quantize_4bit(torch.randn(shape, device=DEVICE, dtype=BF16), blocksize=64, quant_type="nf4")
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(packed, requires_grad=False)
        layer.weight.quant_state = state
        qlora.dense_weight(layer, BF16)
        assert len(calls) == expected


@pytest.mark.parametrize("count", [1, 1000, 2048, 3 * 2048 + 5])
@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh"])
def test_the_gated_kernel(name, count):
    """Values and gradients within one rounding to bf16 of what float64 gives."""
    from transformers.activations import ACT2FN

    act = qlora.gated_act(ACT2FN[name])
    assert act.kind is not None
    generator = torch.Generator(DEVICE).manual_seed(0)
    gate, up, grad = (
        (3 * torch.randn(count, device=DEVICE, generator=generator)).to(BF16),
        *(torch.randn(count, device=DEVICE, generator=generator).to(BF16) for _ in range(2)),
    )
    wide = [t.double().requires_grad_() for t in (gate, up)]
    exact = F.silu(wide[0]) * wide[1] if name == "silu" else F.gelu(wide[0], approximate="tanh") * wide[1]
    right = torch.autograd.grad(exact, wide, grad.double())
    got = act.product(gate, up)
    assert_rounded(got, exact.detach())
    for value, expected in zip(act.gradients(grad, gate, up), (exact.detach(), *right), strict=True):
        assert_rounded(value, expected)


@pytest.mark.parametrize("words", [5, 4096, 32000, 128256])
def test_the_cross_entropy_kernel(words):
    """Losses as of the same bf16 logits in float64; gradients within one rounding to bf16."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    tokens, width = 300, 64
    hidden = torch.randn(tokens, width, device=DEVICE, generator=generator).to(BF16).requires_grad_()
    weight = torch.randn(words, width, device=DEVICE, generator=generator).to(BF16)
    targets = torch.randint(words, (tokens,), device=DEVICE, generator=generator)
    loss = qlora.ChunkedCrossEntropy.apply(hidden, weight, None, targets, None, 0.0)
    (got,) = torch.autograd.grad(loss, hidden)

    logits = F.linear(hidden.detach(), weight).double().requires_grad_()  # bf16, as the kernel sees them
    right = F.cross_entropy(logits, targets, reduction="sum")
    assert loss.dtype == torch.float32 and abs(loss - right) <= 1e-5 * right
    (of_logits,) = torch.autograd.grad(right, logits)
    expected = of_logits @ weight.double()
    plain = of_logits.to(BF16) @ weight  # no way of rounding the logits' gradient is nearer
    error = (got - expected).norm() / expected.norm()
    assert error <= 1.1 * (plain - expected).norm() / expected.norm() + 1e-6


def test_cross_entropy_in_chunks_on_a_gpu_with_a_head_that_trains():
    """Several chunks (of 2**27 bytes of logits), a bias, a weight that wants a gradient: near the libraries' error."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    tokens, width, words = 1500, 64, 128256
    leaves = [
        (torch.randn(shape, device=DEVICE, generator=generator)).to(BF16).requires_grad_()
        for shape in ((tokens, width), (words, width), (words,))
    ]
    targets = torch.randint(words, (tokens,), device=DEVICE, generator=generator)
    assert 2**27 // (2 * words) < tokens / 2
    loss = qlora.ChunkedCrossEntropy.apply(*leaves, targets, None, 0.0)
    got = torch.autograd.grad(loss / tokens, leaves)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = F.cross_entropy(F.linear(*wide), targets)
    right = torch.autograd.grad(exact, wide)
    whole = F.cross_entropy(F.linear(*leaves).float(), targets)
    plain = torch.autograd.grad(whole, leaves)
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
VARIANTS = {  # family, its shape, flags, with liger-kernel's norms and rotary embedding
    "llama nf4": ("llama", WIDE, {"bits": 4}, True),
    "llama_gqa nf4": ("llama_gqa", WIDE, {"bits": 4}, True),
    "llama_gqa nf4, torch's norms": ("llama_gqa", WIDE, {"bits": 4}, False),
    "llama_gqa fp4, whole": ("llama_gqa", WIDE, {"bits": 4, "quant_type": "fp4", "double_quant": False}, False),
    "llama_gqa 16 bit": ("llama_gqa", WIDE, {"bits": 16}, True),
    "qwen2 nf4, bias": ("qwen2", WIDE, {"bits": 4, "lora_bias": "lora_only"}, True),
    "qwen3 nf4": ("qwen3", {**WIDE, "head_dim": 64}, {"bits": 4}, True),
    "gemma nf4": ("gemma", {**WIDE, "head_dim": 64}, {"bits": 4}, False),
    "mistral nf4, window": ("mistral", {**WIDE, "sliding_window": 40}, {"bits": 4}, True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_error_of_every_adapters_gradient_is_no_larger_than_pefts(models, variant):
    """Over eight windows; peft's layers, padded rows and all logits on one side, everything fast on the other."""
    family, shape, flags, liger = VARIANTS[variant]
    flags = {"bf16": True, "lora_r": 16, "liger": liger, **flags}
    folder = models(family, initializer_range=0.05, **shape)
    config, stock = reference.parse(folder, **flags), reference.load(folder, **flags).train()
    exact = reference.widen(reference.unpack(copy.deepcopy(stock)))
    windows = [reference.rows_of(LENGTHS, seed) for seed in range(8)]
    right = [reference.stock(exact, rows) for rows in windows]
    theirs = [reference.quick(stock, qlora.FastPath(), reference.window_of(rows), bf16=True) for rows in windows]

    with unpatched(), reference.counted() as calls:
        base = qlora.load_model(config, qlora.load_model_config(config, str(folder)), str(folder))
        qlora.apply_liger(base, config)
        model = qlora.make_trainable(base, config, None).train()
        fast = qlora.enable_fast_path(model, base, config)
        assert fast.attention == qlora.VARLEN_ATTENTION and fast.head is not None and fast.skips_last
        calls.clear()
        ours = [reference.quick(model, fast, reference.window_of(rows), bf16=True) for rows in windows]
        assert calls["FusedLoRA"] == 2 * 2 * 8 and calls["FusedMLP"] == calls["end_to_end_attention"] == 2 * 8
        assert calls["ChunkedCrossEntropy"] == 8
        again = reference.quick(model, fast, reference.window_of(windows[0]), recomputed=2, bf16=True)
        assert calls["again"] == 2
    assert max(reference.errors(again, ours[0]).values()) < 1e-2  # sums in another order at most
    assert all(abs(a.loss - b.loss) <= 2e-3 * b.loss for a, b in zip(ours, right, strict=True))
    ratios = {}
    mine, peft = ([reference.errors(a, b) for a, b in zip(found, right, strict=True)] for found in (ours, theirs))
    for name in mine[0]:
        ratios[name] = math.hypot(*(errors[name] for errors in mine)) / math.hypot(*(errors[name] for errors in peft))
    print(f"{variant}: ratio of errors {min(ratios.values()):.2f} to {max(ratios.values()):.2f}")
    assert max(ratios.values()) <= 1.1, ratios


CUTS = {  # rows of a micro-batch or None, tokens, whether rows are padded, layers recomputed, whether rows are packed
    "accumulated": (1, qlora.NO_LIMIT, False, 0, False),
    "accumulated, padded": (2, qlora.NO_LIMIT, True, 0, False),
    "regrouped": (None, 260, False, 0, False),
    "regrouped, padded": (None, 260, True, 0, False),
    "packed": (1, qlora.NO_LIMIT, False, 0, True),
    "one layer of two recomputed": (None, qlora.NO_LIMIT, False, 1, False),
}


@pytest.mark.parametrize("family", ["llama_gqa", "qwen2", "gemma", "mistral"])
def test_however_a_window_is_cut_the_error_is_no_larger_than_pefts(models, family):
    """Padding-free, packed, regrouped, accumulated and recomputed, over eight windows, against float64."""
    shape = WIDE | {"gemma": {"head_dim": 64}, "mistral": {"sliding_window": 40}}.get(family, {})
    folder, flags = models(family, initializer_range=0.05, **shape), {"bits": 4, "bf16": True, "lora_r": 16}
    both = reference.make(folder, dtype=None, **flags)
    exact = reference.widen(reference.unpack(copy.deepcopy(both.stock)))
    squares: dict[str, float] = dict.fromkeys([*CUTS, "peft"], 0.0)
    for seed in range(8):
        rows = reference.rows_of(LENGTHS, seed)
        right = reference.stock(exact, rows)
        found = {"peft": reference.quick(both.stock, qlora.FastPath(), reference.window_of(rows), bf16=True)}
        for name, (at_once, tokens, padded, recomputed, packed) in CUTS.items():
            window = reference.window_of([{"pack": rows[i : i + 2]} for i in (0, 2, 4)] if packed else rows)
            parts = qlora.micro_batches(window, at_once, tokens, padded)
            fast = both.fast._replace(attention=None if padded else both.fast.attention)
            found[name] = reference.quick(both.quick, fast, window, parts, recomputed, bf16=True)
            assert abs(found[name].loss - right.loss) <= 2e-3 * right.loss
        for name, got in found.items():
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
    plain = reference.quick(both.stock, qlora.FastPath(), reference.window_of(rows), bf16=True)
    with reference.counted() as calls:
        fast = reference.quick(both.quick, both.fast, reference.window_of(rows), recomputed=2, bf16=True)
    assert calls["FusedLoRA"] and calls["FusedMLP"]
    ours, theirs = reference.errors(fast, right), reference.errors(plain, right)
    assert all(ours[name] <= 1.1 * theirs[name] for name in ours)


def test_dropout_draws_the_same_masks_again_when_a_layer_is_recomputed(models):
    folder = models("llama_gqa", initializer_range=0.05, **WIDE)
    both = reference.make(folder, dtype=None, bits=4, bf16=True, lora_dropout=0.1)
    reference.draw_alike(both.stock)
    window = reference.window_of(reference.rows_of(LENGTHS))
    found = []
    for model, layers in ((both.stock, 0), (both.quick, 0), (both.quick, 2)):
        torch.manual_seed(1)
        found.append(reference.quick(model, both.fast, window, recomputed=layers, bf16=True))
    torch.manual_seed(2)
    other = reference.quick(both.quick, both.fast, window, bf16=True)
    assert max(reference.errors(found[1], found[0]).values()) < 0.1
    assert max(reference.errors(found[2], found[1]).values()) < 1e-2
    assert min(reference.errors(other, found[0]).values()) > 0.1  # other masks


def test_weights_kept_unpacked_give_the_same_gradients(models):
    folder = models("llama_gqa", initializer_range=0.05, **WIDE)
    both = reference.make(folder, dtype=None, bits=4, bf16=True)
    window = reference.window_of(reference.rows_of(LENGTHS))
    packed = reference.quick(both.quick, both.fast, window, bf16=True)
    qlora.set_unpacked_layers(reference.base_of(both.quick), 2, BF16)
    unpacked = reference.quick(both.quick, both.fast, window, bf16=True)
    assert abs(packed.loss - unpacked.loss) <= 1e-5 * packed.loss
    assert max(reference.errors(unpacked, packed).values()) < 1e-2


def graphed_step(both: reference.Twins, window: qlora.StepBatch) -> reference.Found:
    """Loss and gradients as a training step has them whose layers are CUDA graphs."""
    base, batch = (
        reference.base_of(both.quick),
        qlora.padding_free_batch(window, [*range(len(window.input_ids))], filled=True),
    )
    qlora.Graphed.begin()
    torch.manual_seed(1)
    with qlora.attention_implementation(base, both.fast.attention):
        with torch.autocast(DEVICE, BF16):
            batch = qlora.to_device(batch, torch.device(DEVICE))
            loss = qlora.summed_loss(both.quick, both.fast, batch) / reference.supervised(window)
        loss.backward()
    got = reference.found(both.quick, loss)
    return got._replace(gradients={name: gradient.clone() for name, gradient in got.gradients.items()})


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", ["llama_gqa", "mistral", "gemma3"])
def test_layers_as_cuda_graphs_give_the_gradients_of_layers_that_are_recomputed(models, family, dropout):
    """Two micro-batches of one shape and one of another, several times over: plain, recorded, replayed."""
    shape = WIDE | {"mistral": {"sliding_window": 40}, "gemma3": {"head_dim": 64, "sliding_window": 40}}.get(family, {})
    flags = {"bits": 4, "bf16": True, "lora_r": 16, "lora_dropout": dropout, "cuda_graphs": True}
    both = reference.make(models(family, initializer_range=0.05, **shape), dtype=None, **flags)
    assert both.fast.graphs
    windows = [
        reference.window_of(reference.rows_of(lengths, seed=i)) for i, lengths in enumerate([LENGTHS, (31, 9), (40, 2)])
    ]
    qlora.set_recomputed_layers(reference.base_of(both.quick), 2, both.fast)
    expected = [graphed_step(both, window) for window in windows]
    qlora.set_recomputed_layers(reference.base_of(both.quick), 2, both.fast, graphs=True)
    for turn in range(3):
        for window, right in zip(windows, expected, strict=True):
            got = graphed_step(both, window)
            assert abs(got.loss - right.loss) <= 1e-4 * right.loss, turn
            assert max(reference.errors(got, right).values()) < 1e-2, turn
    recorded = [passes for passes in qlora.Graphed.made.values() if passes]
    assert len(recorded) == 4  # two layers, two shapes
    if not dropout:
        unfilled = [reference.quick(both.quick, both.fast, window, recomputed=2, bf16=True) for window in windows]
        for a, b in zip(unfilled, expected, strict=True):
            assert max(reference.errors(a, b).values()) < 1e-2
    qlora.set_recomputed_layers(reference.base_of(both.quick), 0, both.fast)


# ------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------

SLOW = {
    "padding_free": False, "fused_lora": False, "chunked_head": False, "recompute_layers": "none", "liger": False,
    "auto_batch": False, "unpacked_layers": "none",
}  # fmt: skip


def losses(run, name: str = "loss") -> torch.Tensor:
    found = [entry[name] for entry in run.json("trainer_state.json")["log_history"] if name in entry]
    return torch.tensor(found)


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


@pytest.mark.parametrize("graphs", [False, True])
def test_fifty_steps_fast_and_stock_are_one_curve(run_qlora, tmp_path, gpu_flags, graphs):
    """As near to each other as two stock runs are whose sums alone come in another order, of other micro-batches."""
    flags = {**gpu_flags, "max_steps": 50, "learning_rate": 1e-3, "max_grad_norm": 1.0, "do_eval": True}
    with unpatched(), reference.counted() as calls:
        fast = run_qlora(output_dir=tmp_path / "fast", recompute_layers="all", cuda_graphs=graphs, **flags)
    assert ("2 layers recomputed in CUDA graphs" in fast.stderr) == graphs
    assert graphs or all(calls[name] >= 50 for name in (*reference.FUNCTIONS, "again", "end_to_end_attention"))
    with reference.counted() as calls:
        slow = run_qlora(output_dir=tmp_path / "slow", **flags, **SLOW)
        other = run_qlora(output_dir=tmp_path / "other", **flags, **SLOW | {"auto_batch": True})
    assert set(calls) <= {"Recompute", "again"}
    curve, stock, again = losses(fast), losses(slow), losses(other)
    assert len(curve) == 50 and curve[-1] < curve[0] - 1
    noise, away = ((its - stock).abs().mean() / stock.mean() for its in (again, curve))
    print(f"fast against stock {away:.2e}, stock against stock {noise:.2e}")
    assert away <= max(3 * noise, 2e-3)
    ours, theirs = (run.json("all_results.json") for run in (fast, slow))
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-2)
    assert ours["train_tokens"] == theirs["train_tokens"]


def test_memory_that_runs_out_is_not_the_end(run_qlora, tmp_path, gpu_flags, monkeypatch):
    """Really: the allocator may use little more than the weights and a few rows take."""
    flags = {**gpu_flags, "max_steps": 2, "per_device_train_batch_size": 32, "optim": "sgd", "learning_rate": 0.1}
    flags |= {"gradient_accumulation_steps": 2, "eval_dataset_size": 4}
    choose = qlora.choose_step_plan

    def too_large(*args):  # as if the plan had been wrong
        sizes, plan = choose(*args)
        return sizes._replace(rows=None, tokens=qlora.NO_LIMIT, recomputed=0, unpacked=0), plan

    monkeypatch.setattr(qlora, "choose_step_plan", too_large)
    flags["liger"] = False
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


def test_inputs_of_recomputed_layers_in_the_memory_of_the_cpu_are_the_same(models):
    """Bit for bit, and the GPU holds two of them in place of eight."""
    folder = models("llama_gqa", initializer_range=0.05, **WIDE, num_hidden_layers=8)
    config = reference.parse(folder, bits=4, bf16=True)
    model = reference.load(folder, bits=4, bf16=True).train()
    fast = qlora.enable_fast_path(model, reference.base_of(model), config)
    window, found, peaks = reference.window_of(reference.rows_of([2000] * 8)), [], []
    for offloads in (False, True, False):
        torch.cuda.reset_peak_memory_stats()
        found.append(reference.quick(model, fast._replace(offloads=offloads), window, recomputed=8, bf16=True))
        peaks.append(torch.cuda.max_memory_allocated())
    assert not qlora.Recompute.away and torch.equal(found[0].loss, found[1].loss)
    for name, gradient in found[0].gradients.items():
        assert torch.equal(gradient, found[2].gradients[name]) <= torch.equal(gradient, found[1].gradients[name]), name
    hidden = 16_000 * reference.base_of(model).config.hidden_size * 2
    assert peaks[0] - peaks[1] > 4 * hidden, peaks


def test_inputs_of_layers_below_all_that_trains_are_not_offloaded(models):
    """No backward pass comes there to fetch them: they would pile up, step after step."""
    folder = models("llama_gqa", initializer_range=0.05, **WIDE, num_hidden_layers=4)
    flags = {"bits": 4, "bf16": True, "layers_to_freeze": 2}
    config, model = reference.parse(folder, **flags), reference.load(folder, **flags).train()
    fast = qlora.enable_fast_path(model, reference.base_of(model), config)._replace(offloads=True)
    reference.quick(model, fast, reference.window_of(reference.rows_of([200] * 8)), recomputed=4, bf16=True)
    assert not qlora.Recompute.away


def test_a_try_before_training_leaves_no_memory_behind(models):
    """Neither gradients nor a tape nor another state of the generator."""
    folder = models("llama_gqa", initializer_range=0.05, **WIDE)
    config = reference.parse(folder, bits=4, bf16=True)
    model = reference.load(folder, bits=4, bf16=True)
    state, before = torch.cuda.get_rng_state(), None
    for _ in range(2):
        fast = qlora.choose_fast_path(model, reference.base_of(model), config)
        gc.collect()
        now = torch.cuda.memory_allocated()
        assert before is None or now <= before
        before = now
    assert fast.skips_last and torch.equal(torch.cuda.get_rng_state(), state)
    assert not any(parameter.grad is not None for parameter in model.parameters())
