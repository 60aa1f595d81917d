"""Tiny models, tokenizers and data for the tests: two layers, random weights, no network.

Every `write_*` function fills the folder `path`, creates it if missing, and returns it. Seeds are fixed and the
caller's random state is preserved, so two calls write the same weights and vocabulary.

    write_model(tmp_path, "llama", tokenizer="sentencepiece", tie=True)

To add a family, add a row to FAMILIES; to add a tokenizer, add a function and a row to TOKENIZERS.
"""

import csv
import io
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

# ------------------------------------------------------------------------------------
# 1. Data: text to train a vocabulary on, a few Alpaca rows, and rows to fine-tune on
# ------------------------------------------------------------------------------------

TEXT = """\
The lighthouse keeper counted the ships every evening and wrote their names in a thick green book.
On some evenings there were seven ships, on others only one, and in the winter of 1893 there were
none for twenty-four days. "A sea without ships," he said to his daughter, "is like a page without
words." She did not answer. She was learning to read, and every word on every page was a ship to
her.

How does a lighthouse work? A lamp stands in the middle of a large lens. The lens is made of many
rings of glass, and each ring bends the light a little, so that all of it leaves the tower in one
direction. A clockwork turns the lens, and sailors see a flash each time the beam passes over them.
The number of seconds between two flashes tells them which lighthouse they are looking at: 5
seconds, 10 seconds, 15.

Below is a list of things that were kept in the tower:
1. oil for the lamp, 300 litres;
2. bread, cheese, apples and salted fish;
3. a telescope, a compass and two clocks;
4. letters from the harbour office (not all of them opened).

What is the capital of France? The capital of France is Paris. What is the capital of Norway? The
capital of Norway is Oslo. What is two plus two? Two plus two is four. What is three plus four?
Three plus four is seven. Write a sentence about the weather. The weather was cold and clear, and
the wind came from the north-east. Translate the word into English: the word "phare" means
lighthouse.

The daughter grew up and became an engineer. She replaced the oil lamp with an electric one, and
the clockwork with a motor, and she measured everything: the current, the voltage, the temperature
of the glass, the height of the waves. In her reports she wrote short sentences. The motor works.
The lamp works. The lens is clean. The keeper is well. Nobody in the office ever read more than the
first line of a report, so she learned to put the important thing first and to explain it
afterwards.

When the keeper was old he asked her to read to him from the green book. She read the names of the
ships: the Albatross, the Margarethe, the North Star, the Patience, the Good Hope, the Little Anna.
He remembered where each of them had come from and what it had carried: timber, wool, coffee, coal,
machines, oranges, letters. "You see," he said, "every name is a story, and every story is longer
than its name." Then he slept, and the light went round and round over the dark water, as it always
had.

def flash(seconds, period=5):
    return seconds % period == 0

Après la pluie, le café était fermé; the señor, the naïve artist and the fräulein waited outside.
"""

ALPACA_ROWS: list[dict[str, str]] = [
    {"instruction": "Name the capital of France.", "input": "", "output": "Paris."},
    {
        "instruction": "Add the two numbers.",
        "input": "2 and 2",
        "output": "2 plus 2 is 4.",
    },
    {
        "instruction": "Write one sentence about the weather.",
        "input": "",
        "output": "The weather was cold and clear, and the wind came from the north-east.",
    },
    {
        "instruction": "Translate the word into English.",
        "input": "phare",
        "output": "lighthouse",
    },
    {
        "instruction": "List three things that were kept in the tower.",
        "input": "",
        "output": "1. oil for the lamp\n2. bread and cheese\n3. a telescope",
    },
    {
        "instruction": "Correct the spelling.",
        "input": 'He said: "the cafe is closd, señor".',
        "output": 'He said: "the café is closed, señor".',
    },
    {"instruction": "Say yes.", "input": "", "output": "Yes"},
    {
        "instruction": "How does a lighthouse work?",
        "input": "Answer for a child of six.",
        "output": "A big lamp turns round and round, and sailors see it flash in the dark.",
    },
]

_SHIPS = ("Albatross", "Margarethe", "North Star", "Patience", "Good Hope", "Little Anna")
_CARGO = ("timber", "wool", "coffee", "coal", "machines", "oranges", "letters")
_ASIDES = ("Please answer soon.", "I ordered it in May.", "My last letter was lost.", "Thanks!")
_NEWS = ("It left on Monday.", "The wind is good.", "We are sorry.", "Ask again in a week.")


