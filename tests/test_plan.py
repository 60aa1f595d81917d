"""The plan: what a run takes, from the shapes alone; packs of rows."""

import itertools
import json
import re
from types import SimpleNamespace

import pytest
import reference
import torch
import torch.nn.functional as F
from transformers import AutoConfig

import qlora

LLAMA = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_key_value_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_key_value_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_key_value_heads": 8},
}
COMMON = ("--bf16", "--lora_dtype", "bfloat16", "--source_max_len", "16", "--target_max_len", "512")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with nothing but the config of a LLaMA of some size."""

    def make(size):
        path = tmp_path_factory.mktemp(size)
        vocabulary = 128256 if size == "8b" else 32000
        heads = 64 if size == "70b" else 32
        config = {"model_type": "llama", "num_attention_heads": heads, "vocab_size": vocabulary, **LLAMA[size]}
        (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        return str(path)

    return make


def plan_of(model, gpu, *flags):
    config = qlora.parse_config(["--model_name_or_path", model, *COMMON, "--plan", "--plan_gpu", gpu, *flags])
    return qlora.plan_from_flags(config, qlora.memory_from_config(config, qlora.load_model_config(config, model)))


def test_weights_are_counted_from_the_shapes(folder):
    parts = plan_of(folder("7b"), "H200").gib()
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert parts["weights of the linear layers"] == pytest.approx(linear * 4.126953125 / 8 / 2**30, rel=1e-6)
    assert parts["embedding, head, norms"] == pytest.approx((2 * 32000 * 4096 + 65 * 4096) * 2 / 2**30, rel=1e-6)
    adapters = 64 * 32 * (4 * 8192 + 3 * (4096 + 11008))
    assert parts["adapters"] == pytest.approx(adapters * 2 / 2**30, rel=1e-6)
    assert parts["gradients"] == 0, "they come as the activations of the one micro-batch go"
    several = plan_of(folder("7b"), "H200", "--auto_batch", "False").gib()
    assert several["gradients"] == several["adapters"] == parts["adapters"]
    assert parts["predicted peak"] == pytest.approx(sum(size for name, size in parts.items() if "peak" not in name))
    without = plan_of(folder("7b"), "H200", "--double_quant", "False").gib()["weights of the linear layers"]
    assert without == pytest.approx(linear * 4.5 / 8 / 2**30, rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "measured"),
    [
        (("--recompute_layers", "none", "--unpacked_layers", "none"), 32.31),
        (("--recompute_layers", "none", "--unpacked_layers", "all"), 44.38),
        (("--recompute_layers", "all", "--unpacked_layers", "none"), 7.30),
        (("--recompute_layers", "all", "--unpacked_layers", "none", "--auto_batch", "False"), 4.43),
    ],
)
def test_the_prediction_is_within_a_tenth_of_what_an_h200_measured(folder, flags, measured):
    """16 x 528 tokens at once, and in the last row 1 x 528; peaks of torch's allocator on a 7B LLaMA."""
    assert plan_of(folder("7b"), "H200", *flags).gib()["predicted peak"] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("graphs", "measured"), [((), 1856), (("--cuda_graphs",), 7640)])
def test_the_speed_of_one_row_is_planned_launched_and_in_graphs(folder, graphs, measured):
    """Tokens per second that an H200 measured, both in one run."""
    row = ("--recompute_layers", "all", "--gradient_accumulation_steps", "1", *graphs)
    plan = plan_of(folder("7b"), "H200", *row)
    assert plan.tokens_per_second() == pytest.approx(measured, rel=0.15)
    assert plan.lines()["recomputed"] == "32 of 32 layers" + (" in CUDA graphs" if graphs else "")
    many = plan_of(folder("7b"), "H200", *graphs)
    assert not many.sizes.graphs and many.sizes.recomputed == 0, "8448 tokens keep the GPU busy"
    two = strategies_of(folder("7b"), "2xH200", *row)[0]
    speeds = {name: int(line.split(", ")[1].split()[0]) for name, line in two.items() if "tokens per second" in line}
    assert speeds["DDP"] == pytest.approx(2 * measured, rel=0.15)
    assert speeds["one process"] == pytest.approx(1856, rel=0.15), "which takes no graphs"


