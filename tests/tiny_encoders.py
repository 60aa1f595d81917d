"""Tiny masked language models: BERT, RoBERTa, DeBERTa-v2 and ESM, each with the tokenizer of its family.

    write_encoder(tmp_path, "bert", **config values)

Two layers of hidden size 64, random weights from a fixed seed, special tokens with the ids of the published models.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    BertTokenizer,
    DebertaV2Tokenizer,
    EsmTokenizer,
    PreTrainedTokenizerBase,
    RobertaTokenizer,
)

BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
DEBERTA_SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
AMINO_ACIDS = "LAGVSERTIDPKQNFYMHWC"
ESM_TOKENS = ["<cls>", "<pad>", "<eos>", "<unk>", *AMINO_ACIDS, *"XBUZO.-", "<null_1>", "<mask>"]  # the 33 of ESM-1b


def _train_tokenizer(model: Any, pre_tokenizer: Any, trainer: Any) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.train_from_iterator(tiny.TEXT.splitlines(), trainer)
    return backend


def bert_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """WordPiece, lower case; no BOS and no EOS."""
    trainer = trainers.WordPieceTrainer(vocab_size=320, special_tokens=BERT_SPECIAL, show_progress=False)
    backend = _train_tokenizer(models.WordPiece(unk_token="[UNK]"), pre_tokenizers.BertPreTokenizer(), trainer)
    return BertTokenizer(vocab=backend.get_vocab())


def roberta_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Byte-level BPE; the padding id is 1, and positions are counted from it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=ROBERTA_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend = _train_tokenizer(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), trainer)
    backend.model.save(str(path))
    merges = [tuple(line.split()) for line in (path / "merges.txt").read_text().splitlines() if line[0] != "#"]
    return RobertaTokenizer(vocab=backend.get_vocab(), merges=merges)


def deberta_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """A SentencePiece unigram model."""
    trainer = trainers.UnigramTrainer(
        vocab_size=320, special_tokens=DEBERTA_SPECIAL, unk_token="[UNK]", show_progress=False
    )
    backend = _train_tokenizer(models.Unigram(), pre_tokenizers.Metaspace(), trainer)
    scores = [(piece, 0.0 if piece in DEBERTA_SPECIAL else -5.0) for piece in _pieces_by_id(backend)]
    return DebertaV2Tokenizer(vocab=scores)


def _pieces_by_id(backend: Tokenizer) -> list[str]:
    return sorted(backend.get_vocab(), key=backend.get_vocab().get)


def esm_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """One token for each amino acid; a slow tokenizer, written in Python."""
    (path / "vocab.txt").write_text("\n".join(ESM_TOKENS))
    return EsmTokenizer(str(path / "vocab.txt"))


# Family -> (tokenizer, config values apart from the shape)
ENCODERS: dict[str, tuple[Callable[[Path], PreTrainedTokenizerBase], dict[str, Any]]] = {
    "bert": (bert_tokenizer, {"max_position_embeddings": 64, "pad_token_id": 0}),
    "roberta": (roberta_tokenizer, {"max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1}),
    "deberta-v2": (  # as published: relative positions, in attention only
        deberta_tokenizer,
        {
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "relative_attention": True,
            "position_biased_input": False,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 16,
            "type_vocab_size": 0,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
    ),
    "esm": (  # as ESM-1b
        esm_tokenizer,
        {
            "max_position_embeddings": 66,
            "pad_token_id": 1,
            "mask_token_id": 32,
            "position_embedding_type": "absolute",
            "token_dropout": True,
            "emb_layer_norm_before": True,
        },
    ),
}


def write_encoder(path: Path, family: str, **config_values: Any) -> Path:
    """A masked language model of one of ENCODERS, in safetensors, with its tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    build, values = ENCODERS[family]
    tokenizer = build(path)
    tokenizer.save_pretrained(path)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    values = {**shape, "vocab_size": len(tokenizer), "initializer_range": 0.1, **values, **config_values}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(family, **values))
        tiny.perturb(model)
    model.save_pretrained(path)
    return path
