"""Any class of transformers' auto mappings, made tiny: two layers of hidden size 64 with random weights.

    write_class(tmp_path, "glm4_moe")
    write_class(tmp_path, "bert", masked=True)

SIZES holds a value for each name that families give to a size; CHANGES what a family needs beside them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

LARGEST = 20_000_000  # parameters; beyond it a size has another name

_NAMES = """
64 attention_hidden_size attention_window_size d_model dim emb_dim embed_dim embedding_size hidden_size lru_width
64 mamba_d_ssm n_embd out_hidden_size sliding_window word_embed_proj_dim
128 d_ff d_inner decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size intermediate_size intermediate_size_mlp
128 mamba_intermediate_size n_inner
2 decoder_layers depth encoder_layers expand_ratio layer_group_size linear_num_key_heads moe_k moe_topk
2 n_layer n_layers num_experts_per_tok num_experts_per_token num_hidden_layers num_key_value_heads num_layers
2 top_k_experts
4 decoder_attention_heads encoder_attention_heads linear_num_heads linear_num_value_heads mamba_n_heads mamba_num_heads
4 moe_num_experts n_head n_heads n_routed_experts num_attention_heads num_experts num_heads num_local_experts
320 vocab_size vocab_size_per_layer_input
512 context_length max_position_embeddings max_seq_len n_positions
16 global_head_dim head_dim hidden_size_per_layer_input index_head_dim index_n_heads index_topk kv_channels kv_lora_rank
16 linear_head_dim linear_key_head_dim linear_value_head_dim mamba_chunk_size mamba_d_head mamba_head_dim qk_head_dim
16 v_head_dim
32 expert_ffn_hidden_size moe_intermediate_size moe_shared_expert_intermediate_size q_lora_rank
32 shared_expert_intermediate_size shared_experts_intermediate_size
8 laurel_rank mamba_d_state mamba_dt_rank qk_nope_head_dim qk_rope_head_dim rotary_dim ssm_state_size state_size
8 time_step_rank
1 first_k_dense_replace mamba_n_groups moe_layer_start_index moe_num_shared_experts n_group n_groups n_shared_experts
1 num_expert_group topk_group
0 num_kv_shared_layers
"""
IDS = {"bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
SIZES = {name: int(line.split()[0]) for line in _NAMES.split("\n") for name in line.split()[1:]}
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_expand": 1},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_text": {"head_dim": 16},
    "esm": {"vocab_size": 320, "mask_token_id": 259, "token_dropout": False},
    "esmc": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_expand": 1},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8},
    "luke": {"entity_vocab_size": 100, "entity_emb_size": 64},
    "mamba2": {"expand": 1, "head_dim": 16, "num_heads": 4},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 4, "head_dim": 16},
    "perceiver": {"d_latents": 64, "num_latents": 16, "qk_channels": 64, "v_channels": 64},
    "reformer": {"axial_pos_embds": False, "is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "mamba_headdim": 16, "chunk_size": 16},
}


def shrink(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's values in small, those of its parts too, and nothing drawn at random."""
    small = {}
    for name, value in values.items():
        if isinstance(value, dict) and name.endswith("_config"):
            small[name] = shrink(value)
        elif isinstance(value, list) and name.endswith(("layer_types", "layers_block_type")):
            small[name] = (list(dict.fromkeys(value))[:2] * 2)[:2]
        elif re.search("drop|noise", name) and isinstance(value, float):
            small[name] = 0.0
        elif name in IDS:
            small[name] = IDS[name]
        elif name in SIZES and value is not None:
            small[name] = [SIZES[name]] * 2 if isinstance(value, list) else SIZES[name]
    if "qk_rope_head_dim" in small:  # which its heads consist of
        small |= {"num_key_value_heads": 4}
        small.pop("head_dim", None)
    return small


def write_class(path: Path, model_type: str, masked: bool = False) -> Path:
    """A model of the class that the auto mapping names, in safetensors, with the byte tokenizer."""
    values = shrink(AutoConfig.for_model(model_type).to_dict()) | CHANGES.get(model_type, {})
    tokenizer = tiny.byte_tokenizer(extra=("<mask>",))
    tokenizer.mask_token = "<mask>"
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    config = AutoConfig.for_model(model_type, **values | IDS)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size // 10**6} million parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config).float()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        tiny.perturb(model)
        model.config.use_cache = False
        model(input_ids=torch.arange(40)[None])  # fails if the sizes do not fit each other
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