def test_a_full_finetune_is_planned_too(folder):
    """1.1B in bf16 with AdamW's two states in bf16's width: 18.0 GiB were measured, 16 x 528 tokens at once."""
    flags = ("--full_finetune", "--bits", "16", "--optim", "adamw_torch", "--recompute_layers", "none")
    assert plan_of(folder("1b"), "H200", *flags).gib()["predicted peak"] == pytest.approx(18.0, rel=0.1)


@pytest.mark.parametrize("size", ["1b", "7b", "8b"])
def test_more_memory_is_never_slower(folder, size):
    model = folder(size)
    plans = [plan_of(model, f"{gib}GiB") for gib in (6, 8, 12, 16, 24, 40, 80, 140)]
    seconds = [
        -(-8448 // plan.tokens) * plan.costs.seconds(plan.sizes, plan.tokens, plans[0].gpu)
        for plan in plans
        if plan.fits()
    ]
    assert len(seconds) >= 5 and all(after <= before * 1.01 for before, after in itertools.pairwise(seconds))
    assert plans[0].sizes.recomputed > 0 or size == "1b"
    assert plans[-1].sizes.recomputed == 0 and plans[-1].sizes.unpacked == plans[-1].costs.layers


def test_what_the_flags_say_is_kept(folder):
    model = folder("7b")
    assert plan_of(model, "H200", "--recompute_layers", "5").sizes.recomputed == 5
    assert plan_of(model, "H200", "--gradient_checkpointing", "False").sizes.recomputed == 0
    assert plan_of(model, "H200", "--auto_batch", "False").tokens == 528
    assert plan_of(model, "H200", "--unpacked_layers", "3").sizes.unpacked == 3


@pytest.mark.parametrize(
    ("text", "gib", "number"),
    [("24GiB", 24, 1), ("8x80GiB", 80, 8), ("H100", 79, 1), ("2xh100", 79, 2), ("rtx4090", 24, 1), ("6.5 gb", 6.5, 1)],
)
def test_gpus_by_size_and_name(text, gib, number):
    gpu = qlora.find_gpu(text)
    assert (gpu.gib, gpu.number) == (gib, number) and gpu.tflops > 0


@pytest.mark.parametrize("text", ["24", "a lot", "0x24GiB", "x24GiB", "H1000", "-1GiB"])
def test_what_is_no_gpu(text):
    with pytest.raises(qlora.ConfigError, match=r"--plan_gpu .*expected a size or a name"):
        qlora.find_gpu(text)


def test_the_command_prints_the_plan_and_reads_nothing_else(folder, capsys, tmp_path):
    words = ["--model_name_or_path", folder("7b"), "--dataset", str(tmp_path / "none"), "--bf16", "--plan"]
    assert qlora.main([*words, "--plan_gpu", "24GiB", "--output_dir", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("predicted peak", "recomputed", "tokens per second", "fits"))
    assert not (tmp_path / "out").exists()
    assert qlora.main(["--model_name_or_path", folder("1b"), "--plan_gpu", "24GiB"]) == 2
    assert "--plan_gpu needs --plan" in capsys.readouterr().err


def test_a_plan_without_a_gpu_names_the_way_out(folder, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert qlora.main(["--model_name_or_path", folder("1b"), "--plan"]) == 2
    assert "--plan_gpu 24GiB" in capsys.readouterr().err


class Rows(dict):
    """Columns of rows, by name or number, as a dataset has them."""

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


def test_micro_batches_of_the_flags_leave_memory_to_unpacked_weights(folder):
    """One row at once takes 2 GiB of 40, and sixteen never come."""
    plan = plan_of(folder("7b"), "40GiB", "--auto_batch", "False")
    assert (plan.tokens, plan.sizes.recomputed, plan.sizes.unpacked) == (528, 0, 32)


def test_where_memory_is_short_the_optimizers_pages_are_moved_out(folder):
    model, flags = folder("7b"), ("--recompute_layers", "all", "--lora_dtype", "float32")
    plans = [plan_of(model, gpu, *flags) for gpu in ("H200", "6.3GiB", "5GiB")]
    assert [bool(plan.pages) for plan in plans] == [True, False, False]
    assert [plan.fits() for plan in plans] == [True, True, False]
    assert "pages are moved out" in plans[1].lines()["beside it"] and "does not fit" in plans[2].lines()["in all"]
    assert not plan_of(model, "H200", *flags, "--optim", "adamw_torch").pages


def test_a_gpu_that_nobody_knows_is_planned_for(folder):
    model = folder("1b")
    config = qlora.parse_config(["--model_name_or_path", model, *COMMON])
    costs = qlora.memory_from_config(config, qlora.load_model_config(config, model))
    plan = qlora.make_plan(costs, qlora.Gpu("Some GPU", 16.0, 0.0), 528, 8448, config)
    assert plan.fits() and plan.lines()["tokens per second"] == "not known for this GPU"


def test_a_process_with_a_share_of_the_gpu_plans_for_that(monkeypatch):
    """80 GiB, of which a quarter is this process's: it holds 6, reserved 8, and another process 30."""
    gib, card = 2**30, SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30)
    answers = {"is_available": True, "get_device_properties": card, "device_count": 1}
    answers |= {"mem_get_info": (42 * gib, 80 * gib), "memory_reserved": 8 * gib, "memory_allocated": 6 * gib}
    for name, answer in answers.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *args, answer=answer: answer)
    for fraction, free, whole in ((1.0, 44, 80), (0.25, 14, 20 + qlora.CONTEXT)):
        monkeypatch.setattr("torch.cuda.get_per_process_memory_fraction", lambda *gpu, fraction=fraction: fraction)
        assert qlora.free_memory() == free * gib
        assert qlora.find_gpu(None).gib == pytest.approx(whole)


WIDE = {"hidden_size": 256, "intermediate_size": 704}
PLAIN = {"hidden_size": 256, "intermediate_size": 1024}
GPT2 = {"n_embd": 256, "n_inner": 1024, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
KEPT = {
    "llama": ("llama", WIDE, {}),
    "grouped queries": ("llama_gqa", WIDE, {}),
    "qwen3, norms on heads": ("qwen3", WIDE | {"head_dim": 64}, {}),
    "gemma3, four norms a layer": ("gemma3", WIDE | {"head_dim": 64, "sliding_window": 512}, {}),
    "olmo2, norms on all heads": ("olmo2", WIDE, {}),
    "pythia, no gate": ("gpt_neox", PLAIN, {}),
    "opt, ReLU": ("opt", {"hidden_size": 256, "ffn_dim": 1024, "word_embed_proj_dim": 256, "dropout": 0.0}, {}),
    "gpt2, Conv1D and an activation in Python": ("gpt2", GPT2, {}),
    "peft's functions": ("llama_gqa", WIDE, {"fused_lora": False}),
    "peft's functions in bf16": ("llama_gqa", WIDE, {"fused_lora": False, "lora_dtype": "bfloat16"}),
    "adapters on attention": ("llama_gqa", WIDE, {"lora_modules": "attn"}),
    "adapters on q and v": ("llama_gqa", WIDE, {"lora_modules": "q_proj,v_proj"}),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_layer_keeps_as_many_bytes_of_a_token_as_is_planned(models, monkeypatch, case):
    """What autograd saves of a layer in bf16, counted, each tensor's memory once; without liger-kernel's norms."""
    family, shape, flags = KEPT[case]
    norm, kept = F.layer_norm, []
    # as autocast has it on a GPU
    monkeypatch.setattr(F, "layer_norm", lambda x, n, w, b, eps: norm(x.float(), n, w.float(), b.float(), eps))
    for layers in (1, 3):
        folder = models(family, **shape, **{"n_layer" if family == "gpt2" else "num_hidden_layers": layers})
        both = reference.make(folder, dtype=None, bits=16, bf16=True, use_cpu=True, liger=False, **flags)
        base, seen = reference.base_of(both.quick), {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in both.quick.parameters()}

        def save(tensor, seen=seen):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, so that no address comes again
            return tensor

        batch = qlora.padding_free_batch(reference.window_of(reference.rows_of([256])), [0])
        hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
        with qlora.attention_implementation(base, both.fast.attention), torch.autocast("cpu", torch.bfloat16), hooks:
            qlora.summed_loss(both.quick, both.fast, batch)
        kept.append(sum(size for address, (size, _) in seen.items() if address not in weights))
    monkeypatch.undo()
    costs = qlora.memory_from_config(both.config, base.config)
    # a few tensors that do not grow with the tokens, and attention's output, which is copied once on a CPU
    assert (kept[1] - kept[0]) / 2 / 256 == pytest.approx(costs.layer, rel=0.03 if family != "gpt_neox" else 0.08)


def test_a_model_whose_activation_has_weights_is_planned():
    """Apertus' xIELU has some, and keeps more than a gate would: beside its input and output at least two tensors."""
    shape = AutoConfig.for_model("apertus", hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    costs = qlora.memory_from_config(reference.parse("none", bits=16), shape)
    assert costs.layer > 4 * 128 * 4


@pytest.mark.parametrize(("family", "said"), [("gpt_oss", 1), ("gemma4_text", 0), ("bert", 0), ("albert", 0)])
def test_a_layer_that_cannot_run_without_values_is_estimated_and_named(caplog, family, said):
    """gpt-oss sends each token to experts by their scores; ALBERT runs its one layer twelve times."""
    caplog.set_level("INFO", "qlora")
    flags = {"objective": "mlm"} if "bert" in family else {}
    shape = AutoConfig.for_model(family)
    costs = qlora.memory_from_config(reference.parse("none", bits=16, **flags), shape)
    assert sum("a layer is taken to keep" in record.getMessage() for record in caplog.records) == said
    wide = 4 * shape.hidden_size
    assert 8 * wide < costs.layer < 80 * wide


def test_liger_kernels_norms_keep_their_input_in_its_own_width(models):
    """Of its RMSNorms all four of Gemma 3's layer and those on its heads, 2 bytes a value in place of 4."""
    folder = models("gemma3", num_hidden_layers=1)
    costs = [
        qlora.memory_from_config(config, qlora.load_model_config(config, str(folder)))
        for config in (
            reference.parse(folder, bf16=True, use_cpu=True, bits=16, liger=liger) for liger in (True, False)
        )
    ]
    roots = 4 * (4 + 4 + 2)  # what a norm divides by: liger-kernel keeps it too, and it is not counted there
    assert costs[1].layer - costs[0].layer == 2 * (4 * 64 + 4 * 16 + 2 * 16) + roots


def test_of_stacked_experts_a_token_meets_a_few(tmp_path):
    """Mixtral 8x7B: 12.7 of 46.7 billion values are multiplied with; the experts, of 90 GB, are held in 16 bits."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    costs = plan_of(str(tmp_path), "H200").costs
    attention, expert = 32 * 2 * 4096 * (4096 + 1024), 3 * 4096 * 14336
    thin = 64 * 32 * 2 * (2 * 4096 + 4096 + 1024)
    assert costs.flops == pytest.approx(4 * (attention + 32 * 2 * expert + 32000 * 4096) + 6 * thin, rel=1e-3)
    assert costs.other > 32 * 8 * expert * 2 and costs.layer > 2 * 2 * 3 * 14336


@pytest.mark.parametrize(("bits", "said"), [(4, True), (8, True), (16, False)])
def test_experts_that_stay_whole_are_named_before_training(models, caplog, bits, said):
    """In GiB: two layers with four experts of three matrices, in float32 on a CPU. Attention is quantised."""
    caplog.set_level("WARNING", "qlora")
    model = reference.load(models("mixtral", intermediate_size=8192), bits=bits)
    lines = [record.getMessage() for record in caplog.records if "experts" in record.getMessage()]
    assert len(lines) == said
    if said:
        assert "4 tensors of stacked experts" in lines[0] and "float32" in lines[0]
        assert f"{2 * 4 * 3 * 64 * 8192 * 4 / 2**30:.2f} GiB" in lines[0]
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("q_proj.base_layer")}
    assert kinds == {{4: "Linear4bit", 8: "Linear8bitLt", 16: "Linear"}[bits]}


@pytest.fixture
def on_two_gpus(folder, monkeypatch):
    """`on_two_gpus(shape, name, size, free, used, share)`, in GiB of each -> config and costs of a model there."""

    def pretend(shape, name, size, free, used=0.0, share=1.0):
        model, gib = folder(shape), 2**30
        config = qlora.parse_config(["--model_name_or_path", model, *COMMON, "--plan"])
        costs = qlora.memory_from_config(config, qlora.load_model_config(config, model))
        answers = {"is_available": True, "device_count": 2, "mem_get_info": (free * gib, size * gib)}
        answers |= {"memory_reserved": 0, "memory_allocated": used * gib, "get_per_process_memory_fraction": share}
        answers["get_device_properties"] = SimpleNamespace(name=name, total_memory=size * gib)
        for function, answer in answers.items():
            monkeypatch.setattr(f"torch.cuda.{function}", lambda *args, answer=answer: answer)
        monkeypatch.setattr(config.training, "use_cpu", False)
        monkeypatch.setattr(qlora, "calibrated", lambda costs, *args: costs)
        return config, costs

    return pretend


def test_layers_on_several_gpus_of_one_process_have_the_speed_of_one(on_two_gpus, monkeypatch):
    """One waits for the other; with torchrun each process has a GPU of its own, and all train at once."""
    config, costs = on_two_gpus("1b", "NVIDIA H100", 79, free=79)
    speeds = []
    for processes in (1, 2):
        monkeypatch.setattr(qlora, "rank_and_world_size", lambda processes=processes: (0, processes))
        base = torch.nn.Module()
        _, plan = qlora.choose_step_plan(costs, base, base, qlora.FastPath(), Rows(length=[528] * 16), config)
        speeds.append(plan.tokens_per_second())
    assert qlora.find_gpu(None).number == 2 and speeds[1] == 2 * speeds[0] > 0


def test_layers_on_several_gpus_of_one_process_have_the_memory_of_all(on_two_gpus):
    """70B in 4 bits, 35 GiB of layers and head: on two GPUs whose share for this process is 24 GiB each."""
    config, costs = on_two_gpus("70b", "NVIDIA H200", 140, free=130, used=17.5, share=24 / 140)
    plans = []
    for gpus in (1, 2):
        base = torch.nn.Module()
        places = [SimpleNamespace(device=torch.device("cuda", gpu)) for gpu in range(gpus)]
        base.parameters = lambda places=places, **options: iter(places)
        _, plan = qlora.choose_step_plan(costs, base, base, qlora.FastPath(), Rows(length=[528] * 4), config)
        plans.append(plan)
    alone, both = (plan.lines() for plan in plans)
    assert alone["GPU"] == "NVIDIA H200, 25 GiB" and alone["in all"].endswith("does not fit into 25 GiB")
    assert both["GPU"] == "2 x NVIDIA H200, 25 GiB; on each" and both["in all"].endswith("GiB: fits")
    assert float(both["weights of the linear layers"].split()[0]) == pytest.approx(
        float(alone["weights of the linear layers"].split()[0]) / 2, abs=0.01
    )
    assert plans[1].sizes.recomputed > 0 and both["recomputed"].endswith("of 80 layers")


def test_of_each_gpu_the_first_layers_are_recomputed(models):
    """Of five layers three are on the first."""
    model = reference.load(models("llama", num_hidden_layers=5), bits=16)
    layers = qlora.decoder_layers(model)
    for count, wanted in ((0, ""), (1, "0"), (2, "03"), (3, "013"), (4, "0134"), (5, "01234")):
        for i, layer in enumerate(layers):
            place = [SimpleNamespace(device=torch.device("cuda", i // 3), requires_grad=True)]
            layer.parameters = lambda place=place: iter(place)
        qlora.set_recomputed_layers(model, count, qlora.FastPath())
        assert [i for i, layer in enumerate(layers) if layer.gradient_checkpointing] == [*map(int, wanted)]


def test_each_strategy_has_its_speed(folder):
    lines, _, _ = strategies_of(folder("7b"), "2xH200")
    speeds = {name: int(line.split(", ")[1].split()[0]) for name, line in lines.items() if "tokens per second" in line}
    assert set(speeds) == {"DDP", "FSDP2", "one process"}
    assert speeds["DDP"] == pytest.approx(2 * speeds["one process"], rel=0.02)


def strategies_of(model, gpu, *flags):
    """The table of `--plan` for several GPUs, and the costs behind it."""
    config = qlora.parse_config(["--model_name_or_path", model, *COMMON, "--plan", "--plan_gpu", gpu, *flags])
    costs = qlora.memory_from_config(config, qlora.load_model_config(config, model))
    lines = qlora.strategy_lines(qlora.strategy_plans(config, costs))
    return lines, qlora.strategies(costs, config, qlora.find_gpu(gpu).number), costs


def test_each_way_to_use_several_gpus_has_its_table(folder, capsys):
    assert qlora.main(["--model_name_or_path", folder("70b"), *COMMON, "--plan", "--plan_gpu", "8x80GiB"]) == 0
    parts = re.split(r"^(?=\S)", capsys.readouterr().out, flags=re.M)[1:]
    weights = [re.findall(r"weights of the linear layers +(\S+) GiB\n", part) for part in parts]
    assert [part.partition("\n")[0] for part in parts] == ["DDP", "FSDP2", "one process", "Of these"]
    shared = f"{80 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192) * 4.126953125 / 8 / 2**30 / 8:.2f}"
    assert weights[1:] == [[shared], [shared], []] and float(weights[0][0]) == pytest.approx(
        8 * float(shared), abs=0.04
    )
    assert "recommended  DDP" in parts[-1]


def test_a_replica_on_each_gpu_is_recommended_where_the_quantised_base_fits(folder):
    lines, parts, costs = strategies_of(folder("7b"), "8x80GiB")
    assert lines["recommended"] == "DDP: torchrun --nproc_per_node 8 qlora.py"
    assert [*lines][:-1] == ["DDP", "FSDP2", "one process"], "DeepSpeed has no use for 4 bits"
    assert parts["DDP"].weights == costs.weights and parts["FSDP2"].weights == costs.weights // 8
    assert parts["FSDP2"].fixed > costs.fixed, "two layers are there whole"


def test_engines_recompute_all_layers_or_none_in_the_table_too(folder):
    """As in their runs; a replica on each GPU recomputes as many as it must."""
    found = {name: set() for name in ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")}
    model, costs = folder("7b"), None
    flags = [*COMMON, "--per_device_train_batch_size", "16", "--auto_batch", "False", "--plan"]
    for gib in (16, 24, 32, 40, 48):
        config = qlora.parse_config(["--model_name_or_path", model, *flags, "--plan_gpu", f"2x{gib}GiB"])
        costs = costs or qlora.memory_from_config(config, qlora.load_model_config(config, model))
        for name, own in qlora.strategies(costs, config, 2).items():
            found.get(name, set()).add(qlora.plan_from_flags(config, own).sizes.recomputed)
    assert found["DDP"] - {0, 32} and all(found[name] <= {0, 32} for name in found if name != "DDP")


@pytest.mark.parametrize(("gpu", "wanted"), [("8x48GiB", "ZeRO-2"), ("8x16GiB", "ZeRO-3"), ("2x16GiB", "none fits")])
def test_a_full_fine_tune_shares_as_much_as_it_must(folder, gpu, wanted):
    """7B in bf16: 12.6 GiB of weights, as much of gradients, twice as much of the optimizer's averages, also in bf16.

    DeepSpeed steps on a float32 copy of the weights, with float32 averages: three times as much as those.
    """
    lines, parts, costs = strategies_of(folder("7b"), gpu, "--full_finetune", "--bits", "16", "--optim", "adamw_torch")
    assert lines["recommended"].startswith(wanted)
    assert "does not fit" in lines["DDP"]
    assert parts["ZeRO-2"].weights == costs.weights
    assert parts["ZeRO-2"].optimizer == parts["ZeRO-3"].optimizer == costs.optimizer * 3 // int(gpu[0])


@pytest.mark.parametrize("bits", ["4", "8"])
@pytest.mark.parametrize("size", ["7b", "8b", "1b", "70b"])
def test_a_replica_is_recommended_for_every_shape_that_fits_and_for_no_other(folder, size, bits):
    """By the bytes of the base alone: with a third of the GPU beside it there is room, without any there is none."""
    shape = LLAMA[size]
    wide, heads = shape["hidden_size"], 64 if size == "70b" else 32
    rows = 2 * wide + 2 * shape["num_key_value_heads"] * wide // heads + 3 * shape["intermediate_size"]
    vocabulary = 128256 if size == "8b" else 32000
    base = (shape["num_hidden_layers"] * rows * wide * int(bits) / 8 + 2 * vocabulary * wide * 2) / 2**30
    found = set()
    for number, gib in itertools.product((2, 8), (2, 4, 8, 16, 24, 48, 80, 141)):
        lines, parts, _ = strategies_of(folder(size), f"{number}x{gib}GiB", "--bits", bits)
        assert set(lines) == {*parts, "recommended"} - {"ZeRO-2", "ZeRO-3"} - ({"FSDP2"} if bits == "8" else set()), (
            "a line for each way, and the choice"
        )
        ddp = lines["recommended"] == f"DDP: torchrun --nproc_per_node {number} qlora.py"
        assert ddp == ("does not fit" not in lines["DDP"])
        assert ddp or base > gib / 1.5 - 2, (gib, base, lines)
        assert not ddp or base < gib, (gib, base, lines)
        found.add(lines["recommended"].partition(":")[0])
    assert {"DDP", "none fits"} <= found or size == "1b"
