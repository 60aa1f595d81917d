"""A model twice, as the libraries compute it and on the fast path, and the comparison of the two.

    both = reference.make(models("llama"), bits=4)
    expected = reference.stock(both.stock, rows)                             # row by row, peft's layers, whole logits
    got = reference.quick(both.quick, both.fast, reference.step_of(rows))    # padding-free, fused, in chunks
    reference.assert_equal(got, expected, 1e-9)

Used by test_fast_path.py on a CPU in float64 and by test_fast_path_gpu.py in bf16.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import qlora

IGNORE = qlora.IGNORE


class Pair(NamedTuple):
    stock: Any  # peft's model, its quantised weights dequantised
    quick: Any  # the same weights and adapters on the fast path
    fast: qlora.FastPath  # the parts that are on
    config: qlora.Config


class Result(NamedTuple):
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def parse(folder: Path, **flags: Any) -> qlora.Config:
    """A config; `init_lora_weights False` draws lora_B too: at zero lora_A would have no gradient."""
    flags = {"model_name_or_path": folder, "lora_r": 4, "init_lora_weights": False, **flags}
    return qlora.parse_config([word for name, value in flags.items() for word in (f"--{name}", str(value))])


def load(folder: Path, **flags: Any) -> Any:
    """A model with adapters as a run has it, not yet on the fast path."""
    config = parse(folder, **flags)
    base = qlora.load_model(config, qlora.load_model_config(config, str(folder)), str(folder))
    return qlora.make_trainable(base, config, None)


def make(folder: Path, model: Any = None, dtype: torch.dtype | None = torch.float64, **flags: Any) -> Pair:
    """Both models of one set of weights, in `dtype` wherever a weight is not packed; None leaves it as loaded."""
    config = parse(folder, **flags)
    model = load(folder, **flags) if model is None else model
    other = copy.deepcopy(model)
    if dtype == torch.float64:
        widen(unpack(other))
        widen(model)
    fast = qlora.enable_fast_path(model, base_of(model), config)
    return Pair(other.train(), model.train(), fast, config)


def base_of(model: Any) -> Any:
    """The model inside peft's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def unpack(model: Any) -> Any:
    """Adapted layers in 4 or 8 bits become ordinary linear layers of what their weights stand for."""
    from bitsandbytes.functional import dequantize_4bit

    for module in model.modules():
        weight = module.base_layer.weight if isinstance(module, LoraLayer) else None
        if weight is None or weight.is_floating_point():
            continue
        old = module.base_layer
        state = getattr(weight, "quant_state", None)
        values = dequantize_4bit(weight.data, state) if state else weight.data * (weight.SCB / 127)[:, None]
        new = torch.nn.Linear(old.in_features, old.out_features, old.bias is not None, device=weight.device)
        new.weight = torch.nn.Parameter(values.to(torch.promote_types(values.dtype, torch.float32)), False)
        if old.bias is not None:
            new.bias = old.bias
        module.base_layer = new
    return model


def widen(model: Any) -> Any:
    """Everything in float64, also the RMSNorms, which transformers computes in float32."""
    model.double()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = partial(_wide_norm, module)
    return model


def _wide_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    eps = getattr(module, "variance_epsilon", None) or module.eps
    weight = module.weight + 1 if "Gemma" in type(module).__name__ else module.weight
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


_softmax = F.softmax


def wide_softmax(x: torch.Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    """F.softmax, but float64 stays float64: transformers' eager attention asks for float32."""
    return _softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype, **kwargs)


class DrawnDropout(torch.nn.Module):
    """Dropout with the mask that torch.native_dropout draws, which is the fused functions'."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(x, self.p, self.training)[0]


def draw_alike(model: Any) -> Any:
    """Give peft's layers dropout that draws as the fused functions do, layer after layer."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, dropout in module.lora_dropout.items():
                module.lora_dropout[name] = DrawnDropout(dropout.p)
    return model


# ------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------


