"""Sizes of the tiny models of kinds.py: what all kinds share, and what a kind needs beside it to be small, to be built
at all, or to have all of its mechanisms in two layers."""

from tiny import SIZES

WINDOW = 64
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
DECODER = {
    "decoder_layers": 2,
    "decoder_attention_heads": 8,
    "decoder_ffn_dim": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 8,
    "encoder_ffn_dim": 64,
    "d_model": SIZES["hidden_size"],
}
LATENT = {  # keys and values made of a latent vector, keys with a part that is turned
    "num_key_value_heads": SIZES["num_attention_heads"],
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
}
# Positions of three axes, of which text has one value; each kind has heads of 16 or turns half of each.
AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}}
HALF_AXES = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
    | {"partial_rotary_factor": 0.5}
}
# What a kind needs beside the sizes that all share.
SIZES_OF = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": HYBRID | LATENT,
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "bart": DECODER,
    "bigbird_pegasus": DECODER,
    "blenderbot": DECODER | {"vocab_size": SIZES["vocab_size"], "max_position_embeddings": 512},
    "blenderbot-small": DECODER,
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": SIZES["num_attention_heads"]},
    # Of the default sizes its layers take 18 GB in some releases.
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 32,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": SIZES["vocab_size"],
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    # Heads of 512 in global layers, whose values are their keys; the last two layers read the keys of the first two.
    "gemma4_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "vocab_size_per_layer_input": SIZES["vocab_size"],
        "hidden_size_per_layer_input": 16,
    },
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "gptj": {"rotary_dim": 4, "n_head": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": HYBRID | LATENT,
    "lfm3": {"layer_types": ["sliding_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": LATENT | {"num_layers": 1, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 64},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "marian": DECODER | {"decoder_start_token_id": 1, "max_length": 64},
    "mbart": DECODER,
    "minicpm3": LATENT,
    "mvp": DECODER,
    "pegasus": DECODER,
    "plbart": DECODER,
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "sarvam_mla": LATENT,
    "whisper": DECODER | {"max_target_positions": 512},
    "qwen2_vl_text": AXES,
    "qwen2_5_vl_text": AXES,
    "qwen2_5_omni_text": AXES,
    "glm4v_text": AXES,
    "glm4v_moe_text": HALF_AXES,
    "glm_ocr_text": AXES,
    "glmga_text": AXES,
    "paddleocr_vl_text": AXES,
    "youtu": LATENT,
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zamba": {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
# Encoders, and the parts of models that read pictures or hear sounds.
TOWER = {
    "attention_heads": 2,
    "d_model": 32,
    "depth": 1,
    "embed_dim": 32,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "encoder_layers": 1,
    "hidden_size": 32,
    "image_size": 32,
    "intermediate_size": 48,
    "layers": 1,
    "mlp_dim": 48,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "num_layers": 1,
    "num_mel_bins": 16,
    "out_hidden_size": 64,
    "patch_size": 8,
    "projection_dim": 32,
}
OF_TOWERS = {"image_size", "patch_size", "num_channels", "num_mel_bins"}
