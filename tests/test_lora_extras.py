"""Every way of adapting, on a quantised base: its effect in the adapter that a run leaves."""

import functools
import json
import math
import re
import shutil

import gguf
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import qlora

IDS = torch.tensor([[tiny.BOS, *b"Order 3: where is my coffee?"]])
ATTN, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def adapt(run_qlora, tmp_path):
    """`adapt(**flags)` -> (weights of the adapter, its config): one step of training on a 4-bit base."""

    def run(**flags):
        done = run_qlora(**{"max_steps": 1, "learning_rate": 1e-2, "save_strategy": "no", **flags})
        assert done.code == 0
        weights = load_file(done.output_dir / "adapter_model.safetensors")
        return {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}, done.json(
            "adapter_config.json"
        )

    return run


def base_of(folder, bits=32):
    """The base as transformers alone loads it."""
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    options = {"quantization_config": four} if bits == 4 else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"}, **options).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits[0]


def error_of(run) -> str:
    lines = run.stderr.splitlines()
    assert run.code == 2 and "Traceback" not in run.stderr
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


def layers_of(weights) -> set[tuple[int, str]]:
    parts = [name.split(".lora_")[0].split(".") for name in weights if ".lora_A" in name]
    return {(int(part[2]), part[-1]) for part in parts}


# ------------------------------------------------------------------------------------
# Where, what else, and how large
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora_modules", "leaves", "frozen"),
    [
        ("mlp", MLP, 0),
        ("v_proj,up_proj", ("v_proj", "up_proj"), 0),
        ("attn, down_proj", (*ATTN, "down_proj"), 1),
    ],
)
def test_lora_modules_and_layers_to_freeze(adapt, lora_modules, leaves, frozen):
    weights, _ = adapt(lora_modules=lora_modules, layers_to_freeze=frozen)
    assert layers_of(weights) == {(layer, leaf) for layer in range(frozen, 2) for leaf in leaves}
    assert all(tensor.any() for tensor in weights.values())  # every B has moved from zero


def test_use_rslora_scales_by_the_root_of_the_rank(adapt, models, tmp_path):
    weights, config = adapt(use_rslora=True, lora_alpha=8)
    assert config["use_rslora"] is True and (config["r"], config["lora_alpha"]) == (4, 8)
    adapted = PeftModel.from_pretrained(base_of(models("llama")), tmp_path / "out")
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    name = "model.layers.0.self_attn.q_proj.lora_{}.weight"
    change = x @ weights[name.format("A")].T @ weights[name.format("B")].T * 8 / math.sqrt(4)
    with torch.no_grad():
        assert torch.allclose(layer(x), layer.base_layer(x) + change, atol=1e-5)


def test_dora_trains_the_magnitudes_of_a_4_bit_base(adapt, models):
    """A magnitude starts as the length of a row of the quantised weight."""
    weights, config = adapt(use_dora=True)
    assert config["use_dora"] is True
    for name, module in base_of(models("llama"), bits=4).named_modules():
        if type(module).__name__ == "Linear4bit":
            from bitsandbytes.functional import dequantize_4bit

            start = dequantize_4bit(module.weight.data, module.weight.quant_state).norm(dim=1)
            change = (weights[f"{name}.lora_magnitude_vector"] - start).abs()
            assert 0.001 < change.max() < 0.0101, name  # Adam's first step is the learning rate


@pytest.mark.parametrize("lora_bias", ["lora_only", "all"])
def test_lora_bias_on_a_4_bit_base(adapt, models, lora_bias):
    folder = models("gpt_neox")
    weights, config = adapt(model_name_or_path=folder, lora_bias=lora_bias, lora_modules="mlp")
    before = {name.replace(".base_layer", ""): p for name, p in base_of(folder).named_parameters()}
    biases = {name.replace(".base_layer", ""): t for name, t in weights.items() if name.endswith("bias")}
    wanted = [name for name in before if name.endswith("bias") and (lora_bias == "all" or ".mlp." in name)]
    assert config["bias"] == lora_bias and biases.keys() == set(wanted)
    assert all(0.001 < (tensor - before[name]).abs().max() < 0.0101 for name, tensor in biases.items())


