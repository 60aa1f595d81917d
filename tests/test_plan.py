"""The plan: what a run takes, from the shapes alone; packs of rows."""

import contextlib
import functools
import itertools
import json
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import reference
import tiny
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

import qlora

GIB, RECIPES = 2**30, Path(qlora.__file__).with_name("examples") / "recipes"
LLAMA = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_key_value_heads": 8},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_key_value_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_key_value_heads": 8},
}
COMMON = ("--bf16", "--lora_dtype", "bfloat16", "--source_max_len", "16", "--target_max_len", "512")


FULL = ("--full_finetune", "--bits", "16", "--optim", "adamw_torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with nothing but the config of a LLaMA of some size."""

    @functools.cache
    def make(size):
        path, heads = tmp_path_factory.mktemp(size), 64 if size == "70b" else 32
        config = {"model_type": "llama", "num_attention_heads": heads, "vocab_size": 32000, **LLAMA[size]}
        (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        return str(path)

    return make


def parse(model, *flags):
    return qlora.parse_config(["--model_name_or_path", model, *COMMON, "--plan", *flags])


@functools.cache
def memory_of(model, *flags):
    """The memory of a model with these flags."""
    return qlora.memory_from_config(config := parse(model, *flags), qlora.load_model_config(config, model))


def plan_of(model, gpu, *flags):
    """The table of `--plan`, and whether the run fits."""
    return qlora.plan_from_flags(parse(model, "--plan_gpu", gpu, *flags), memory_of(model, *flags))


def number(line: str) -> float:
    return float(line.split()[0])


def test_weights_are_counted_from_the_shapes(folder):
    memory = memory_of(folder("7b"))
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert memory.weights == pytest.approx(linear * 4.126953125 / 8, rel=1e-6)
    assert memory.other == (2 * 32000 * 4096 + 65 * 4096) * 2
    assert memory.adapters == memory.gradients == 64 * 32 * (4 * 8192 + 3 * (4096 + 11008)) * 2
    assert memory.unpacked == linear * 2 // 32 and memory.checkpoint == 4096 * 2
    kept = 8 * 4096 + 2 * 11008 + 7 * 64  # q, k, v, gate, up, the inputs of two norms and three blocks of products
    assert memory.layer == pytest.approx(111_000, rel=0.01) and memory.layer == 2 * kept
    lines, _ = plan_of(folder("7b"), "140GiB")
    assert number(lines["weights of the linear layers"]) == 3.11 and number(lines["embedding, head, norms"]) == 0.49
    plain = memory_of(folder("7b"), "--double_quant", "False").weights
    assert plain == pytest.approx(linear * 4.5 / 8, rel=1e-6)


@pytest.mark.parametrize(
    ("gpu", "flags", "measured"),
    [
        ("38GiB", ("--recompute_layers", "none"), 32.31),  # too small for dequantised copies
        ("140GiB", ("--recompute_layers", "none"), 44.38),
        ("140GiB", ("--recompute_layers", "all"), 7.30),
        ("140GiB", ("--recompute_layers", "all", "--auto_batch", "False"), 4.43),
        ("140GiB", ("--recompute_layers", "none", *FULL), 18.0),
    ],
)
def test_the_prediction_is_within_a_tenth_of_what_an_h200_measured(folder, gpu, flags, measured):
    """16 x 528 tokens at once, or 1 x 528; peaks of torch's allocator on LLaMAs of 7B and, trained in full, 1.1B."""
    lines, fits = plan_of(folder("1b" if "--full_finetune" in flags else "7b"), gpu, *flags)
    assert number(lines["predicted peak"]) == pytest.approx(measured, rel=0.1) and fits
    parts = [number(line) for name, line in list(lines.items())[1:9]]
    assert sum(parts) == pytest.approx(number(lines["predicted peak"]), abs=0.05)
    assert number(lines["in all"]) == pytest.approx(
        number(lines["predicted peak"]) + number(lines["beside it"]), abs=0.02
    )


@pytest.mark.parametrize("size", ["1b", "7b"])
def test_more_memory_is_never_slower(folder, size):
    config, memory = parse(folder(size)), memory_of(folder(size))
    rooms = [(gib - qlora.CONTEXT) * GIB - memory.resident() for gib in (5.5, 6, 8, 12, 16, 24, 40, 80, 140)]
    plans = [qlora.search_step_plan(memory, room, 528, 8448, config) for room in rooms]
    # tokens computed, at 500 more for each micro-batch, times what recomputation adds
    costs = [(8448 + 500 * -(-8448 // p.tokens)) * (1 + 0.4 * p.recomputed / memory.layers) for p in plans]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]
    assert plans[0].recomputed > 0 or size == "1b"
    assert plans[-1] == qlora.StepPlan(None, 8448, 0, memory.layers)


def test_the_plan_keeps_to_the_flags(folder):
    model = folder("7b")
    for flags, name, wanted in (
        (("--recompute_layers", "5"), "recomputed", "5 of 32 layers"),
        (("--gradient_checkpointing", "False"), "recomputed", "0 of 32 layers"),
        (("--auto_batch", "False"), "micro-batch", "528 tokens"),
        (("--fast_path", "False"), "kept dequantised", "0 of 32 layers"),
    ):
        assert plan_of(model, "140GiB", *flags)[0][name] == wanted
    lines, _ = plan_of(model, "40GiB", "--auto_batch", "False")  # one row at once takes 2 GiB of 40
    assert (lines["recomputed"], lines["kept dequantised"]) == ("0 of 32 layers", "32 of 32 layers")


def test_the_optimizers_pages_are_moved_out_where_memory_is_short(folder):
    model, flags = folder("7b"), ("--recompute_layers", "all", "--lora_dtype", "float32")
    beside = [plan_of(model, gpu, *flags)[0]["beside it"] for gpu in ("140GiB", "6.3GiB")]
    assert "the optimizer's pages stay" in beside[0] and "the optimizer's pages move out" in beside[1]
    lines, _ = plan_of(model, "140GiB", *flags, "--optim", "adamw_torch")
    assert "pages" not in lines["beside it"] and number(lines["optimizer"]) > 1


def test_the_command_prints_the_plan_and_reads_nothing_else(folder, capsys, tmp_path):
    model, out = folder("7b"), tmp_path / "out"
    words = ["--model_name_or_path", model, "--dataset", str(tmp_path / "none"), "--bf16", "--plan"]
    assert qlora.main([*words, "--plan_gpu", "24GiB", "--output_dir", str(out)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("predicted peak", "recomputed", "micro-batch", "fits")) and not out.exists()
    assert qlora.main([*words, "--plan_gpu", "4GiB"]) == 3
    assert "does not fit into 4 GiB" in capsys.readouterr().out
    for text in ("H100", "8x80GiB", "a lot", "-1GiB", "24", "24GB"):
        assert qlora.main([*words, "--plan_gpu", text]) == 2
        assert "--plan_gpu" in capsys.readouterr().err


def test_a_plan_that_does_not_fit_names_changes_that_do(folder, capsys):
    """At 1.1B adapters of rank 1,024 with gradients and averages are 12 GiB, and half of that at 512."""
    words = ["--model_name_or_path", folder("1b"), "--bf16", "--plan", "--plan_gpu", "9GiB", "--optim", "adamw_torch"]
    assert qlora.main([*words, "--lora_r", "1024"]) == 3
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "would fit with" in line)
    assert line.split(maxsplit=3)[3].split("; ") == ["--lora_r 512", "2 such GPUs"]
    assert qlora.main([*words, "--lora_r", "512"]) == 0
    words.remove("--bf16")  # 1.1B weights are 4.1 GiB in float32 and half of that in bf16
    assert qlora.main([*words, "--bits", "16", "--plan_gpu", "4GiB"]) == 3
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "would fit with" in line)
    assert line.split(maxsplit=3)[3].split("; ")[:2] == ["--bf16 True", "--bits 8"]
    # the inputs of 22 layers of width 2,048 are 1.9 GiB at 22,000 tokens in bf16
    words = [*words[:2], "--bf16", *words[2:], "--source_max_len", "16000", "--target_max_len", "6000"]
    assert qlora.main([*words, "--plan_gpu", "5GiB"]) == 3
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "would fit with" in line)
    assert "--offload_activations True" in line
    assert qlora.main([*words, "--plan_gpu", "5GiB", "--offload_activations"]) == 0


@pytest.mark.parametrize(
    ("flags", "refused"), [("--init_lora_weights pissa", "--bits"), ("--fsdp full_shard", "--bits 8")]
)
def test_a_plan_names_no_change_that_the_flags_refuse(folder, capsys, flags, refused):
    words = ["--model_name_or_path", folder("1b"), "--bf16", "--bits", "16", "--plan", "--plan_gpu", "2GiB"]
    assert qlora.main([*words, *flags.split()]) == 3
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "would fit with" in line)
    assert refused not in line


def test_a_plan_with_a_dataset_names_the_recipe_once(models, data_dir, capsys):
    flags = f"--model_name_or_path={models('llama')} --dataset={data_dir / 'support.jsonl'} --plan_gpu=24GiB"
    assert qlora.main(["--plan", "--recipe=modern", *flags.split()]) == 0
    assert capsys.readouterr().err.count("--recipe modern: ") == 1


def test_a_plan_with_a_dataset_has_rows_steps_and_time(models, tmp_path, capsys):
    """10 rows of BOS + 9 bytes + 9 bytes + EOS: 50 million steps of 2 rows are 2 billion tokens."""
    rows = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [{"input": "a" * 9, "output": "b" * 9}] * 10)
    (tmp_path / "out").mkdir()
    flags = {"model_name_or_path": models("llama"), "dataset": rows, "output_dir": tmp_path / "out"}
    flags["max_steps"] = 50_000_000
    flags |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "plan_gpu": "24GiB"}
    words = ["--plan", *(f"--{name}={value}" for name, value in flags.items())]
    assert qlora.main(words) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["rows", "10 of 20 tokens on average"] in lines and [
        "steps",
        "50,000,000, which is 10,000,000 epochs",
    ] in lines
    (time,) = (line[1] for line in lines if line[0] == "time")
    seconds, rate = re.fullmatch(
        r"0:00:(\d\d) at ([\d,]+) tokens/s \(assumed, as on an H200 with --bf16\)", time
    ).groups()
    assert int(seconds) == round(2e9 / int(rate.replace(",", ""))) > 0
    assert not list((tmp_path / "out").iterdir())