def rows_of(lengths: Sequence[int], seed: int = 0, vocabulary: int = 256) -> list[dict[str, list[int]]]:
    """Rows of these lengths: a third is prompt, the rest is supervised."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE] * (length // 3) + ids[length // 3 :]})
    return rows


def step_of(rows: Sequence[dict[str, Any]]) -> qlora.StepBatch:
    """The rows as the Trainer hands them out."""
    return qlora.collate_step(rows)["step"]


# ------------------------------------------------------------------------------------
# Loss and gradients
# ------------------------------------------------------------------------------------


def stock(model: Any, rows: Sequence[dict[str, Any]]) -> Result:
    """Row by row and without padding: nothing can see a neighbour. The mean over all supervised tokens, in float64."""
    total: Any = 0.0
    device = base_of(model).get_input_embeddings().weight.device
    for row in rows:
        ids, labels = (torch.tensor(row[name], device=device) for name in ("input_ids", "labels"))
        if len(ids) == 1:
            continue
        logits = model(input_ids=ids[None]).logits[0, :-1].double()
        total = total + F.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=IGNORE)
    total = total / supervised(step_of(rows))
    total.backward()
    return result_of(model, total)


def quick(
    model: Any,
    fast: qlora.FastPath,
    step: qlora.StepBatch,
    parts: Sequence[Sequence[int]] | None = None,
    recomputed: int = 0,
    side: str = "right",
    smoothing: float = 0.0,
    bf16: bool = False,
    offload: bool = False,
    small: bool = False,
) -> Result:
    """A step through the parts that `fast` names, in the micro-batches `parts`; one of all members if None.

    The loss is the mean over the step's supervised tokens, as in training; with `bf16` the products are in bf16.
    """
    base, total, items = base_of(model), 0.0, supervised(step)
    device = base.get_input_embeddings().weight.device
    if fast.body is not None:
        fast = fast._replace(body=base.base_model, head=base.get_output_embeddings())  # of this twin
    qlora.set_recomputed_layers(base, recomputed, offload, small=small)
    with qlora.attention_implementation(base, fast.attention):
        for members in [range(len(step.lengths))] if parts is None else parts:
            if fast.attention:
                batch = qlora.padding_free_batch(step, list(members))
            else:
                batch = qlora.padded_batch(step, list(members), 0, side)
            batch = qlora.to_device(batch, device)
            with torch.autocast(device.type, torch.bfloat16, bf16):
                total_of_batch = (
                    all_logits(model, batch) if fast.body is None else qlora.summed_loss(model, fast, batch, smoothing)
                )
            loss = total_of_batch * (1 / items)
            loss.backward()
            total = total + loss.detach()
    qlora.set_recomputed_layers(base, 0)
    return result_of(model, total)


def all_logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """What summed_loss does without a head, but logits in float64 stay that."""
    inputs = {name: value for name, value in batch.items() if name not in ("positions", "targets")}
    logits = model(**inputs).logits.flatten(0, 1)[batch["positions"]]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, batch["targets"], reduction="sum")


def supervised(step: qlora.StepBatch) -> int:
    """Tokens that the step's loss is the mean of."""
    return max(1, step.supervised)


def result_of(model: Any, loss: torch.Tensor) -> Result:
    """The loss and the gradient of everything that trains, which is forgotten."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, f"no gradient: {missing}"
    model.zero_grad(set_to_none=True)
    return Result(loss.detach(), gradients)


def errors(got: Result, expected: Result) -> dict[str, float]:
    """The relative error of every gradient, in norm."""
    assert got.gradients.keys() == expected.gradients.keys()
    pairs = {name: (got.gradients[name].double(), right.double()) for name, right in expected.gradients.items()}
    assert all(right.norm() > 0 for _, right in pairs.values())
    return {name: float((a - b).norm() / b.norm()) for name, (a, b) in pairs.items()}


def assert_equal(got: Result, expected: Result, tolerance: float) -> None:
    """Loss and every gradient within a relative error."""
    assert abs(got.loss.double() - expected.loss.double()) <= tolerance * abs(expected.loss.double())
    wrong = {name: error for name, error in errors(got, expected).items() if not error <= tolerance}
    assert not wrong, wrong


# ------------------------------------------------------------------------------------
# What really ran
# ------------------------------------------------------------------------------------

FUNCTIONS = ("FusedLoRA", "FusedMLP", "AddFrozen")


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the calls of each part of the fast path; `attention`, and `head`, which applies the head in chunks."""
    calls: Counter[str] = Counter()
    saved = {name: getattr(qlora, name).forward for name in (*FUNCTIONS, "ChunkedCrossEntropy")}
    attention = qlora.varlen_attention
    try:
        for name, forward in saved.items():
            counted_name = "head" if name == "ChunkedCrossEntropy" else name
            getattr(qlora, name).forward = staticmethod(partial(_count, calls, counted_name, forward))
        qlora.varlen_attention = partial(_count, calls, "attention", attention)  # which enable_fast_path registers
        ALL_ATTENTION_FUNCTIONS.register(qlora.VARLEN_ATTENTION, qlora.varlen_attention)
        yield calls
    finally:
        for name, forward in saved.items():
            getattr(qlora, name).forward = staticmethod(forward)
        qlora.varlen_attention = attention
        ALL_ATTENTION_FUNCTIONS.register(qlora.VARLEN_ATTENTION, qlora.varlen_attention)


def _count(calls: Counter[str], name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    calls[name] += 1
    return function(*args, **kwargs)