def support_rows(n: int) -> list[dict[str, str]]:
    """`n` distinct customer questions with answers, as {input, output}.

    Each side has one to five sentences. The first k rows of a longer list equal `support_rows(k)`.
    """
    rng = random.Random(0)
    rows = []
    for number in range(n):
        ship, cargo = rng.choice(_SHIPS), rng.choice(_CARGO)
        question = [f"Order {number}: where is my {cargo}?", *_ASIDES[: rng.randrange(5)]]
        answer = [f"Your {cargo} is on the {ship}.", *_NEWS[: rng.randrange(5)]]
        rows.append({"input": " ".join(question), "output": " ".join(answer)})
    return rows


def rows_to_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object a line."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def rows_to_csv(path: Path, rows: Sequence[Mapping[str, Any]], delimiter: str = ",") -> Path:
    """Write the first row's keys as a header, then the rows. Pass a tab for .tsv."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_to_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write one parquet file with the types that pyarrow infers."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    return path


# ------------------------------------------------------------------------------------
# 2. Tokenizers
#
# byte and byte_bpe write tokenizer.json; the three others a SentencePiece tokenizer.model, as LLaMA-1 and -2 have it.
# Writers overwrite existing files, so they can run inside a model's folder.
# ------------------------------------------------------------------------------------

BOS, EOS, PAD = 256, 257, 258  # in byte_tokenizer(); "a" is 97 and "\n" is 10


def _wrap(
    backend: Tokenizer,
    special: dict[str, str | None],
    extra: Sequence[str],
) -> PreTrainedTokenizerFast:
    """Append special and reserved tokens to the vocabulary, in this order, each once."""
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokens = dict.fromkeys([*(token for token in special.values() if token), *extra])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def byte_tokenizer(
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str | None = "<pad>",
    unk: str | None = None,
    extra: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """One token for each UTF-8 byte, so that tests can spell out expected ids.

    The id of a byte is its value, 0..255 ("a" is 97). Special tokens follow from 256 in the order of the arguments,
    with the defaults `<s>` 256, `</s>` 257, `<pad>` 258. None takes no id, and a repeated token shares its id.
    Encoding adds no BOS.
    """
    alphabet = {char: byte for byte, char in _bytes_to_unicode().items()}
    return _wrap(
        Tokenizer(BPE(vocab=alphabet, merges=[])),
        {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk},
        extra,
    )


def _bytes_to_unicode() -> dict[int, str]:
    """GPT-2's characters for the 256 bytes: printable Latin-1 stays, the rest maps to U+0100 and up."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(moved)}


def write_byte(path: Path, **options: Any) -> Path:
    """Save `byte_tokenizer(**options)`."""
    byte_tokenizer(**options).save_pretrained(path)
    return path


def write_byte_bpe(
    path: Path,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str | None = "<pad>",
    unk: str | None = "<unk>",
    extra: Sequence[str] = (),
) -> Path:
    """A byte-level BPE of 508 learned tokens; special tokens follow as in `byte_tokenizer`.

    Any special token may be None, and `pad` may equal `eos`. `extra` is for reserved tokens such as
    `<|reserved_special_token_0|>`, which are special but have no role. Encoding adds no BOS.
    """
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=508,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    special = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk}
    _wrap(backend, special, extra).save_pretrained(path)
    return path


def write_bare_sentencepiece(path: Path) -> Path:
    """Only `tokenizer.model`: a SentencePiece BPE of 512 pieces, trained with LLaMA's settings.

    `<unk>` 0, `<s>` 1, `</s>` 2, then 256 byte pieces, then learned pieces. Next to a config.json of model type llama,
    AutoTokenizer reads such a folder and silently gives wrong ids.
    """
    import sentencepiece

    path.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=512,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        num_threads=1,
        minloglevel=2,
    )
    (path / "tokenizer.model").write_bytes(model.getvalue())
    return path