SHAPES = {  # of the recipes' models, as published: type, width, of the MLP, layers, heads, of keys, size, vocabulary
    "smollm2": ("llama", 2048, 8192, 24, 32, 32, 64, 49152),
    "llama3": ("llama", 3072, 8192, 28, 24, 8, 128, 128256),
    "qwen3": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936),
    "gemma3": ("gemma3_text", 1152, 6912, 26, 4, 1, 256, 262144),
}
NAMES = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "vocab_size")  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_recipe_says_what_is_planned(tmp_path, name):
    recipe, said = RECIPES / f"{name}.yaml", (RECIPES / f"{name}.yaml").read_text().replace("\n# ", " ")
    shape = dict(zip(NAMES, SHAPES[name], strict=True)) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    words = [str(recipe), "--model_name_or_path", str(tmp_path), "--plan", "--plan_gpu"]
    config = qlora.parse_config([*words, "24GiB"])
    memory = qlora.memory_from_config(config, qlora.load_model_config(config, str(tmp_path)))
    planned = float(re.search(r"on a GPU of 24 GiB ([\d.]+) GiB, with nothing recomputed", said)[1])
    lines, fits = qlora.plan_from_flags(config, memory)
    assert (
        fits and lines["recomputed"].startswith("0 of") and number(lines["in all"]) == pytest.approx(planned, abs=0.1)
    )
    least = float(re.search(r"at least ([\d.]+) GiB, with one row at a time", said)[1])
    small = (qlora.parse_config([*words, f"{least + more:.2f}GiB"]) for more in (-0.1, 0.11))
    assert [qlora.plan_from_flags(each, memory)[1] for each in small] == [False, True]


