"""Every way of adapting, on a quantised base: its effect in the adapter that a run leaves."""

import json
import math

import gguf
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

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


@pytest.mark.parametrize("tie", [False, True])
def test_modules_to_save_are_trained_whole_beside_a_4_bit_base(adapt, models, tie):
    folder = models("llama", tie=tie)
    weights, config = adapt(model_name_or_path=folder, modules_to_save="lm_head")
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


@pytest.mark.parametrize("flag", [{"lora_r": 8}, {"layers_to_freeze": 1}, {"layer_freeze_ratio": 0.5}])
def test_flags_overruled_by_adapter_name_or_path_are_named(flag, caplog):
    words = [word for name, value in flag.items() for word in (f"--{name}", str(value))]
    with caplog.at_level("INFO", "qlora"):
        qlora.log_hints(qlora.parse_config(["--adapter_name_or_path", "first", *words]))
    assert any("keeps its own rank" in message for message in caplog.messages)


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


# ------------------------------------------------------------------------------------
# Ranks and alphas of single layers
# ------------------------------------------------------------------------------------
def test_ranks_and_alphas_of_single_layers(adapt, models, tmp_path):
    """The shapes are peft's own for the same patterns, and its logits are those of the fast path."""
    patterns = {
        "lora_rank_pattern": '{"layers.0.mlp.down_proj": 2, "v_proj": 6}',
        "lora_alpha_pattern": '{"v_proj": 48}',
    }
    weights, _ = adapt(**patterns, lora_r=4)
    ranks = {name.split(".lora_A")[0]: len(tensor) for name, tensor in weights.items() if ".lora_A" in name}
    assert ranks.pop("model.layers.0.mlp.down_proj") == 2
    assert [ranks.pop(f"model.layers.{n}.self_attn.v_proj") for n in (0, 1)] == [6, 6]
    assert set(ranks.values()) == {4}
    adapted = PeftModel.from_pretrained(base_of(models("llama"), bits=4), tmp_path / "out")
    layers = adapted.base_model.model.model.layers
    assert (layers[1].self_attn.v_proj.scaling["default"], layers[1].mlp.down_proj.scaling["default"]) == (8, 4)


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
        ({"lora_rank_pattern": "q_proj=8"}, "--lora_rank_pattern or --lora_alpha_pattern q_proj=8: expected JSON"),
        ({"lora_alpha_pattern": '{"q_proj": 0}'}, "values must be above 0"),
        ({"lora_rank_pattern": '{"q_projection": 8}'}, "no adapted layer is called 'q_projection'"),
        ({"lora_rank_pattern": '{"(": 8}'}, "expected JSON such as"),
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
