"""Merging: the weights by hand, what the folder loads as, and when nothing is written."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import safetensors.torch
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import qlora

ROOT = Path(__file__).resolve().parent.parent
IDS = torch.tensor([[tiny.BOS, *b"Order 3: where is my coffee?"]])
SCALE = 16 / 4  # lora_alpha / lora_r


@pytest.fixture
def merged_run(run_qlora, tmp_path):
    """`merged_run(**flags)` -> (run, folder of the merged model), after four steps with a large learning rate."""

    def run(**flags):
        flags = {"merged_output_dir": tmp_path / "merged", "learning_rate": 1e-2, "save_strategy": "no", **flags}
        return run_qlora(**flags), flags["merged_output_dir"]

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def plain(folder: Path, **options):
    """As transformers alone loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits[0].float()


def deltas(adapter: Path) -> dict[str, torch.Tensor]:
    """s B A of every layer, by the name of its weight."""
    parts = load_file(adapter / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in parts if name.endswith(".lora_A.weight")]
    return {
        f"{name.removeprefix('base_model.model.')}.weight": SCALE
        * parts[f"{name}.lora_B.weight"]
        @ parts[f"{name}.lora_A.weight"]
        for name in names
    }


def error_of(run) -> str:
    lines = run.stderr.splitlines()
    assert run.code == 2 and "Traceback" not in run.stderr
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


# ------------------------------------------------------------------------------------
# What is written
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "expected"),
    [("float32", torch.bfloat16), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_the_weights_are_base_plus_adapter_in_16_bit(merged_run, models, stored, expected):
    base = models("llama", dtype=stored)
    run, folder = merged_run(model_name_or_path=base, max_shard_size="100KB")
    assert run.code == 0
    before, after, change = weights(base), weights(folder), deltas(run.output_dir)
    assert after.keys() == before.keys() and len(change) == 14
    for name, tensor in after.items():
        assert tensor.dtype == expected
        merged = before[name].float() + change.get(name, 0)
        # the base is rounded, the change is rounded, and so is their sum
        rounding = torch.finfo(expected).eps
        assert torch.allclose(tensor.float(), merged, rtol=rounding, atol=rounding * merged.abs().max()), name
        assert torch.equal(tensor, before[name].to(expected)) == (name not in change), name
    assert max(change[name].abs().max() for name in change) > 0.05  # far above what is tolerated


def test_plain_transformers_loads_the_merged_folder(merged_run, models, tmp_path):
    run, folder = merged_run(max_shard_size="100KB", bf16=True)
    names = {path.name for path in folder.iterdir()}
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1 and all(path.stat().st_size < 100_000 for path in shards)
    assert names - {path.name for path in shards} == {
        *("config.json", "generation_config.json", "merged.json", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert not list(tmp_path.glob(".*"))
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["use_cache"] is True and "quantization_config" not in config
    adapted = PeftModel.from_pretrained(plain(models("llama"), dtype=torch.float32), run.output_dir)
    got, expected, base = logits(plain(folder)), logits(adapted), logits(plain(models("llama")))
    assert (got - expected).abs().max() < 0.1 < 1 < (expected - base).abs().max()
    text = "A sea without ships </s>, he said: café"
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(models("llama"))(text)
    metrics = run.json("metrics.json")
    assert 0 < metrics["merge_difference"] < metrics["merge_rounding"]
    assert f"at most {metrics['merge_largest_difference']:.3g}" in run.stderr


def test_finished_run_is_merged_without_training(merged_run, run_qlora, tmp_path, monkeypatch):
    first, folder = merged_run()
    monkeypatch.setattr(qlora, "load_model", None)  # no quantised model is loaded for it
    monkeypatch.setattr(qlora, "prepare", None)
    again, alone = merged_run(merged_output_dir=tmp_path / "alone", do_train=False)
    rerun, third = merged_run(merged_output_dir=tmp_path / "third")  # what is completed is used
    assert (first.code, again.code, rerun.code) == (0, 0, 0)
    for other in (alone, third):
        assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(folder).items())


def test_an_adapter_that_was_trained_with_dropout(merged_run, models):
    """Which is off while the merged model is compared."""
    run, folder = merged_run(lora_dropout=0.5)
    assert run.code == 0
    with_adapter = PeftModel.from_pretrained(plain(models("llama")), run.output_dir).eval()
    assert torch.allclose(logits(plain(folder, dtype=torch.float32)), logits(with_adapter), atol=0.1)


def test_a_merged_model_is_evaluated_on_the_rows_that_its_run_held_out(merged_run, run_qlora, tmp_path):
    """Wherever it lies; the loss differs by what merging rounds."""
    run, folder = merged_run(do_eval=True, bits=16)
    moved = folder.rename(tmp_path / "moved")
    flags = {"model_name_or_path": moved, "bits": 16, "do_train": False, "output_dir": tmp_path / "alone"}
    alone = run_qlora(**flags, do_eval=True)
    found, expected = (each.json("eval_results.json") for each in (alone, run))
    assert "a tenth of 24 rows, 2, is held out" in alone.stderr and "trained on these rows" not in alone.stderr
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-2)


def test_packed_rows_are_merged_too(merged_run):
    run, folder = merged_run(packing=True, do_eval=False)
    assert run.code == 0 and weights(folder)


def test_any_adapter_can_be_merged_by_its_path(merged_run, run_qlora, tmp_path, data_dir):
    adapter = run_qlora(output_dir=tmp_path / "adapter", learning_rate=1e-2, bits=16).output_dir
    run, folder = merged_run(do_train=False, adapter_name_or_path=adapter, do_eval=True)
    assert run.code == 0 and run.json("metrics.json")["eval_loss"] > 0
    assert plain(folder)


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantised_base_is_the_one_used_in_training(merged_run, models, tmp_path, bits):
    flags = {"quant_type": "fp4", "double_quant": False} if bits == 4 else {}
    run, folder = merged_run(bits=bits, merge_base="dequantized", **flags)
    original = merged_run(bits=bits, do_train=False, merged_output_dir=tmp_path / "original", **flags)[1]
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)
    eight = BitsAndBytesConfig(load_in_8bit=True)
    options = {"device_map": {"": "cpu"}, "dtype": torch.float32}
    base = plain(models("llama"), quantization_config=four if bits == 4 else eight, **options)
    seen = {
        f"{name}.weight": module
        for name, module in base.named_modules()
        if type(module).__module__.startswith("bitsandbytes")
    }
    change, after = deltas(run.output_dir), weights(folder)
    assert seen.keys() == change.keys()
    for name, module in seen.items():
        if bits == 4:
            from bitsandbytes.functional import dequantize_4bit

            value = dequantize_4bit(module.weight.data, module.weight.quant_state)
        else:
            value = module.weight.data.float() * module.weight.SCB.reshape(-1, 1) / 127
        expected = value.float() + change[name]
        assert torch.allclose(after[name].float(), expected, rtol=2**-7, atol=2**-7 * expected.abs().max()), name
    trained = logits(PeftModel.from_pretrained(base, run.output_dir))
    near, far = ((logits(plain(path, dtype=torch.float32)) - trained).std() for path in (folder, original))
    assert near < far * (0.2 if bits == 4 else 0.8)