def write_sentencepiece_llama(path: Path) -> Path:
    """`tokenizer.model` and a tokenizer_config.json like LLaMA-2's: adds BOS, no pad token."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", **tokens, "add_bos_token": True}
    _write_json(write_bare_sentencepiece(path) / "tokenizer_config.json", config)
    return path


def write_early_llama(path: Path) -> Path:
    """An early LLaMA-1 conversion: a tokenizer class that never existed, and empty special tokens."""
    tokens = {"bos_token": "", "eos_token": "", "unk_token": ""}
    write_bare_sentencepiece(path)
    _write_json(path / "tokenizer_config.json", {"tokenizer_class": "LLaMATokenizer", **tokens})
    _write_json(path / "special_tokens_map.json", tokens)
    return path


TOKENIZERS: dict[str, Callable[..., Path]] = {
    "byte": write_byte,
    "byte_bpe": write_byte_bpe,
    "sentencepiece": write_sentencepiece_llama,
    "early_llama": write_early_llama,
    "bare_sentencepiece": write_bare_sentencepiece,
}


def write_tokenizer(path: Path, name: str, **options: Any) -> Path:
    """The tokenizer `name` of TOKENIZERS."""
    return TOKENIZERS[name](path, **options)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def _vocabulary(folder: Path) -> tuple[int, dict[str, int | None]]:
    """Size, and BOS and EOS ids, of the tokenizer in `folder`."""
    if not (folder / "tokenizer.json").exists():  # SentencePiece; AutoTokenizer may misread it
        return 512, {"bos_token_id": 1, "eos_token_id": 2}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return len(tokenizer), ids


# ------------------------------------------------------------------------------------
# 3. Models: hidden 64, intermediate 128, 2 layers, 4 heads, at most 512 positions
# ------------------------------------------------------------------------------------

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_GEMMA = {**_SHAPE, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": None}
_MPT = {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 512}
_FALCON = {k: v for k, v in _SHAPE.items() if k != "intermediate_size"} | {"ffn_hidden_size": 128}
_OPT = {k: v for k, v in _SHAPE.items() if k != "intermediate_size"} | {"ffn_dim": 128, "word_embed_proj_dim": 64}
_LFM2 = {**_SHAPE, "num_key_value_heads": 2, "block_auto_adjust_ff_dim": False}
_MOE = {
    **{**_SHAPE, "num_key_value_heads": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    **{"n_routed_experts": 4, "num_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    **{"n_group": 1, "topk_group": 1},
}
_MLA = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_QWEN3_NEXT = {
    **{**_MOE, "head_dim": 16, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"layer_types": ["linear_attention", "full_attention"]},
}
_LLAMA4 = {**_MOE, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128, "head_dim": 16}
_GEMMA3N = {
    **{**_GEMMA, "intermediate_size": [128, 128], "vocab_size_per_layer_input": 320, "num_kv_shared_layers": 0},
    **{"hidden_size_per_layer_input": 16, "laurel_rank": 8, "sliding_window": 64, "activation_sparsity_pattern": None},
    **{"layer_types": ["sliding_attention", "full_attention"]},
}
_SSM = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
_MAMBA = {**_SSM, "state_size": 8, "time_step_rank": 8}
_JAMBA = {
    **{**_SHAPE, "num_key_value_heads": 2, "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 8},
    **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
}
_FALCON_H1 = {
    **{**_SHAPE, "num_key_value_heads": 2, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    **{"mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 16},
}
_MINIMAX = {**_SHAPE, "num_key_value_heads": 2, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
_RWKV = {**_SSM, "attention_hidden_size": 64, "context_length": 512, "rescale_every": 1}
_GPT2 = {"n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}

# Family -> (model type, config values). The comments say what is special about it.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SHAPE),
    "llama_gqa": ("llama", {**_SHAPE, "num_key_value_heads": 2}),
    "mistral": ("mistral", {**_SHAPE, "num_key_value_heads": 2}),
    "qwen2": ("qwen2", {**_SHAPE, "num_key_value_heads": 2}),  # biases on q, k, v only
    "qwen3": ("qwen3", {**_SHAPE, "num_key_value_heads": 2, "head_dim": 16}),  # norms on q and k
    "gemma": ("gemma", _GEMMA),  # tied; norms are 1 + weight; embeddings times sqrt(hidden)
    "gemma2": ("gemma2", {**_GEMMA, "query_pre_attn_scalar": 16, "sliding_window": 64}),
    "gemma3": ("gemma3_text", {**_GEMMA, "query_pre_attn_scalar": 16, "sliding_window": 64}),  # and norms on q and k
    "olmo2": ("olmo2", {**_SHAPE, "num_key_value_heads": 2}),  # norms after the blocks, and on all of q and of k
    "granite": ("granite", {**_SHAPE, "logits_scaling": 3.0}),  # factors on embeddings, residuals and logits
    "cohere": ("cohere", {**_SHAPE, "logit_scale": 0.3}),  # tied; one norm a layer
    "lfm2": ("lfm2", {**_LFM2, "layer_types": ["conv", "full_attention"]}),  # tied; a convolution over the last tokens
    "mixtral": ("mixtral", {**_SHAPE, "num_key_value_heads": 2, "num_local_experts": 4}),  # experts stacked, 3-D
    "olmoe": ("olmoe", {**_SHAPE, "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("opt", _OPT),  # learned positions, taken from the mask; biases; no MLP module in the block
    "gpt_neox": ("gpt_neox", _SHAPE),  # biases; the head is called embed_out on disk, lm_head in memory
    "mpt": ("mpt", _MPT),  # ALiBi; no biases anywhere; tied
    "falcon": ("falcon", _FALCON),  # tied; one key-value head; FalconLinear subclasses Linear
    "gpt2": ("gpt2", _GPT2),  # tied; Conv1D, not Linear: the weight is transposed
    "glm4_moe": ("glm4_moe", {**_MOE, "head_dim": 16}),  # one layer dense, one of experts, with a shared one
    "deepseek_v3": ("deepseek_v3", {**_MOE, **_MLA}),  # and queries, keys and values of low rank
    "qwen2_moe": ("qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "head_dim": 16}),
    "granitemoe": ("granitemoe", {**_MOE, "num_local_experts": 4}),
    "phimoe": ("phimoe", {**_MOE, "num_local_experts": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}),
    "qwen3_next": ("qwen3_next", _QWEN3_NEXT),  # linear attention; a gate on the shared expert
    "llama4": ("llama4_text", {**_LLAMA4, "interleave_moe_layer_step": 2}),  # its router is a Linear that gives a tuple
    "gemma3n": ("gemma3n_text", _GEMMA3N),  # reads and clamps the weights of two linear layers
    "mamba": ("mamba", _MAMBA),  # reads the weights of three
    "jamba": ("jamba", {**_JAMBA, "use_mamba_kernels": False}),  # and of one, beside attention
    "falcon_h1": ("falcon_h1", _FALCON_H1),  # Mamba 2 and attention side by side
    "gpt_oss": ("gpt_oss", {**_MOE, "head_dim": 16, "num_local_experts": 4, "sliding_window": 64}),  # sinks; biases
    "minimax": ("minimax", {**_MINIMAX, "num_local_experts": 4}),  # linear attention whose cache ignores padding
    "rwkv": ("rwkv", _RWKV),  # no attention mask; divides two weights of a layer in an evaluation
}


def write_model(
    path: Path,
    family: str,
    *,
    tie: bool | None = None,
    tokenizer: str | Callable[[Path], Path] = "byte",
    dtype: str = "float32",
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """A causal language model of one of FAMILIES in safetensors, with a tokenizer beside it.

    Args:
        path: The folder.
        family: A key of FAMILIES.
        tie: Whether input and output embeddings are one tensor; None is the family's default.
        tokenizer: A key of TOKENIZERS, or a function that writes a tokenizer into a folder.
        dtype: Data type of the stored weights.
        seed: Seed of the weights.
        **config_overrides: Config values under the family's own names.
    """
    (TOKENIZERS[tokenizer] if isinstance(tokenizer, str) else tokenizer)(path)
    size, special_ids = _vocabulary(path)
    model_type, shape = FAMILIES[family]
    values: dict[str, Any] = {
        **shape,
        **special_ids,
        "vocab_size": -(-size // 64) * 64,  # rounded up, as real ones are
        "initializer_range": 0.1,
        **({} if tie is None else {"tie_word_embeddings": tie}),
        **config_overrides,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
        perturb(model)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    return path


def perturb(model: PreTrainedModel) -> None:
    """Move norms and biases away from exact ones and zeros, which would hide many mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def write_prequantised(path: Path, base: Path, **options: Any) -> Path:
    """`base` saved in 4 bit nf4 of bitsandbytes, with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options),
        device_map="cpu",
        dtype=torch.float32,
    )
    model.save_pretrained(path)
    for file in base.glob("*token*"):  # copied, as loading and saving would change some
        shutil.copy(file, path)
    return path


# ------------------------------------------------------------------------------------
# 4. A model with remote code
# ------------------------------------------------------------------------------------

_TOY_CONFIGURATION = """\
from transformers import PretrainedConfig