def test_modules_to_save_that_are_quantised_are_refused(adapt, run_qlora, tmp_path):
    """Those of an adapter to start from, too: their codes can't be trained."""
    whole = {"modules_to_save": "norm,down_proj", "lora_modules": "attn"}
    adapt(bits=16, **whole, output_dir=tmp_path / "first")
    flags = {"bits": 8, "adapter_name_or_path": tmp_path / "first"}
    for run in (run_qlora(bits=4, **whole), run_qlora(**flags, output_dir=tmp_path / "next")):
        weight = "model.layers.0.mlp.down_proj.weight"
        assert error_of(run) == f"error: --modules_to_save down_proj: {weight} is quantised; pass --bits 16 or 32"


@pytest.mark.parametrize("tie", [False, True])
def test_modules_to_save_are_trained_whole_beside_a_4_bit_base(adapt, models, tie):
    folder = models("llama", tie=tie)
    weights, config = adapt(model_name_or_path=folder, modules_to_save="lm_head, ")
    assert config["modules_to_save"] == ["lm_head"] and len(layers_of(weights)) == 14
    before = base_of(folder).lm_head.weight
    assert weights["lm_head.weight"].shape == (320, 64)
    assert 0.001 < (weights["lm_head.weight"] - before).abs().max() < 0.0101
    assert not any("embed_tokens" in name for name in weights)


def test_adapter_name_or_path_keeps_its_shape_and_gets_a_fresh_optimizer(adapt, tmp_path):
    first, _ = adapt(output_dir=tmp_path / "first", lora_modules="attn", lora_r=2)
    adapter = tmp_path / "first"
    same, config = adapt(output_dir=tmp_path / "same", adapter_name_or_path=adapter, learning_rate=0, lora_r=8)
    assert config["r"] == 2 and layers_of(same) == {(layer, leaf) for layer in (0, 1) for leaf in ATTN}
    assert all(torch.equal(tensor, same[name]) for name, tensor in first.items())
    more, _ = adapt(output_dir=tmp_path / "more", adapter_name_or_path=adapter, learning_rate=1e-3)
    assert all(0 < (more[name] - tensor).abs().max() < 1.01e-3 for name, tensor in first.items())


@pytest.mark.parametrize("freezing", ["--layers_to_freeze 1", "--layer_freeze_ratio 0.5"])
def test_flags_overruled_by_adapter_name_or_path_are_named(freezing, caplog):
    """Not those that freeze its layers."""
    words = ["--adapter_name_or_path", "first", "--lora_r", "8", *freezing.split()]
    with caplog.at_level("INFO", "qlora"):
        qlora.log_hints(qlora.parse_config(words))
    (message,) = (message for message in caplog.messages if "keeps its own shape" in message)
    assert "lora_r" in message and "freeze" not in message


def test_layers_of_an_adapter_to_start_from_are_frozen(run_qlora, finished_run):
    flags = {"adapter_name_or_path": finished_run.output_dir, "max_steps": 1}
    run = run_qlora(**flags, layers_to_freeze=1)
    first, then = (load_file(each.output_dir / "adapter_model.safetensors") for each in (finished_run, run))
    same = {name for name, tensor in then.items() if torch.equal(tensor, first[name])}
    assert run.code == 0 and same == {name for name in first if ".layers.0." in name} < first.keys()
    other = run_qlora(**flags | {"max_steps": 2}, layers_to_freeze=0)
    assert "belongs to another run: layers_to_freeze was 1, is 0" in error_of(other)


def test_neftune_noise_changes_the_adapter(adapt, tmp_path):
    """alpha / sqrt(tokens x hidden) of uniform noise: none gives another adapter, and so does another amount."""
    runs = [adapt(output_dir=tmp_path / str(n), neftune_noise_alpha=n, max_steps=2)[0] for n in (None, 5, 10)]
    again = adapt(output_dir=tmp_path / "again", neftune_noise_alpha=5, max_steps=2)[0]
    assert all(torch.equal(tensor, again[name]) for name, tensor in runs[1].items())
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert any(not torch.equal(tensor, runs[other][name]) for name, tensor in runs[one].items())


