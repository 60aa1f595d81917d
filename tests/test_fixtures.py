"""The builders of tiny.py, which the other tests rely on: each makes what it promises, and its result loads."""

import hashlib
import logging
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import sentencepiece
import tiny
import torch
import transformers
from conftest import preserved_state
from packaging import version
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedModel,
)

TIED = {
    "mpt",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt2",
    "lfm2",
    "cohere",
    "opt",
    "gemma3n",
    "mamba",
}  # unless told otherwise


def load(folder: Path, **options) -> PreTrainedModel:
    """The model in `folder`; missing or surplus weights are an error, not a warning."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0]  # (T, V)


# ------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [None, True, False])
@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name != "rwkv"])  # it changes weights in place
def test_a_model_of_each_family_trains(models, family, tie):
    model = load(models(family, tie=tie))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family in TIED if tie is None else tie)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 320
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tiny.BOS, tiny.EOS)

    ids = torch.tensor([[tiny.BOS, *b"Hello world", tiny.EOS]])
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    assert output.logits.std() > 0.2  # large enough for a difference to show
    trained = [p for n, p in model.named_parameters() if not (family == "phimoe" and "router" in n)]  # by its own loss
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_config_overrides_dtype_and_seed(tmp_path):
    folder = tiny.write_model(tmp_path, "llama", dtype="bfloat16", num_hidden_layers=3, seed=1)
    model = load(folder)
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 3


def test_builders_are_deterministic_and_keep_the_random_state(tmp_path):
    state = torch.get_rng_state()
    first = tiny.write_model(tmp_path / "a", "llama", tokenizer="byte_bpe")
    second = tiny.write_model(tmp_path / "b", "llama", tokenizer="byte_bpe")
    other = tiny.write_model(tmp_path / "c", "llama", tokenizer="byte_bpe", seed=1)
    digests = [
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
        for folder in (first, second, other)
    ]
    assert digests[0] == digests[1]
    assert digests[0]["model.safetensors"] != digests[2]["model.safetensors"]
    assert torch.equal(torch.get_rng_state(), state)


def test_remote_code_needs_trust(models):
    folder = models("remote_code")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = load(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, padding_side="left")
    batch = tokenizer(["Hi", "Hello"], return_tensors="pt", padding=True)
    generated = model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert generated.shape == (2, 5 + 4)
    alone = tokenizer(["Hi"], return_tensors="pt")["input_ids"]
    alone = model.generate(input_ids=alone, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert generated[0, -6:].tolist() == alone[0].tolist()  # padding has no effect

    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_prequantised_loads_in_4_bit(models):
    import bitsandbytes

    model = load(models("prequantised"))
    assert isinstance(model.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    assert isinstance(model.lm_head, torch.nn.Linear) and model.lm_head.weight.is_floating_point()
    ids = AutoTokenizer.from_pretrained(models("prequantised"))("Hello")["input_ids"]
    assert ids == list(b"Hello")
    error = (logits_of(model, ids) - logits_of(load(models("llama")), ids)).abs().max()
    assert 0.01 < error < 2


@pytest.mark.parametrize(
    ("family", "options", "weights", "tolerance"),
    [
        ("llama", {}, "F32", 0),
        ("llama_gqa", {"tie": True}, "F32", 0),
        ("llama", {}, "F16", 0.01),
        ("llama", {}, "Q8_0", 0.2),
    ],
)
def test_gguf_equals_its_base(models, family, options, weights, tolerance):
    base = models(family, tokenizer="sentencepiece", **options)
    folder = models("gguf", base=base, weights=weights)
    model = load(folder, gguf_file=tiny.GGUF_FILE)
    ids = [1, 392, 443, 454, 346, 13, 497]
    error = (logits_of(model, ids) - logits_of(load(base), ids)).abs().max()
    assert error <= tolerance

    ours = AutoTokenizer.from_pretrained(folder, gguf_file=tiny.GGUF_FILE)
    theirs = AutoTokenizer.from_pretrained(base)
    for line in tiny.TEXT.replace("    ", "").splitlines():  # leading spaces: see the SentencePiece test
        got, expected = (t(line, add_special_tokens=False)["input_ids"] for t in (ours, theirs))
        assert got == expected, line


def test_gguf_without_a_base(models):
    assert [file.name for file in models("gguf").iterdir()] == [tiny.GGUF_FILE]


# ------------------------------------------------------------------------------------
# Tokenizers
# ------------------------------------------------------------------------------------


def test_ids_of_the_byte_tokenizer_are_bytes(byte_tokenizer, tokenizers):
    assert byte_tokenizer("ab c\né")["input_ids"] == [97, 98, 32, 99, 10, 0xC3, 0xA9]
    assert byte_tokenizer.decode([97, 98, 32, 99, 10, 0xC3, 0xA9]) == "ab c\né"
    assert byte_tokenizer("<s>a</s><pad>")["input_ids"] == [tiny.BOS, 97, tiny.EOS, tiny.PAD]
    assert (tiny.BOS, tiny.EOS, tiny.PAD, len(byte_tokenizer)) == (256, 257, 258, 259)
    saved = AutoTokenizer.from_pretrained(tokenizers("byte", bos=None, pad="</s>", unk="<unk>"))
    assert saved.bos_token is None
    assert (saved.eos_token_id, saved.pad_token_id, saved.unk_token_id) == (256, 256, 257)
    assert len(saved) == 258


def test_byte_bpe_special_tokens(tokenizers):
    tokenizer = AutoTokenizer.from_pretrained(tokenizers("byte_bpe"))
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert [*special, tokenizer.unk_token_id] == [508, 509, 510, 511]
    assert tokenizer.decode(tokenizer(tiny.TEXT)["input_ids"]) == tiny.TEXT
    assert len(tokenizer(tiny.TEXT)["input_ids"]) < len(tiny.TEXT) / 2

    reserved = "<|reserved_special_token_0|>"
    path = tokenizers("byte_bpe", pad=None, unk=None, extra=(reserved,))
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.pad_token is None and tokenizer.unk_token is None
    assert tokenizer(f"a{reserved}")["input_ids"][1:] == [510]
    assert tokenizer.all_special_tokens == ["<s>", "</s>"]
    assert tokenizer.added_tokens_decoder[510].special


def test_sentencepiece_ids_equal_the_librarys(tokenizers):
    folder = tokenizers("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert (model.vocab_size(), model.unk_id(), model.bos_id(), model.eos_id()) == (512, 0, 1, 2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (*tiny.TEXT.splitlines(), tiny.TEXT, "日本 🙂", "a\n\nb"):
        if not text.startswith("  "):  # LlamaTokenizer merges leading spaces, sentencepiece does not
            assert tokenizer(text)["input_ids"] == [1, *model.encode(text)], text
    assert tokenizer.pad_token is None


def test_bare_sentencepiece_is_misread_by_auto_tokenizer(models):
    folder = models("llama", tokenizer="bare_sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    expected = model.encode("Hello ship")
    if version.parse(transformers.__version__) < version.parse("5.24"):  # which reads it right
        assert AutoTokenizer.from_pretrained(folder)("Hello ship")["input_ids"] != expected
    assert LlamaTokenizer.from_pretrained(folder)("Hello ship")["input_ids"] == expected


def test_early_llama_has_no_usable_special_tokens(models):
    folder = models("llama", tokenizer="early_llama")
    with pytest.raises(RecursionError):  # an empty unk token is looked up as the unk token
        AutoTokenizer.from_pretrained(folder)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = LlamaTokenizer.from_pretrained(folder, **tokens)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


# ------------------------------------------------------------------------------------
# Data and the runner
# ------------------------------------------------------------------------------------


def test_data_files_hold_the_same_rows(data_dir):
    from datasets import load_dataset

    for kind in ("json", "csv", "parquet"):
        file = data_dir / f"support.{'jsonl' if kind == 'json' else kind}"
        assert load_dataset(kind, data_files=str(file), split="train").to_list() == (tiny.support_rows(24))
    rows = tiny.support_rows(24)
    assert rows[:5] == tiny.support_rows(5)
    assert len({row["input"] for row in rows}) == 24
    assert {len(row["output"]) // 20 for row in rows} >= {1, 2, 3, 4}


def test_folders_are_built_once(models):
    assert models("llama") == models("llama") != models("llama", seed=1)


def test_the_hub_is_off():
    import huggingface_hub.constants

    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert os.environ["HF_HOME"] == huggingface_hub.constants.HF_HOME


def test_preserved_state_restores_everything():
    logger, numbers = logging.getLogger("qlora"), (random.getstate(), torch.get_rng_state())
    handlers, level, sigterm = list(logger.handlers), logger.level, signal.getsignal(signal.SIGTERM)
    with preserved_state():
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.DEBUG)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        torch.set_default_dtype(torch.float64)
        torch.rand(1)
        random.random()
        os.environ["LOCAL_RANK"] = "0"
    assert logger.handlers == handlers and logger.level == level
    assert signal.getsignal(signal.SIGTERM) is sigterm
    assert torch.get_default_dtype() == torch.float32
    assert random.getstate() == numbers[0] and torch.equal(torch.get_rng_state(), numbers[1])
    assert "LOCAL_RANK" not in os.environ


def test_run_qlora_passes_flags_and_captures(run_qlora, monkeypatch, tmp_path):
    import qlora

    seen = []

    def main(argv):
        seen.append((argv, torch.rand(1).item()))
        print("error: no", file=sys.stderr)
        return 2

    monkeypatch.setattr(qlora, "main", main, raising=False)
    run = run_qlora("--debug", do_eval=True, max_steps=None, rope_scaling={"factor": 2})
    assert (run.code, run.stderr, run.stdout) == (2, "error: no\n", "")
    assert run.output_dir == tmp_path / "out"
    argv = " ".join(seen[0][0])
    assert argv.startswith("--debug --model_name_or_path ")
    assert "--do_eval True" in argv and "--max_steps" not in argv
    assert seen[0][0][-1] == '{"factor": 2}'
    run_qlora()
    assert seen[0][1] != seen[1][1]  # the second run starts from another random state
