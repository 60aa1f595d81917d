#!/usr/bin/env python3
"""Write synthetic proteins that follow a rule, and a small ESM with random weights to learn it.

    python examples/masked_lm/make_proteins.py output/masked_lm/made

Residues four places apart are on the same side of a helix. Here the later one follows from the earlier: it is the next
amino acid in alphabetical order, and after the last comes the first. All twenty are equally frequent, so guessing is
right for one masked residue in twenty.

Writes `base/` (model and tokenizer), and `data/train.jsonl` and `data/eval.jsonl` with one column `input`.
"""

import argparse
import json
import random
from pathlib import Path

LETTERS = "LAGVSERTIDPKQNFYMHWC"  # in the order of ESM's vocabulary
TOKENS = ["<cls>", "<pad>", "<eos>", "<unk>", *LETTERS, *"XBUZO.-", "<null_1>", "<mask>"]
ALPHABET = sorted(LETTERS)
FOLLOWS = dict(zip(ALPHABET, ALPHABET[1:] + ALPHABET[:1], strict=True))
APART = 4


def protein(rng: random.Random) -> str:
    """24 to 48 residues: four random ones, then each as the one four places before requires."""
    letters = [rng.choice(LETTERS) for _ in range(rng.randint(24, 48))]
    for i in range(APART, len(letters)):
        letters[i] = FOLLOWS[letters[i - APART]]
    return "".join(letters)


def write_data(folder: Path, rows: int, eval_rows: int, seed: int) -> None:
    """Write train.jsonl and eval.jsonl."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", rows), ("eval", eval_rows)):
        lines = "".join(json.dumps({"input": protein(rng)}) + "\n" for _ in range(count))
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def write_base(folder: Path, hidden: int, layers: int, seed: int) -> None:
    """Write an ESM with random weights and the tokenizer of the published models."""
    import torch
    from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(TOKENS), encoding="utf-8")
    EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    config = EsmConfig(
        vocab_size=len(TOKENS),
        mask_token_id=TOKENS.index("<mask>"),
        pad_token_id=TOKENS.index("<pad>"),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 16,
        intermediate_size=2 * hidden,
        max_position_embeddings=66,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    EsmForMaskedLM(config).save_pretrained(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--eval_rows", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_data(args.folder / "data", args.rows, args.eval_rows, args.seed)
    write_base(args.folder / "base", args.hidden, args.layers, args.seed)


if __name__ == "__main__":
    main()