@pytest.mark.parametrize(
    ("modules_to_save", "tied"),
    [(None, True), ("embed_tokens", False), ("lm_head", False), ("embed_tokens,lm_head", False)],
)
def test_tied_heads_stay_tied_unless_one_was_trained(merged_run, models, modules_to_save, tied):
    base = models("llama", tie=True)
    run, folder = merged_run(model_name_or_path=base, modules_to_save=modules_to_save)
    assert run.code == 0
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] == tied
    after, stored = weights(folder), load_file(run.output_dir / "adapter_model.safetensors")
    assert ("lm_head.weight" in after) == (not tied)
    start = weights(base)["model.embed_tokens.weight"]
    for name in ("model.embed_tokens", "lm_head"):
        if f"{name}.weight" in after:
            expected = stored.get(f"base_model.model.{name}.weight", start).bfloat16()
            assert torch.equal(after[f"{name}.weight"], expected)
    model = plain(folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_dora_scales_every_row_to_its_magnitude(merged_run, models):
    run, folder = merged_run(use_dora=True)
    before, after, change = weights(models("llama")), weights(folder), deltas(run.output_dir)
    parts = load_file(run.output_dir / "adapter_model.safetensors")
    for name, delta in change.items():
        whole = before[name].bfloat16().float() + delta
        magnitude = parts[f"base_model.model.{name.removesuffix('weight')}lora_magnitude_vector"]
        expected = whole * (magnitude / whole.norm(dim=1))[:, None]
        assert torch.allclose(after[name].float(), expected, rtol=2**-6, atol=2**-7 * expected.abs().max()), name


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("gpt2", {}),  # Conv1D
        ("falcon", {"merge_base": "dequantized", "do_train": None}),
        ("gpt_neox", {"lora_bias": "all"}),
        ("qwen2", {"lora_bias": "lora_only", "lora_modules": "attn", "layers_to_freeze": 1}),
        ("gemma2", {"use_rslora": True}),
    ],
)
def test_families(merged_run, models, family, flags):
    run, folder = merged_run(model_name_or_path=models(family), **flags)
    assert run.code == 0
    config = parse_base(models(family), **flags)
    adapted = PeftModel.from_pretrained(config, run.output_dir).eval()
    assert (logits(plain(folder)) - logits(adapted)).abs().max() < 0.15