class ToyConfig(PretrainedConfig):
    model_type = "toy"

    def __init__(self, vocab_size=320, hidden_size=64, num_hidden_layers=2, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)
"""

_TOY_MODELING = '''\
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput

from .configuration_toy import ToyConfig


class ToyBlock(GradientCheckpointingLayer):
    """One head of causal attention and a small MLP; no positions, no cache."""

    def __init__(self, size):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.wqkv = nn.Linear(size, 3 * size, bias=False)
        self.wo = nn.Linear(size, size, bias=False)
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size)

    def forward(self, x, mask):
        q, k, v = self.wqkv(self.norm(x)).chunk(3, dim=-1)  # (B, T, C) each
        x = x + self.wo(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class ToyForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = ToyConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["ToyBlock"]

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = [ToyBlock(config.hidden_size) for _ in range(config.num_hidden_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.1)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        x = self.embed_tokens(input_ids)  # (B, T, C)
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        if attention_mask is not None:  # a padded query attends to itself, else its row is NaN
            eye = torch.eye(length, dtype=torch.bool, device=x.device)
            mask = mask & (attention_mask[:, None, :].bool() | eye)
        for block in self.blocks:
            x = block(x, mask)
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)
'''


def write_remote_code_model(path: Path) -> Path:
    """A toy model that loads only with `trust_remote_code=True`; linears wqkv, wo, up, down.

    It supports gradient checkpointing, and generation without a cache.
    """
    from safetensors.torch import save_file

    size, special_ids = _vocabulary(write_byte(path))
    size = -(-size // 64) * 64
    (path / "configuration_toy.py").write_text(_TOY_CONFIGURATION)
    (path / "modeling_toy.py").write_text(_TOY_MODELING)
    config = {
        "architectures": ["ToyForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_toy.ToyConfig",
            "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM",
        },
        "dtype": "float32",
        "hidden_size": 64,
        "model_type": "toy",
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
        "vocab_size": size,
        **special_ids,
    }
    _write_json(path / "config.json", config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        perturb(model)
    # Not save_pretrained: it would rewrite config.json and copy the code from the modules cache.
    save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
    return path


# ------------------------------------------------------------------------------------
# 5. GGUF
# ------------------------------------------------------------------------------------

GGUF_FILE = "tiny.gguf"


def write_gguf(
    path: Path,
    base: Path | None = None,
    weights: Literal["F32", "F16", "Q8_0"] = "F32",
) -> Path:
    """`tiny.gguf`: a llama in one file, SentencePiece tokenizer included.

    Args:
        path: The folder.
        base: A llama with a SentencePiece tokenizer; by default a new one.
        weights: Storage type of matrices. With F32 the logits equal those of `base`.
    """
    import gguf
    from sentencepiece import SentencePieceProcessor

    if base is None:
        with tempfile.TemporaryDirectory() as folder:
            base = write_model(Path(folder), "llama", tokenizer="sentencepiece")
            return write_gguf(path, base, weights)
    path.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

    writer = gguf.GGUFWriter(path / GGUF_FILE, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)

    pieces = SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    ids = range(pieces.vocab_size())
    assert config.vocab_size == len(ids), "embedding and token list must have one size"
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(i) for i in ids])
    writer.add_token_scores([pieces.get_score(i) for i in ids])
    writer.add_token_types([_gguf_token_type(pieces, i) for i in ids])
    writer.add_unk_token_id(pieces.unk_id())
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_add_bos_token(True)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # absent means tied
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _interleave_rope(tensor, heads if "q_proj" in name else kv_heads)
        kind = gguf.GGMLQuantizationType[weights if tensor.dim() == 2 else "F32"]  # norms: F32
        data = gguf.quants.quantize(tensor.contiguous().numpy(), kind)
        gguf_name = names.get_name(name, (".weight",))  # with the suffix
        assert gguf_name, name
        writer.add_tensor(gguf_name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_gguf_with_tokenizer(file: Path, tokenizer: Path, splits: str) -> Path:
    """A llama's header with the byte-level BPE of a folder, whose text is split as `splits` says, and no weights."""
    import gguf

    model = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    added = {token["content"]: token["id"] for token in model["added_tokens"]}
    words = sorted(model["model"]["vocab"] | added, key=(model["model"]["vocab"] | added).__getitem__)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splits)
    writer.add_token_list(words)
    writer.add_token_types([3 if word in added else 1 for word in words])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["model"]["merges"]])
    writer.add_bos_token_id(added["<s>"])
    writer.add_eos_token_id(added["</s>"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _gguf_token_type(pieces: Any, token_id: int) -> int:
    """GGUF's TokenType of a SentencePiece id."""
    if pieces.is_unknown(token_id):
        return 2
    if pieces.is_control(token_id):
        return 3
    return 6 if pieces.is_byte(token_id) else 1


def _interleave_rope(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF pairs rotary channels (0, 1), (2, 3), ...; transformers pairs (i, i + head_dim / 2)."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