def test_a_plan_without_a_gpu_names_the_way_out(folder, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert qlora.main(["--model_name_or_path", folder("1b"), "--plan"]) == 2
    assert "--plan_gpu 24GiB" in capsys.readouterr().err


@pytest.fixture
def gpus(monkeypatch):
    """Return a function that pretends there are GPUs: `gpus(total, free, reserved, allocated, share)`, in GiB."""

    def pretend(total, free, reserved=0.0, allocated=0.0, share=1.0):
        answers = {"is_available": True, "device_count": 2, "mem_get_info": (free * GIB, total * GIB)}
        answers |= {"memory_reserved": reserved * GIB, "memory_allocated": allocated * GIB}
        answers |= {"get_per_process_memory_fraction": share}
        answers["get_device_properties"] = SimpleNamespace(total_memory=total * GIB)
        for function, answer in answers.items():
            monkeypatch.setattr(f"torch.cuda.{function}", lambda *args, answer=answer: answer)

    return pretend


def test_a_process_with_a_share_of_the_gpu_plans_for_that(gpus, folder):
    """80 GiB, of which a quarter is this process's: it holds 6, reserved 8, and another process 30."""
    config = parse(folder("1b"))
    for share, free, whole in ((1.0, 44, 80), (0.25, 14, 20 + qlora.CONTEXT)):
        gpus(80, free=42, reserved=8, allocated=6, share=share)
        assert qlora.free_memory() == free * GIB and qlora.gpu_gib(config) == pytest.approx(whole)


def test_layers_on_several_gpus_of_one_process_have_the_memory_of_all(gpus, folder, monkeypatch):
    """70B in 4 bits, 35 GiB of layers and head: on two GPUs whose share for this process is 24 GiB each."""
    config, memory = parse(folder("70b")), memory_of(folder("70b"))
    gpus(140, free=130, allocated=17.5, reserved=17.5, share=24 / 140)
    monkeypatch.setattr(config.training, "use_cpu", False)
    monkeypatch.setattr(qlora, "measure_memory", lambda memory, *args: memory)
    plans = []
    for count in (1, 2):
        base = torch.nn.Module()
        places = [SimpleNamespace(device=torch.device("cuda", gpu)) for gpu in range(count)]
        base.parameters = lambda places=places, **options: iter(places)
        rows = {"length": [528] * 4}
        plans.append(qlora.choose_step_plan(memory, base, base, qlora.FastPath(), rows, config))
    (one, alone), (two, both) = plans
    half = pytest.approx(number(alone["weights of the linear layers"]) / 2, abs=0.01)
    assert number(both["weights of the linear layers"]) == half
    assert one.peak > 24 > two.peak and two.recomputed > 0


@pytest.mark.parametrize(("engine", "optimizer"), [("FSDP", 1), ("ZeRO-2", 1), ("full ZeRO-2", 3)])
def test_what_engines_shard(folder, monkeypatch, engine, optimizer):
    """FSDP everything, ZeRO-2 what trains; they step on a float32 copy of 16-bit weights, with float32 averages."""
    model, flags = folder("7b"), FULL if optimizer == 3 else ()
    config, memory = parse(model, *flags), memory_of(model, *flags)
    monkeypatch.setattr(qlora, "is_sharded", lambda config: True)
    config.training.fsdp = engine == "FSDP"
    part = memory.shared(config, 8)
    assert part.weights == memory.weights // (8 if engine == "FSDP" else 1)
    assert (part.gradients, part.optimizer) == (memory.gradients // 8, memory.optimizer // 8 * optimizer)
    assert part.fixed > memory.fixed and part.unpacked == 0, "two layers are whole at a time"
    for gib in (6, 12, 24, 48, 96):
        plan = qlora.search_step_plan(part, gib * GIB, 528, 8448, config)
        assert plan.recomputed in (0, 32), "an engine's hooks want all layers or none"


def run_out_of_memory(summed_loss, *args):
    summed_loss(*args)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_the_first_step_calibrates_the_prediction(models, gpus, monkeypatch):
    """Two steps that take twice the memory; one that runs out of it leaves the prediction. No trace of either stays."""
    both = reference.make(models("llama"), dtype=None, bits=16)
    base = reference.base_of(both.quick)
    memory = qlora.memory_from_config(both.config, base.config)
    gpus(24, free=20)
    fixed = memory.gradients + memory.fixed  # what does not grow with the tokens is left out
    used = itertools.cycle([fixed + 2 * count * memory.per_token(0) for count in (128, 512)])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: next(used))
    monkeypatch.setattr("torch.autocast", lambda *args: contextlib.nullcontext())
    state = torch.get_rng_state()
    got = qlora.measure_memory(memory, both.quick, base, both.fast, both.config)
    assert (got.token, got.layer) == (2 * memory.token, 2 * memory.layer) and got.weights == memory.weights
    monkeypatch.setattr(qlora, "summed_loss", functools.partial(run_out_of_memory, qlora.summed_loss))
    assert qlora.measure_memory(memory, both.quick, base, both.fast, both.config) == memory
    assert torch.equal(torch.get_rng_state(), state)
    assert not [parameter for parameter in both.quick.parameters() if parameter.grad is not None]


def test_of_each_gpu_the_first_layers_are_recomputed(models):
    """Of five layers three are on the first."""
    model = reference.load(models("llama", num_hidden_layers=5), bits=16)
    layers = qlora.decoder_layers(model)
    for count, wanted in ((0, ""), (1, "0"), (2, "03"), (3, "013"), (4, "0134"), (5, "01234")):
        for i, layer in enumerate(layers):
            place = [SimpleNamespace(device=torch.device("cuda", i // 3), requires_grad=True)]
            layer.parameters = lambda place=place: iter(place)
        qlora.set_recomputed_layers(model, count)
        assert [i for i, layer in enumerate(layers) if layer.gradient_checkpointing] == [*map(int, wanted)]


# ------------------------------------------------------------------------------------
# What a layer keeps
# ------------------------------------------------------------------------------------


class ThinNorm(torch.autograd.Function):
    """Keep what liger-kernel's RMSNorm keeps: its input in its own width."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


WIDE = {"hidden_size": 256, "intermediate_size": 704}
KEPT = {  # family, shape, flags, tolerance
    "llama": ("llama", WIDE, {}, 0.03),
    "grouped queries": ("llama_gqa", WIDE, {}, 0.03),
    "qwen3, norms on heads": ("qwen3", WIDE | {"head_dim": 64}, {}, 0.05),
    "gemma3, four norms a layer": ("gemma3", WIDE | {"head_dim": 64, "sliding_window": 512}, {}, 0.05),
    "olmo2, norms on all heads": ("olmo2", WIDE, {}, 0.05),
    "pythia, no gate": ("gpt_neox", {"hidden_size": 256, "intermediate_size": 1024}, {}, 0.15),
    "peft's functions": ("llama_gqa", WIDE, {"fast_path": False}, 0.1),
    "peft's functions in bf16": ("llama_gqa", WIDE, {"fast_path": False, "lora_dtype": "bfloat16"}, 0.15),
    "adapters on attention": ("llama_gqa", WIDE, {"lora_modules": "attn"}, 0.15),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_layer_keeps_as_many_bytes_of_a_token_as_is_planned(models, monkeypatch, case):
    """Count what autograd saves of a layer in bf16, each tensor's memory once."""
    family, shape, flags, tolerance = KEPT[case]
    norm, kept = F.layer_norm, []
    # as autocast has it on a GPU
    monkeypatch.setattr(F, "layer_norm", lambda x, n, w, b, eps: norm(x.float(), n, w.float(), b.float(), eps))
    for layers in (1, 3):
        both = reference.make(
            models(family, **shape, num_hidden_layers=layers), dtype=None, bits=16, bf16=True, use_cpu=True, **flags
        )
        base, seen = reference.base_of(both.quick), {}
        for module in base.modules():
            if "RMSNorm" in type(module).__name__ and both.config.training.fast_path:
                module.forward = ThinNorm.apply
        weights = {parameter.untyped_storage().data_ptr() for parameter in both.quick.parameters()}

        def save(tensor, seen=seen):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, so that no address comes again
            return tensor

        step = reference.step_of(reference.rows_of([256]))
        batch = (
            qlora.padding_free_batch(step, [0]) if both.fast.attention else qlora.padded_batch(step, [0], 0, "right")
        )
        hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
        with qlora.attention_implementation(base, both.fast.attention), torch.autocast("cpu", torch.bfloat16), hooks:
            qlora.summed_loss(both.quick, both.fast, batch)
        kept.append(sum(size for address, (size, _) in seen.items() if address not in weights))
    counted = (kept[1] - kept[0]) / 2 / 256
    memory = qlora.memory_from_config(both.config, base.config)
    print(f"{case}: {counted:.0f} bytes counted, {memory.layer} planned")
    assert memory.layer == pytest.approx(counted, rel=tolerance)


def test_of_stacked_experts_a_token_meets_a_few(tmp_path):
    """Mixtral 8x7B: the experts, of 90 GB in 16 bit, are packed; two of eight keep inputs and outputs."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    memory = memory_of(str(tmp_path))
    experts = 32 * 8 * 3 * 4096 * 14336
    assert memory.experts == pytest.approx(experts * (0.5 + 1 / 64 + 4 / 64 / 256), rel=1e-6)
    assert memory.other < experts / 10 and memory.layer > 2 * 2 * 3 * 14336
    assert memory.layer < 8 * 2 * 3 * 14336
    lines, fits = plan_of(str(tmp_path), "24GiB")
    assert number(lines["experts"]) == 21.67 and number(lines["embedding, head, norms"]) < 1 and not fits


@pytest.mark.parametrize(("bits", "said"), [(4, False), (8, True), (16, False)])
def test_experts_that_are_not_quantised_are_named_before_training(models, caplog, bits, said):
    """In GiB: two layers with four experts of three matrices, in float32 on a CPU. Attention is quantised."""
    caplog.set_level("WARNING", "qlora")
    model = reference.load(models("mixtral", intermediate_size=8192), bits=bits)
    lines = [record.getMessage() for record in caplog.records if "experts" in record.getMessage()]
    assert len(lines) == said
    if said:
        assert "4 tensors of experts" in lines[0] and "float32" in lines[0]
        assert f"{2 * 4 * 3 * 64 * 8192 * 4 / GIB:.2f} GiB" in lines[0]
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("q_proj.base_layer")}
    assert kinds == {{4: "Linear4bit", 8: "Linear8bitLt", 16: "Linear"}[bits]}


# ------------------------------------------------------------------------------------
# New tokens: peft computes with a copy of the matrix
# ------------------------------------------------------------------------------------
class LargeTensors(TorchDispatchMode):
    """Bytes of the tensors of at least `least` bytes that are made, and of those that are there at once."""

    def __init__(self, least, parameters):
        super().__init__()
        self.least, self.there, self.peak = least, {}, 0
        self.others = {parameter.untyped_storage()._cdata for parameter in parameters}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage and storage.nbytes() >= self.least and storage._cdata not in {*self.others, *self.there}:
                self.there[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.there.pop, storage._cdata)
                self.peak = max(self.peak, sum(self.there.values()))
        return out


@pytest.mark.parametrize(("vocabulary", "tokens"), [(4096, 8), (2**16, 512)])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_new_tokens_copy_the_head(models, vocabulary, tokens, tie, whole):
    """The copy is there beside its gradient, or three chunks of logits; whole logits are a token's."""
    model = AutoModelForCausalLM.from_pretrained(models("llama", tie=tie, vocab_size=vocabulary, hidden_size=16))
    config, tokenizer = qlora.parse_config(["--bits", "32", "--add_tokens", "<cup>,<saucer>"]), tiny.byte_tokenizer()
    qlora.set_special_tokens(tokenizer, config, model.config)
    counted = qlora.memory_from_config(config, model.config)
    plain = qlora.memory_from_config(qlora.parse_config(["--bits", "32"]), model.config)
    adapted = qlora.make_trainable(model, config, None, tokenizer=tokenizer)
    trained = sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
    assert counted.adapters == counted.gradients == trained == plain.adapters + 2 * 16 * 4 * (2 - tie)
    fast = qlora.FastPath() if whole else qlora.FastPath(body=model.model, head=model.get_output_embeddings())
    batch = {"input_ids": torch.ones(1, tokens, dtype=torch.long), "positions": torch.arange(tokens)}
    table = vocabulary * 16 * 4
    with LargeTensors(table, model.parameters()) as live:
        qlora.summed_loss(adapted.train(), fast, batch | {"targets": torch.ones(tokens, dtype=torch.long)}).backward()
    logits = 2**27 if tokens == 512 else 0
    assert live.peak == max(2 * table, table + 3 * logits) and not live.there
    assert counted.fixed - plain.fixed == table + 2**28


def test_of_a_large_head_the_gradient_is_more_than_the_logits():
    """512 MiB each, for 256 of the logits."""
    model_config = LlamaConfig(vocab_size=2**18, hidden_size=512, intermediate_size=512, num_hidden_layers=1)
    configs = (qlora.parse_config(["--bits", "32", *flags]) for flags in (["--add_tokens", "<cup>"], []))
    counted, plain = (qlora.memory_from_config(config, model_config).fixed for config in configs)
    assert counted - plain == 2 * 2**29


# ------------------------------------------------------------------------------------
# Packs
# ------------------------------------------------------------------------------------


class Rows(dict):
    """Columns of rows, by name or number, as a dataset has them."""

    def __len__(self):
        return len(self["length"])

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else {n: column[key] for n, column in self.items()}


def test_packs_hold_every_row_once_and_keep_the_limit():
    lengths = [7, 1, 3, 10, 5, 5, 2, 9, 4, 4, 30]
    rows = Rows(length=lengths, input_ids=[[i] * n for i, n in enumerate(lengths)])
    packs = qlora.PackedRows(rows, limit=10)
    assert sorted(i for pack in packs.packs for i in pack) == list(range(11))
    assert packs.lengths == [sum(lengths[i] for i in pack) for pack in packs.packs] == packs["length"]
    assert all(length <= 10 or pack == [10] for length, pack in zip(packs.lengths, packs.packs, strict=True))
    assert len(packs) == 6, "50 tokens in packs of 10, and the row that is longer than the limit alone"
    assert [row["length"] for row in packs[0]["pack"]] == [30]