def parse_base(folder: Path, **flags):
    """The base that the adapter was merged into, in float32."""
    options = {"dtype": torch.float32, "device_map": {"": "cpu"}}
    if flags.get("merge_base") != "dequantized":
        return plain(folder, **options)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    with qlora.QUIRKS["falcon"]():
        return plain(folder, quantization_config=four, **options)


def test_a_gguf_base(merged_run, models, tmp_path):
    base = models("llama", tokenizer="sentencepiece")
    file = models("gguf", base=base) / tiny.GGUF_FILE
    run, folder = merged_run(model_name_or_path=file, cache_dir=tmp_path / "cache")
    assert run.code == 0
    before, after, change = weights(base), weights(folder), deltas(run.output_dir)
    for name, delta in change.items():
        expected = before[name] + delta
        assert torch.allclose(after[name].float(), expected, rtol=2**-7, atol=2**-7 * expected.abs().max()), name


def test_a_base_that_is_quantised_already_is_dequantised(merged_run, models):
    run, folder = merged_run(model_name_or_path=models("prequantised"))
    assert run.code == 0 and "quantised already" in run.stderr
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.bfloat16}
    adapted = PeftModel.from_pretrained(plain(models("prequantised"), dtype=torch.float32), run.output_dir)
    assert (logits(plain(folder)) - logits(adapted)).abs().max() < 0.1