# ------------------------------------------------------------------------------------
# Initialisation
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["False", "gaussian", "true"])
def test_init_lora_weights_on_a_4_bit_base(adapt, start):
    weights, config = adapt(init_lora_weights=start, learning_rate=0, lora_r=16)
    assert config["init_lora_weights"] == {"False": False, "true": True}.get(start, start)
    a = torch.cat([tensor.flatten() for name, tensor in weights.items() if "lora_A" in name])
    b = torch.cat([tensor.flatten() for name, tensor in weights.items() if "lora_B" in name])
    assert bool(b.any()) == (start == "False")
    # gaussian: a standard deviation of 1 / r, which no bound limits. Else uniform within 1 / sqrt(inputs).
    assert (a.abs().max() > 0.2) == (start == "gaussian")
    if start == "gaussian":
        assert a.std().item() == pytest.approx(1 / 16, rel=0.02)


@pytest.fixture
def trained(monkeypatch) -> list:
    """The models that the runs of this test train."""
    models, enable_fast_path = [], qlora.enable_fast_path

    def spy(model, *args):
        models.append(model)
        return enable_fast_path(model, *args)

    monkeypatch.setattr(qlora, "enable_fast_path", spy)
    return models


@pytest.mark.parametrize(
    ("start", "flags"),
    [
        ("pissa", {}),
        ("pissa_niter_4", {"use_rslora": True}),
        ("olora", {"bf16": True}),
        ("pissa", {"use_dora": True, "lora_modules": "attn", "modules_to_save": "lm_head"}),
        ("orthogonal", {}),
    ],
)
def test_the_saved_adapter_fits_the_base_as_published(run_qlora, models, trained, tmp_path, start, flags):
    """Pissa and olora change the base while they train; the saved adapter must not depend on that."""
    run = run_qlora(bits=16, init_lora_weights=start, learning_rate=1e-2, **flags)
    assert run.code == 0
    base = base_of(models("llama"))
    before = logits(base)
    adapted = PeftModel.from_pretrained(base, run.output_dir).eval()
    (model,) = trained
    expected, got = logits(model.eval()), logits(adapted)
    changed = not torch.allclose(
        model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.float(),
        load_file(models("llama") / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"],
        atol=1e-2,
    )
    assert changed == (start != "orthogonal")
    assert run.json("adapter_config.json")["r"] == (8 if changed else 4)
    # bf16: the base that training saw was rounded twice
    assert (got - expected).abs().max() < (0.2 if flags.get("bf16") else 2e-4)
    assert (got - before).abs().max() > 1


def test_pissa_resumes_exactly_and_its_checkpoints_predict_but_do_not_merge(run_qlora, models, trained, tmp_path):
    flags = {"bits": 16, "init_lora_weights": "pissa_niter_4", "learning_rate": 1e-3}
    straight = run_qlora(output_dir=tmp_path / "straight", **flags)
    run_qlora(**flags)
    (tmp_path / "out" / "completed").unlink()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "out" / name).unlink()
    predict = {"do_train": False, "do_predict": True, "predict_with_generate": True, "max_new_tokens": 2}
    assert run_qlora(**flags, **predict, max_eval_samples=1).code == 0
    assert torch.allclose(logits(trained[-1].eval()), logits(trained[0].eval()), atol=1e-4)  # from checkpoint-4
    merged = run_qlora(**flags, do_train=False, merged_output_dir=tmp_path / "merged")
    assert "changed by pissa" in error_of(merged) and not (tmp_path / "merged").exists()
    (tmp_path / "out" / "checkpoint-4").rename(tmp_path / "out" / "aside")
    resumed = run_qlora(**flags)
    assert "checkpoint-2" in resumed.stderr
    one, other = (load_file(run.output_dir / "adapter_model.safetensors") for run in (straight, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal", "loftq", "corda"])
def test_init_lora_weights_refused_on_a_quantised_base_before_loading(run_qlora, monkeypatch, start):
    monkeypatch.setattr(qlora, "load_model", None)
    error = error_of(run_qlora(init_lora_weights=start))
    assert f"--init_lora_weights {start}: " in error and len(error) > 60


def test_init_lora_weights_refused_on_a_prequantised_checkpoint(run_qlora, models):
    run = run_qlora(model_name_or_path=models("prequantised"), bits=16, init_lora_weights="olora")
    assert "--init_lora_weights olora" in error_of(run) and "quantised already" in error_of(run)


def test_olora_is_refused_on_layers_that_peft_would_start_wrongly(run_qlora, models):
    run = run_qlora(model_name_or_path=models("gpt2"), bits=16, init_lora_weights="olora")
    assert "--init_lora_weights olora" in error_of(run) and "pass pissa" in error_of(run)


# ------------------------------------------------------------------------------------
# Ranks and alphas of single layers
# ------------------------------------------------------------------------------------
def test_ranks_and_alphas_of_single_layers(adapt, models, tmp_path):
    """The shapes are peft's own for the same patterns, and its logits are those of the fast path."""
    patterns = {
        "lora_rank_pattern": '{"layers.0.mlp.down_proj": 2, "v_proj|none": 6}',
        "lora_alpha_pattern": '{"v_proj": 48}',
    }
    weights, _ = adapt(**patterns, lora_r=4)
    assert r'"v_proj\|none": 6}` |' in (tmp_path / "out/README.md").read_text()
    ranks = {name.split(".lora_A")[0]: len(tensor) for name, tensor in weights.items() if ".lora_A" in name}
    assert ranks.pop("model.layers.0.mlp.down_proj") == 2
    assert [ranks.pop(f"model.layers.{n}.self_attn.v_proj") for n in (0, 1)] == [6, 6]
    assert set(ranks.values()) == {4}
    adapted = PeftModel.from_pretrained(base_of(models("llama"), bits=4), tmp_path / "out")
    layers = adapted.base_model.model.model.layers
    assert (layers[1].self_attn.v_proj.scaling["default"], layers[1].mlp.down_proj.scaling["default"]) == (8, 4)
    assert (
        "refuse an adapter with ranks or alphas by layer, or scale it differently"
        in (tmp_path / "out/README.md").read_text()
    )


def test_a_pattern_with_pissa_fits_the_published_base(run_qlora, models, tmp_path):
    flags = {"bits": 16, "init_lora_weights": "pissa", "lora_rank_pattern": '{"v_proj": 6}', "learning_rate": 1e-2}
    run = run_qlora(**flags, max_steps=1, do_eval=True, eval_dataset_size=4)
    assert run.code == 0
    saved = json.loads((run.output_dir / "adapter_config.json").read_text())
    assert saved["rank_pattern"] == {"v_proj": 12} and saved["r"] == 8
    again = run_qlora(bits=16, adapter_name_or_path=run.output_dir, output_dir=tmp_path / "eval", do_train=False,
                      do_eval=True, eval_dataset_size=4)  # fmt: skip
    assert again.json("eval_results.json")["eval_loss"] == pytest.approx(
        run.json("eval_results.json")["eval_loss"], rel=1e-4
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_rank_pattern": "q_proj=8"}, "--lora_rank_pattern q_proj=8: expected JSON"),
        ({"lora_alpha_pattern": '{"q_proj": 0}'}, "values must be above 0"),
        ({"lora_rank_pattern": '{"q_projection": 8}'}, "no adapted layer is called 'q_projection'"),
        ({"lora_rank_pattern": '{"(": 8}'}, "expected JSON such as"),
        ({"lora_rank_pattern": '{"q_proj": 1.5}'}, '--lora_rank_pattern {"q_proj": 1.5}: expected JSON such as'),
        ({"lora_alpha_pattern": '{"q_proj": 1e999}'}, "values must be above 0, and ranks whole numbers"),
    ],
)
def test_patterns_that_do_not_fit(run_qlora, flags, message):
    assert message in error_of(run_qlora(**flags))


def test_the_saved_adapter_is_one_that_servers_load(run_qlora, models):
    """llama.cpp's converter finds each layer in its map of names; vLLM takes A and B of linear layers, and no bias.

    (gguf's tensor_mapping; vllm/lora/peft_helper.py and lora_model.py)
    """
    run = run_qlora(max_steps=1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    config, weights = run.json("adapter_config.json"), load_file(run.output_dir / "adapter_model.safetensors")
    shapes = {name: module.weight.shape for name, module in base_of(models("llama")).named_modules()
              if isinstance(module, torch.nn.Linear) and name != "lm_head"}  # fmt: skip
    expected = {f"base_model.model.{name}.lora_{part}.weight" for name in shapes for part in "AB"}
    assert set(weights) == expected
    for name, (out, size) in shapes.items():
        assert names.get_name(name).startswith("blk.")
        a, b = (weights[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert (tuple(a.shape), tuple(b.shape)) == ((4, size), (out, 4))
    assert config["peft_type"] == "LORA" and config["bias"] == "none" and not config["modules_to_save"]
    assert config["r"] == 4 and not config["use_dora"] and isinstance(config["target_modules"], list)
    assert all(any(f".{name}".endswith(f".{target}") for target in config["target_modules"]) for name in shapes)


def test_a_base_s_own_weight_in_an_adapter_file_is_refused(run_qlora, finished_run, models, tmp_path):
    """peft would load it into the base, and the next save would lose it."""
    file = finished_run.output_dir / "adapter_model.safetensors"
    norm = load_file(models("llama") / "model.safetensors")["model.norm.weight"]
    save_file(load_file(file) | {"base_model.model.model.norm.weight": 0.3 * norm}, file, metadata={"format": "pt"})
    run = run_qlora(adapter_name_or_path=finished_run.output_dir, output_dir=tmp_path / "next", max_steps=1)
    assert "1 of its weights have no place in the model" in error_of(run) and "norm.weight" in error_of(run)


# ------------------------------------------------------------------------------------
# New tokens: after the bytes and three special tokens they are 259 and 260
# ------------------------------------------------------------------------------------

QUESTION, ANSWER = "where is <cup>?", "<cup> went to <saucer>."
CUPS = [{"input": QUESTION, "output": ANSWER}] * 6
SOURCE = [tiny.BOS, *b"where is ", 259, *b"?"]
TARGET = [259, *b" went to ", 260, *b".", tiny.EOS]
NEW = {"add_tokens": "<cup>, <saucer>", "max_steps": 2, "learning_rate": 1e-2}


@pytest.fixture
def cups(tmp_path):
    return tiny.rows_to_jsonl(tmp_path / "cups.jsonl", CUPS)


def table_names(tie) -> set[str]:
    return {"model.embed_tokens", *([] if tie else ["lm_head"])}


def loss_of_target(model) -> float:
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([SOURCE + TARGET])).logits[0, len(SOURCE) - 1 : -1]
    return torch.nn.functional.cross_entropy(scores.float(), torch.tensor(TARGET)).item()


@pytest.mark.parametrize("rows", [320, 259], ids=["padded", "full"])
@pytest.mark.parametrize("tie", [False, True])
def test_new_tokens_train_their_rows_and_no_others(run_qlora, models, cups, tmp_path, tie, rows):
    folder, merged = models("llama", tie=tie, vocab_size=rows), tmp_path / "merged"
    run = run_qlora(model_name_or_path=folder, dataset=cups, do_eval=True, eval_dataset=cups, **NEW,
                    merged_output_dir=merged)  # fmt: skip
    assert run.code == 0 and "rows <cup> = 259, <saucer> = 260" in run.stderr and "logits in chunks" in run.stderr
    weights = load_file(run.output_dir / "adapter_model.safetensors")
    trained = {name.split(".token_adapter")[0]: t for name, t in weights.items() if "token_adapter" in name}
    assert all(".lora_" in name or ".token_adapter." in name for name in weights)
    assert trained.keys() == {f"base_model.model.{name}" for name in table_names(tie)}
    assert run.json("adapter_config.json")["trainable_token_indices"] == {name: [259, 260] for name in table_names(tie)}
    card = (run.output_dir / "README.md").read_text()
    assert "vLLM or llama.cpp refuse an adapter with new tokens" in card and "`--merged_output_dir`" in card
    # plain peft on the published base in 4 bit, with more rows where it lacks them
    base = base_of(folder, bits=4)
    for module in base.modules():
        module.support_avx512bf16_for_cpu = False  # else bitsandbytes evaluates in bf16 on such a CPU
    before = base.model.embed_tokens.weight.detach().clone()
    if rows == 259:
        base.resize_token_embeddings(261)
        assert "base.resize_token_embeddings(261)" in (run.output_dir / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(run.output_dir)
    assert tokenizer(QUESTION, add_special_tokens=False)["input_ids"] == SOURCE[1:]
    plain = PeftModel.from_pretrained(base, run.output_dir).eval()
    assert run.json("metrics.json")["eval_loss"] == pytest.approx(loss_of_target(plain), rel=1e-4)
    # two steps of Adam, away from the mean of the 259 rows that have a token
    for name, tensor in trained.items():
        start = (base_of(folder).get_submodule(name.removeprefix("base_model.model.")).weight[:259]).mean(0)
        assert 0.001 < (tensor - start).abs().max() < 0.0202, name
    # merged: every other row is the base's
    table = base_of(merged).model.embed_tokens.weight
    assert len(table) == max(rows, 261) and torch.equal(table[:259], before[:259].bfloat16().float())
    assert torch.equal(table[261:], before[261:].bfloat16().float())
    assert torch.equal(table[259:261], trained["base_model.model.model.embed_tokens"].bfloat16().float())
    assert AutoTokenizer.from_pretrained(merged)("<saucer>", add_special_tokens=False)["input_ids"] == [260]


@pytest.mark.parametrize("rows", [320, 259], ids=["padded", "full"])
def test_new_tokens_resume_exactly_and_predict(run_qlora, models, cups, tmp_path, rows):
    flags = {"model_name_or_path": models("llama", vocab_size=rows), "dataset": cups, **NEW, "save_steps": 1}
    run = run_qlora(**flags)
    adapter = (run.output_dir / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run.output_dir / "checkpoint-2")
    (run.output_dir / "completed").unlink()
    resumed = run_qlora(**flags)
    assert "resuming from" in resumed.stderr
    assert (run.output_dir / "adapter_model.safetensors").read_bytes() == adapter
    use = {"do_train": False, "do_predict": True, "predict_with_generate": True, "max_new_tokens": 4}
    predicted = run_qlora(**flags, **use, max_eval_samples=1, eval_dataset=cups)
    assert predicted.code == 0 and "<cup>?" in (run.output_dir / "predictions.jsonl").read_text()
    other = run_qlora(**flags | {"add_tokens": "<cup>"})
    assert other.code == 2 and "add_tokens was <cup>, <saucer>, is <cup>" in error_of(other)


@pytest.mark.parametrize("bits", [8, 16])
def test_new_tokens_at_other_bits(adapt, cups, bits):
    weights, _ = adapt(dataset=cups, bits=bits, **NEW)
    assert {t.shape for name, t in weights.items() if "token_adapter" in name} == {(2, 64)}


def test_new_tokens_on_a_gguf_base(adapt, models, tmp_path):
    cups = tiny.rows_to_jsonl(tmp_path / "cups.jsonl", CUPS)
    weights, config = adapt(model_name_or_path=models("gguf") / tiny.GGUF_FILE, dataset=cups, **NEW)
    ids = next(iter(config["trainable_token_indices"].values()))
    assert len(ids) == 2 and any("token_adapter" in name for name in weights)


def test_a_token_that_exists_trains_from_its_own_row(run_qlora, models, cups):
    run = run_qlora(dataset=cups, **NEW | {"add_tokens": "a,<cup>", "learning_rate": 0, "lora_r": 2})
    assert run.code == 0 and "rows a = 97 (not new), <cup> = 259" in run.stderr
    weights = load_file(run.output_dir / "adapter_model.safetensors")
    rows = next(t for name, t in weights.items() if "embed_tokens.token_adapter" in name)
    before = base_of(models("llama")).model.embed_tokens.weight
    assert torch.equal(rows[0], before[97]) and torch.allclose(rows[1], before[:259].mean(0), atol=1e-6)


def test_a_new_token_named_like_a_turn_is_one_in_a_text(run_qlora, tmp_path):
    cups = tiny.rows_to_jsonl(tmp_path / "cups.jsonl", [{"input": "<|user|>hi<|end|>", "output": "yes"}] * 4)
    run = run_qlora(dataset=cups, **NEW | {"add_tokens": "<|user|>,<|end|>"}, preview=1)
    assert run.code == 0 and "<|user|>" in run.stdout
    config = qlora.parse_config(["--add_tokens", "<|user|>"])
    tokenizer = tiny.byte_tokenizer()
    qlora.add_tokens(tokenizer, config.model, 320)
    (((bos, _), *tokens),) = next(qlora.tokenize_segments([[{"text": "<|user|>a", "supervised": True}]], tokenizer))
    assert bos == tiny.BOS and tokens == [(259, 259), (97, 97), (tiny.EOS, tiny.EOS)]


def test_adapters_with_other_rows_or_none_are_refused(run_qlora, cups, tmp_path):
    assert run_qlora(dataset=cups, max_steps=1).code == 0
    run = run_qlora(dataset=cups, adapter_name_or_path=tmp_path / "out", output_dir=tmp_path / "b", **NEW)
    assert "trains rows [], --add_tokens asks for [259, 260]: pass its tokens" in error_of(run)
    assert run_qlora(dataset=cups, output_dir=tmp_path / "c", **NEW).code == 0
    run = run_qlora(dataset=cups, adapter_name_or_path=tmp_path / "c", output_dir=tmp_path / "d")
    assert "trains rows [259, 260], --add_tokens asks for []: pass its tokens" in error_of(run)


def test_new_tokens_in_another_order_than_the_adapters_are_refused(run_qlora, cups, tmp_path):
    """Each would have the other's row."""
    first = run_qlora(dataset=cups, **NEW | {"max_steps": 1}).output_dir
    flags = {"dataset": cups, "adapter_name_or_path": first, "output_dir": tmp_path / "next", **NEW}
    for use in ({}, {"do_train": False, "do_eval": True}):
        error = error_of(run_qlora(**flags | {"add_tokens": "<saucer>,<cup>"} | use))
        assert f"{first} has <cup> and not <saucer> at this place: pass --add_tokens in its order" in error
    assert run_qlora(**flags).code == 0


def test_the_order_of_new_tokens_is_known_of_an_adapter_of_the_hub(run_qlora, cups, tmp_path, monkeypatch):
    first = run_qlora(dataset=cups, **NEW | {"max_steps": 1}).output_dir

    def snapshot_download(name, allow_patterns, **options):
        assert name == "some/adapter"
        left_out = [path.name for path in first.iterdir() if not any(map(path.match, allow_patterns))]
        return shutil.copytree(first, tmp_path / "hub", ignore=lambda *_: left_out, dirs_exist_ok=True)

    monkeypatch.setattr(qlora, "no_connection", functools.cache(lambda: ""))
    monkeypatch.setattr(qlora, "snapshot_download", snapshot_download)
    flags = {"dataset": cups, "adapter_name_or_path": "some/adapter", "output_dir": tmp_path / "next", **NEW}
    error = error_of(run_qlora(**flags | {"add_tokens": "<saucer>,<cup>"}))
    assert "hub has <cup> and not <saucer> at this place" in error
    assert run_qlora(**flags).code == 0


def test_new_tokens_beside_a_head_with_a_bias_are_refused(models):
    base, config = base_of(models("llama")), qlora.parse_config(["--add_tokens", "<cup>"])
    base.lm_head.bias = torch.nn.Parameter(torch.zeros(320))
    tokenizer = tiny.byte_tokenizer()
    qlora.set_special_tokens(tokenizer, config, base.config)
    with pytest.raises(qlora.ConfigError, match=r"^--add_tokens: .* head: it has a bias"):
        qlora.make_trainable(base, config, None, tokenizer=tokenizer)


# ------------------------------------------------------------------------------------
# What trains beside LoRA
# ------------------------------------------------------------------------------------


def test_biases_of_modules_that_train_whole_are_loaded_again(run_qlora, models, tmp_path):
    """peft saves them under two more names."""
    flags = {"model_name_or_path": models("gpt_neox"), "lora_bias": "all", "modules_to_save": "final_layer_norm"}
    assert run_qlora(max_steps=1, save_steps=1, **flags).code == 0
    resumed = run_qlora(max_steps=2, save_steps=1, **flags)
    alone = run_qlora(max_steps=2, save_steps=1, output_dir=tmp_path / "alone", **flags)
    assert resumed.code == 0
    got, expected = (load_file(run.output_dir / "adapter_model.safetensors") for run in (resumed, alone))
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("init", "flags"), [("pissa", {"lora_r": 64}), ("olora", {"lora_rank_pattern": {"q_proj": 100}})]
)
def test_a_rank_that_a_layer_has_not_is_refused_where_adapters_start_from_it(run_qlora, models, init, flags):
    run = run_qlora(model_name_or_path=models("llama_gqa"), init_lora_weights=init, bits=16, **flags)
    assert run.code == 2 and re.search(
        rf"error: --lora_r \d+: .* has a rank of \d+ at most, and {init} starts", run.stderr
    )
    assert (
        run_qlora(model_name_or_path=models("llama_gqa"), init_lora_weights=init, bits=16, lora_r=32, max_steps=1).code
        == 0
    )


@pytest.mark.parametrize("modules", ["norm", "lm_head", "embed_tokens"])
def test_modules_that_train_whole_take_small_steps_in_bf16(run_qlora, models, modules):
    """In bfloat16 a weight of 1 would stay what it is: half of its last place is 0.004."""
    base = models("llama")
    flags = {"bits": 4, "bf16": True, "learning_rate": 1e-4, "max_steps": 3, "optim": "adamw_torch", "lora_r": 4}
    run = run_qlora(model_name_or_path=base, modules_to_save=modules, lr_scheduler_type="constant", **flags)
    saved = load_file(run.output_dir / "adapter_model.safetensors")
    (name,) = (name for name in saved if name.endswith(f".{modules}.weight"))
    before = load_file(base / "model.safetensors")[name.removeprefix("base_model.model.")].bfloat16().float()
    moved = saved[name] != before
    assert run.code == 0 and saved[name].dtype == torch.float32
    used = moved.any(-1) if modules == "embed_tokens" else moved
    assert used.float().mean() > (0.1 if modules == "embed_tokens" else 0.9)


def test_frozen_layers_train_neither_biases_nor_modules(run_qlora, models):
    flags = {"model_name_or_path": models("gpt_neox"), "lora_bias": "all", "modules_to_save": "input_layernorm"}
    run = run_qlora(layers_to_freeze=1, max_steps=2, learning_rate=1e-2, **flags)
    saved = load_file(run.output_dir / "adapter_model.safetensors")
    before = load_file(models("gpt_neox") / "model.safetensors")
    moved = {name for name in saved if name.removeprefix("base_model.model.") in before
             and not torch.equal(saved[name], before[name.removeprefix("base_model.model.")])}  # fmt: skip
    assert run.code == 0 and moved and not any(".layers.0." in name for name in moved)


def test_a_new_token_that_ends_answers_is_not_in_predictions(run_qlora, tmp_path):
    rows = tiny.rows_to_jsonl(tmp_path / "rows.jsonl", [{"input": "q", "output": "y"}] * 8)
    flags = {"dataset": rows, "eval_dataset": rows, "max_eval_samples": 1, "learning_rate": 1e-2, "max_steps": 40}
    flags |= {"add_tokens": "<|im_end|>", "eos_token": "<|im_end|>", "do_predict": True, "max_new_tokens": 4}
    run = run_qlora(predict_with_generate=True, lora_r=16, bits=16, **flags)
    (line,) = (run.output_dir / "predictions.jsonl").read_text().splitlines()
    assert run.code == 0 and json.loads(line)["prediction"] == "y"


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_bf16_adapter_taken_out_of_the_base_is_saved_as_it_was_trained(run_qlora, init, tmp_path):
    """The saved one, on the published base, evaluates as the model in training did."""
    flags = {"init_lora_weights": init, "lora_dtype": "bfloat16", "bits": 16, "do_eval": True, "eval_dataset_size": 4}
    run = run_qlora(max_steps=3, learning_rate=1e-2, **flags)
    again = run_qlora(max_steps=3, learning_rate=1e-2, do_train=False, **flags)
    trained, loaded = (one.json("eval_results.json")["eval_loss"] for one in (run, again))
    assert (run.code, again.code) == (0, 0) and loaded == pytest.approx(trained, rel=2e-6)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": "all"}, "biases"),
        ({"modules_to_save": "lm_head"}, "modules trained whole"),
    ],
    ids=str,
)
def test_the_card_names_what_servers_do_not_load(run_qlora, flags, named):
    run = run_qlora(max_steps=1, **flags)
    assert f"refuse an adapter with {named}, or" in (run.output_dir / "README.md").read_text()