def test_llama_cpp_finds_every_tensor_and_a_row_for_every_token(merged_run, models):
    """Its converter names tensors by gguf's table, and wants no token beyond the embedding."""
    base = models("llama", tokenizer="sentencepiece")
    run, folder = merged_run(model_name_or_path=base)
    assert run.code == 0
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert all(names.get_name(name, (".weight",)) for name in weights(folder))
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert weights(folder)["model.embed_tokens.weight"].shape[0] == rows == 512
    assert max(AutoTokenizer.from_pretrained(folder).get_vocab().values()) < rows
    assert (folder / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()


# ------------------------------------------------------------------------------------
# What is refused
# ------------------------------------------------------------------------------------


def test_an_adapter_that_changes_nothing_is_not_merged(merged_run, tmp_path):
    run, folder = merged_run(learning_rate=0)  # B stays zero
    assert "changed nothing" in error_of(run) and str(folder) in error_of(run)
    assert not folder.exists() and not list(tmp_path.glob(".*"))
    assert (run.output_dir / "completed").exists()


@pytest.mark.parametrize("wrong", ["another adapter", "a weight on disk"])
def test_wrong_merge_is_not_written(merged_run, tmp_path, monkeypatch, wrong):
    if wrong == "another adapter":
        merge = PeftModel.merge_and_unload if hasattr(PeftModel, "merge_and_unload") else None
        assert merge is None  # peft hands it on to the tuner
        from peft.tuners.lora import Linear

        delta = Linear.get_delta_weight
        monkeypatch.setattr(Linear, "get_delta_weight", lambda *a: 1.5 * delta(*a))
    else:
        save = safetensors.torch.save_file

        def damaged(tensors, path, *args, **kwargs):
            name = "model.layers.1.mlp.down_proj.weight"
            return save({**tensors, name: -tensors[name]} if name in tensors else tensors, path, *args, **kwargs)

        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", damaged)
    run, folder = merged_run()
    assert "rounding explains" in error_of(run)
    assert not folder.exists() and not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    run, folder = merged_run()  # the trained adapter is there, and is merged now
    assert run.code == 0 and "used, not trained again" in run.stderr and folder.exists()


def test_a_full_disk_leaves_nothing_half_written(merged_run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    run, folder = merged_run()
    assert str(folder) in error_of(run) and os.strerror(errno.ENOSPC) in error_of(run)
    assert not folder.exists() and not list(tmp_path.glob(".*"))
    assert (run.output_dir / "completed").exists()


def test_a_folder_that_is_not_empty_is_refused_before_anything_is_trained(merged_run, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    run, folder = merged_run()
    assert str(folder) in error_of(run) and "not empty" in error_of(run)
    assert not run.output_dir.exists() and (folder / "mine.txt").read_text() == "mine"


def test_the_same_command_again_finds_the_merged_model(merged_run, tmp_path):
    """Another adapter, or another way of merging, does not."""
    first, folder = merged_run()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again, _ = merged_run()
    alone, _ = merged_run(do_train=False)
    assert (first.code, again.code, alone.code) == (0, 0, 0)
    assert f"{folder} holds this adapter merged already" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert again.json("metrics.json")["merge_difference"] == first.json("metrics.json")["merge_difference"]
    for flags in ({"merge_base": "dequantized"}, {"output_dir": tmp_path / "other"}, {"max_shard_size": "1MB"}):
        assert "not empty" in error_of(merged_run(**flags)[0])
    record = json.loads((folder / "merged.json").read_text())
    del record["run"]  # as an earlier version wrote it
    (folder / "merged.json").write_text(json.dumps(record))
    assert f"{folder} holds this adapter merged already" in merged_run()[0].stderr
    for other in ("[]", None):  # by whom or of what is not known
        (folder / "merged.json").unlink() if other is None else (folder / "merged.json").write_text(other)
        assert "not empty" in error_of(merged_run()[0])


def test_an_empty_folder_is_filled(merged_run, tmp_path):
    (tmp_path / "merged").mkdir()
    run, folder = merged_run(max_steps=1)
    assert run.code == 0 and plain(folder)


def test_a_link_to_an_empty_folder_is_filled(merged_run, tmp_path):
    """What a run that was killed left beside it is removed."""
    (tmp_path / "there").mkdir()
    (tmp_path / ".merging-there" / "there").mkdir(parents=True)
    (tmp_path / ".merging-there" / ".qlora.lock").touch()
    (tmp_path / "merged").symlink_to(tmp_path / "there")
    run, folder = merged_run()
    assert run.code == 0 and weights(folder) and not list(tmp_path.glob(".*")) and not list(folder.glob(".*"))


def test_the_working_folder_is_refused_before_anything_is_trained(merged_run, tmp_path, monkeypatch):
    """It can't be replaced by the merged model."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run, _ = merged_run(merged_output_dir=".")
    assert f"--merged_output_dir {tmp_path / 'here'}" in error_of(run) and not (tmp_path / "out").exists()


def test_merging_without_an_adapter_is_an_error(merged_run):
    assert "no adapter" in error_of(merged_run(do_train=False)[0])


def test_adapter_of_another_model_is_an_error(merged_run, run_qlora, models, tmp_path):
    adapter = run_qlora(output_dir=tmp_path / "adapter", bits=16, max_steps=1).output_dir
    base = models("llama_gqa")
    run, folder = merged_run(do_train=False, adapter_name_or_path=adapter, model_name_or_path=base)
    assert str(adapter) in error_of(run) and str(base) in error_of(run) and not folder.exists()


# ------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------

PEAK = """
import resource, sys
sys.path.insert(0, sys.argv.pop(1))
import qlora, torch
torch.set_num_threads(1)
from transformers import LlamaForCausalLM
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = qlora.main(sys.argv[1:])
print(code, before * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.ci
def test_merging_holds_one_model_in_memory(models, run_qlora, data_dir, tmp_path):
    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 8}
    base = tiny.write_model(tmp_path / "base", "llama", dtype="bfloat16", **size)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    config = qlora.parse_config(["--model_name_or_path", str(base), "--bits", "16", "--bf16"])
    model = qlora.load_model(config, qlora.load_model_config(config, str(base)), str(base))
    adapted = qlora.make_trainable(model, config, None)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(tmp_path / "adapter")
    del model, adapted
    flags = ["--model_name_or_path", base, "--adapter_name_or_path", tmp_path / "adapter", "--do_train", "False"]
    flags += ["--dataset", data_dir / "support.jsonl", "--output_dir", tmp_path / "out"]
    flags += ["--merged_output_dir", tmp_path / "merged", "--max_shard_size", "50MB"]
    words = [sys.executable, "-c", PEAK, ROOT, *flags]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    code, before, after = map(int, done.stdout.split()[-3:])  # DeepSpeed, where it is installed, greets there first
    assert code == 0, done.stderr
    assert size > 380e6
    assert (after - before) / size < 1.6
