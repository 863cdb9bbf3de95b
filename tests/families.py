"""Tiny random models of every architecture TransformerBridge boots, built from configs offline."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
)
from transformers.models.gemma3n import modeling_gemma3n

from tests.models import boot

D_MODEL, D_MLP, D_VOCAB, N_CTX = 32, 48, 50, 32
N_TEXT = 45  # Images, video and audio have the last tokens.


@dataclass(frozen=True)
class Family:
    config: dict[str, Any]
    model_type: str = ""  # Where it differs from the family's name.
    auto: type[Any] = AutoModelForCausalLM
    architecture: str = ""  # Where checkpoints name another class than transformers does.


_SPECIAL = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
_BASE = {
    **_SPECIAL,
    "num_hidden_layers": 2,
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_attention_heads": 4,
    "vocab_size": D_VOCAB,
    "max_position_embeddings": N_CTX,
}
_GQA = {**_BASE, "num_key_value_heads": 2}
_HEAD = {**_GQA, "head_dim": 8}
_SLIDING = {
    **_HEAD,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_MOE = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_DELTA_NET = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 4,
}
_GPT = {
    **_SPECIAL,
    "n_layer": 2,
    "n_embd": D_MODEL,
    "n_head": 4,
    "vocab_size": D_VOCAB,
    "n_positions": N_CTX,
}
_GRANITE_HYBRID = {
    **_GQA,
    **_LOCAL_MOE,
    **_MAMBA2,
    "shared_intermediate_size": 24,
    "layer_types": ["linear_attention", "full_attention"],
    "position_embedding_type": "nope",
    "residual_multiplier": 0.5,
}
_FALCON = {
    **_SPECIAL,
    "num_hidden_layers": 2,
    "hidden_size": D_MODEL,
    "num_attention_heads": 4,
    "ffn_hidden_size": D_MLP,
    "vocab_size": D_VOCAB,
}
_OPT = {
    **_SPECIAL,
    "num_hidden_layers": 2,
    "hidden_size": D_MODEL,
    "word_embed_proj_dim": D_MODEL,
    "ffn_dim": D_MLP,
    "num_attention_heads": 4,
    "vocab_size": D_VOCAB,
    "max_position_embeddings": N_CTX,
}
_SEQ2SEQ = {
    **_SPECIAL,
    "d_model": D_MODEL,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": D_MLP,
    "decoder_ffn_dim": D_MLP,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": D_VOCAB,
    "max_position_embeddings": N_CTX,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": 0,
}
_T5 = {
    **_SPECIAL,
    "d_model": D_MODEL,
    "d_kv": 8,
    "d_ff": D_MLP,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "vocab_size": D_VOCAB,
    "decoder_start_token_id": 0,
}
_SSM = {
    **_SPECIAL,
    "num_hidden_layers": 2,
    "hidden_size": D_MODEL,
    "state_size": 8,
    "vocab_size": D_VOCAB,
}
_PATCHES = {
    "num_hidden_layers": 2,
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_HUBERT = {
    **_BASE,
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
_AUDIO = {
    "num_mel_bins": 8,
    "num_hidden_layers": 2,
    "encoder_layers": 2,
    "hidden_size": D_MODEL,
    "d_model": D_MODEL,
    "num_attention_heads": 4,
    "encoder_attention_heads": 4,
    "intermediate_size": D_MLP,
    "encoder_ffn_dim": D_MLP,
    "max_source_positions": 16,
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": D_MODEL,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_VISION_TOKENS = {
    "image_token_id": 46,
    "video_token_id": 47,
    "vision_start_token_id": 48,
    "vision_end_token_id": 49,
}

FAMILIES: dict[str, Family] = {
    "afmoe": Family(
        {
            **_HEAD,
            **_MOE,
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            "global_attn_every_n_layers": 2,
            "sliding_window": 4,
            "mup_enabled": True,
        }
    ),
    "apertus": Family(_GQA),
    "arcee": Family(_HEAD),
    "audio-spectrogram-transformer": Family(
        {
            **{k: v for k, v in _PATCHES.items() if k != "image_size"},
            "frequency_stride": 4,
            "time_stride": 4,
            "max_length": 16,
            "num_mel_bins": 16,
        },
        auto=AutoModelForAudioClassification,
    ),
    "audioflamingo3": Family(
        {
            "audio_config": _AUDIO,
            "text_config": {**_GQA, "model_type": "qwen2"},
            "audio_token_id": 49,
        },
        auto=AutoModelForSeq2SeqLM,
    ),
    "bamba": Family({**_GQA, **_MAMBA2, "attn_layer_indices": [1]}),
    "bart": Family(_SEQ2SEQ, auto=AutoModelForSeq2SeqLM),
    "bert": Family(_BASE, auto=AutoModelForMaskedLM),
    "bert_causal": Family({**_BASE, "is_decoder": True}, "bert"),
    "bitnet": Family(_GQA),
    "blenderbot": Family(_SEQ2SEQ, auto=AutoModelForSeq2SeqLM),
    "bloom": Family(
        {**_SPECIAL, "n_layer": 2, "hidden_size": D_MODEL, "n_head": 4, "vocab_size": D_VOCAB}
    ),
    "codegen": Family({**_GPT, "rotary_dim": 4, "n_ctx": N_CTX}),
    "cohere": Family(_GQA),
    "cohere2": Family(_SLIDING),
    "deepseek_v2": Family({**_BASE, **_ROUTED_MOE, **_MLA, "first_k_dense_replace": 1}),
    "deepseek_v3": Family({**_BASE, **_ROUTED_MOE, **_MLA, "first_k_dense_replace": 1}),
    "deepseek_v4": Family(
        {
            **_BASE,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "q_lora_rank": 16,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": [
                "sliding_attention",
                "compressed_sparse_attention",
                "heavily_compressed_attention",
            ],
            "compress_rates": {
                "compressed_sparse_attention": 2,
                "heavily_compressed_attention": 4,
            },
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "hc_mult": 2,
            "hc_sinkhorn_iters": 3,
            "sliding_window": 4,
            "partial_rotary_factor": 0.25,
            "o_groups": 2,
            "o_lora_rank": 8,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_topk": 2,
        }
    ),
    "deit": Family(
        _PATCHES,
        auto=AutoModelForImageClassification,
        architecture="DeiTForImageClassification",
    ),
    "deit_base": Family(_PATCHES, "deit", AutoModel),
    "emu3": Family(
        {
            "text_config": _GQA,
            "vq_config": {
                "codebook_size": 8,
                "base_channels": 32,
                "channel_multiplier": [1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "hidden_size": 32,
            },
            "vocabulary_map": {"<image>": 49},
        },
        auto=AutoModelForImageTextToText,
    ),
    "ernie4_5": Family({**_HEAD, "use_bias": True}),
    "ernie4_5_moe": Family(
        {
            **_GQA,
            "moe_intermediate_size": 24,
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
        }
    ),
    "exaone4": Family(_SLIDING),
    "falcon": Family(_FALCON),
    "falcon_alibi": Family(
        {
            **_FALCON,
            "alibi": True,
            "parallel_attn": False,
            "multi_query": False,
            "bias": True,
        },
        "falcon",
    ),
    "falcon_h1": Family({**_GQA, **_MAMBA2, "mamba_d_ssm": 64}),
    "falcon_mamba": Family({**_SSM, "time_step_rank": 4, "expand": 2}),
    "falcon_new": Family(
        {
            **_FALCON,
            "num_kv_heads": 1,
            "new_decoder_architecture": True,
        },
        "falcon",
    ),
    "flex_olmo": Family({**_GQA, "num_experts": 4, "num_experts_per_tok": 2}),
    "florence2": Family(
        {
            "text_config": {**_SEQ2SEQ, "model_type": "bart"},
            "vision_config": {
                "depths": [1],
                "patch_size": [4],
                "patch_stride": [4],
                "patch_padding": [0],
                "patch_prenorm": [False],
                "embed_dim": [16],
                "num_heads": [2],
                "num_groups": [2],
                "window_size": 2,
                "projection_dim": D_MODEL,
            },
            "image_token_id": 49,
        },
        auto=AutoModelForImageTextToText,
    ),
    "gemma": Family(_HEAD),
    "gemma2": Family({**_SLIDING, "query_pre_attn_scalar": 8}),
    "gemma3": Family(
        {
            "text_config": _SLIDING,
            "vision_config": _PATCHES,
            "mm_tokens_per_image": 4,
            "image_token_index": 49,
        },
        auto=AutoModelForImageTextToText,
    ),
    "gemma3_text": Family(_SLIDING),
    "gemma3n": Family(
        {
            "text_config": {
                **_SLIDING,
                "num_hidden_layers": 4,
                "intermediate_size": [D_MLP] * 4,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
                "num_kv_shared_layers": 2,
                "vocab_size_per_layer_input": D_VOCAB,
                "hidden_size_per_layer_input": 8,
                "altup_num_inputs": 2,
                "laurel_rank": 4,
            },
            "vision_config": {"hidden_size": 16},
            "audio_config": {
                "hidden_size": 16,
                "conf_num_hidden_layers": 1,
                "conf_num_attention_heads": 2,
                "sscp_conv_channel_size": [4, 4],
                "input_feat_size": 16,
            },
        },
        auto=AutoModelForImageTextToText,
    ),
    "gemma4": Family(
        {
            "text_config": {
                **_SLIDING,
                "global_head_dim": 16,
                "vocab_size_per_layer_input": D_VOCAB,
                "hidden_size_per_layer_input": 8,
            },
            "image_token_id": 46,
            "video_token_id": 47,
            "audio_token_id": 48,
        },
        auto=AutoModelForImageTextToText,
    ),
    "gemma4_text": Family(
        {
            **_SLIDING,
            "global_head_dim": 16,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": D_VOCAB,
            "hidden_size_per_layer_input": 8,
        }
    ),
    "gemma4_text_moe": Family(
        {
            **_SLIDING,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": D_VOCAB,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
        "gemma4_text",
    ),
    "gemma4_unified": Family(
        {
            "text_config": {**_SLIDING, "global_head_dim": 16},
            "image_token_id": 46,
            "video_token_id": 47,
            "audio_token_id": 48,
        },
        auto=AutoModelForImageTextToText,
    ),
    "glm": Family(_HEAD),
    "glm4": Family(_HEAD),
    "glm4_moe": Family({**_HEAD, **_ROUTED_MOE, "first_k_dense_replace": 1, "use_qk_norm": True}),
    "glm4_moe_lite": Family(
        {**_BASE, **_ROUTED_MOE, **_MLA, "mlp_layer_types": ["dense", "sparse"]}
    ),
    "glm4v": Family(
        {
            "text_config": {**_GQA, "rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}},
            "vision_config": {**_QWEN_VISION, "image_size": 16},
            "image_token_id": 46,
            "video_token_id": 47,
        },
        auto=AutoModelForImageTextToText,
    ),
    "glm_moe_dsa": Family(
        {
            **_BASE,
            **_ROUTED_MOE,
            **_MLA,
            "mlp_layer_types": ["dense", "sparse"],
            "index_topk": 2,
            "index_head_dim": 8,
            "index_n_heads": 2,
        }
    ),
    "glmasr": Family(
        {
            "audio_config": {**_AUDIO, "num_key_value_heads": 4, "max_position_embeddings": 16},
            "text_config": {**_HEAD, "model_type": "llama"},
            "audio_token_id": 49,
        },
        auto=AutoModelForSeq2SeqLM,
    ),
    "gpt2": Family({**_GPT, "n_inner": D_MLP}),
    "gpt_bigcode": Family({**_GPT, "n_inner": D_MLP}),
    "gpt_neo": Family(
        {
            **_SPECIAL,
            "num_layers": 2,
            "hidden_size": D_MODEL,
            "intermediate_size": D_MLP,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "vocab_size": D_VOCAB,
            "max_position_embeddings": N_CTX,
        }
    ),
    "gpt_neox": Family({**_BASE, "rotary_pct": 0.5}),
    "gpt_neox_sequential": Family({**_BASE, "use_parallel_residual": False}, "gpt_neox"),
    "gpt_oss": Family({**_SLIDING, **_LOCAL_MOE}),
    "gptj": Family({**_GPT, "n_inner": D_MLP, "rotary_dim": 4}),
    "granite": Family(
        {
            **_GQA,
            "embedding_multiplier": 1.5,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
        }
    ),
    "granitemoe": Family({**_GQA, **_LOCAL_MOE, "residual_multiplier": 0.5}),
    "granitemoehybrid": Family(_GRANITE_HYBRID),
    "granitemoehybrid_rope": Family(
        {**_GRANITE_HYBRID, "position_embedding_type": "rope"}, "granitemoehybrid"
    ),
    "hrm_text": Family({**_BASE, "head_dim": 8, "L_cycles": 2}),
    "hubert": Family(_HUBERT, auto=AutoModelForCTC),
    "hubert_base": Family(_HUBERT, "hubert", AutoModel),
    "hunyuan_v1_dense": Family(_HEAD),
    "idefics3": Family(
        {
            "text_config": {**_HEAD, "model_type": "llama"},
            "vision_config": _PATCHES,
            "image_token_id": 49,
        },
        auto=AutoModelForImageTextToText,
    ),
    "jais2": Family(_HEAD),
    "jamba": Family(
        {
            **_GQA,
            "num_hidden_layers": 3,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 3,
            "attn_layer_offset": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        }
    ),
    "jetmoe": Family(
        {
            **_SPECIAL,
            **_LOCAL_MOE,
            "num_hidden_layers": 2,
            "hidden_size": D_MODEL,
            "intermediate_size": D_MLP,
            "num_key_value_heads": 2,
            "kv_channels": 8,
            "vocab_size": D_VOCAB,
            "max_position_embeddings": N_CTX,
        }
    ),
    "laguna": Family(
        {
            **_SLIDING,
            **_MOE,
            "shared_expert_intermediate_size": 24,
            "mlp_layer_types": ["dense", "sparse"],
        }
    ),
    "led": Family(
        {
            **{k: v for k, v in _SEQ2SEQ.items() if k != "max_position_embeddings"},
            "max_encoder_position_embeddings": N_CTX,
            "max_decoder_position_embeddings": N_CTX,
            "attention_window": 4,
        },
        auto=AutoModelForSeq2SeqLM,
    ),
    "lfm2": Family({**_GQA, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "lfm2_moe": Family(
        {**_GQA, **_MOE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}
    ),
    "llama": Family({**_GQA, "attention_bias": True, "mlp_bias": True}),
    "llama4": Family(
        {
            "text_config": {
                **_HEAD,
                **_LOCAL_MOE,
                "intermediate_size_mlp": D_MLP,
                "interleave_moe_layer_step": 2,
            },
            "vision_config": {
                **_PATCHES,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
            "boi_token_index": 47,
            "eoi_token_index": 48,
            "image_token_index": 49,
        },
        auto=AutoModelForImageTextToText,
    ),
    "llama4_text": Family(
        {
            **_HEAD,
            **_LOCAL_MOE,
            "intermediate_size_mlp": D_MLP,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 4,
            "no_rope_layers": [1, 0],
        }
    ),
    "llava": Family(
        {
            "text_config": {**_HEAD, "model_type": "llama"},
            "vision_config": {**_PATCHES, "model_type": "clip_vision_model"},
            "image_token_index": 49,
        },
        auto=AutoModelForImageTextToText,
    ),
    "llava_next": Family(
        {
            "text_config": {**_HEAD, "model_type": "llama"},
            "vision_config": {**_PATCHES, "model_type": "clip_vision_model"},
            "image_token_index": 49,
            "image_grid_pinpoints": [[16, 32], [32, 16]],
        },
        auto=AutoModelForImageTextToText,
    ),
    "llava_onevision": Family(
        {
            "text_config": {**_GQA, "model_type": "qwen2"},
            "vision_config": {**_PATCHES, "model_type": "siglip_vision_model"},
            "image_token_index": 48,
            "video_token_index": 49,
            "image_grid_pinpoints": [[16, 32], [32, 16]],
        },
        auto=AutoModelForImageTextToText,
    ),
    "longt5": Family(
        {**_T5, "local_radius": 3, "global_block_size": 4}, auto=AutoModelForSeq2SeqLM
    ),
    "longt5_global": Family(
        {
            **_T5,
            "local_radius": 3,
            "global_block_size": 4,
            "encoder_attention_type": "transient-global",
        },
        "longt5",
        AutoModelForSeq2SeqLM,
    ),
    "m2m_100": Family(_SEQ2SEQ, auto=AutoModelForSeq2SeqLM),
    "mamba": Family({**_SSM, "time_step_rank": 4, "expand": 2}),
    "mamba2": Family({**_SSM, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}),
    "marian": Family({**_SEQ2SEQ, "decoder_vocab_size": D_VOCAB}, auto=AutoModelForSeq2SeqLM),
    "mbart": Family(_SEQ2SEQ, auto=AutoModelForSeq2SeqLM),
    "minimax_m2": Family({**_HEAD, **_LOCAL_MOE}),
    "ministral3": Family(_HEAD),
    "mistral": Family({**_HEAD, "sliding_window": 4}),
    "mistral3": Family(
        {
            "text_config": {**_HEAD, "model_type": "mistral"},
            "vision_config": {**_PATCHES, "head_dim": 8, "model_type": "pixtral"},
            "image_token_index": 49,
        },
        auto=AutoModelForImageTextToText,
    ),
    "mixtral": Family({**_HEAD, **_LOCAL_MOE}),
    "modernbert-decoder": Family(
        {
            **_BASE,
            "cls_token_id": 0,
            "sep_token_id": 0,
            "local_attention": 8,
            "layer_types": ["full_attention", "sliding_attention"],
        }
    ),
    "mpt": Family(
        {
            **_SPECIAL,
            "d_model": D_MODEL,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": N_CTX,
            "vocab_size": D_VOCAB,
        }
    ),
    "musicflamingo": Family(
        {
            "audio_config": {**_AUDIO, "model_type": "audioflamingo3_encoder"},
            "text_config": {**_GQA, "model_type": "qwen2"},
            "audio_token_id": 47,
            "audio_bos_token_id": 48,
            "audio_eos_token_id": 49,
            "head_dim": 32,
        },
        auto=AutoModelForSeq2SeqLM,
    ),
    "nanochat": Family(_GQA),
    "nemotron": Family(_HEAD),
    "nemotron_h": Family(
        {
            **{k: v for k, v in _HEAD.items() if k != "num_hidden_layers"},
            **_ROUTED_MOE,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "moe_shared_expert_intermediate_size": 24,
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "chunk_size": 4,
            "n_group": 1,
            "use_mamba_kernels": False,
        }
    ),
    "olmo": Family({**_GQA, "clip_qkv": 5.0}),
    "olmo2": Family(_GQA),
    "olmo3": Family(
        {**_GQA, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "olmo_hybrid": Family({**_GQA, **_DELTA_NET}),
    "olmoe": Family({**_GQA, "num_experts": 4, "num_experts_per_tok": 2}),
    "openai-gpt": Family(_GPT),
    "opt": Family(_OPT),
    "opt_postnorm": Family(
        {
            **_OPT,
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
        },
        "opt",
    ),
    "pegasus": Family(_SEQ2SEQ, auto=AutoModelForSeq2SeqLM),
    "phi": Family({**_BASE, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "phi3": Family(_GQA),
    "phimoe": Family(
        {**_GQA, **_LOCAL_MOE, "attention_bias": True, "lm_head_bias": True},
        architecture="PhiMoEForCausalLM",
    ),
    "qwen2": Family(_GQA),
    "qwen2_5_vl": Family(
        {
            **_VISION_TOKENS,
            "text_config": {**_GQA, "rope_parameters": _MROPE},
            "vision_config": {**_QWEN_VISION, "fullatt_block_indexes": [1]},
        },
        auto=AutoModelForImageTextToText,
    ),
    "qwen2_audio": Family(
        {
            "audio_config": _AUDIO,
            "text_config": {**_GQA, "model_type": "qwen2"},
            "audio_token_index": 49,
        },
        auto=AutoModelForSeq2SeqLM,
    ),
    "qwen2_moe": Family(
        {**_GQA, **_MOE, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]}
    ),
    "qwen3": Family(_HEAD),
    "qwen3_5": Family(
        {
            **_VISION_TOKENS,
            "text_config": {**_HEAD, **_DELTA_NET},
            "vision_config": {**_QWEN_VISION, "num_position_embeddings": 16},
        },
        auto=AutoModelForImageTextToText,
    ),
    "qwen3_5_moe": Family(
        {
            **_VISION_TOKENS,
            "text_config": {
                **_HEAD,
                **_MOE,
                **_DELTA_NET,
                "shared_expert_intermediate_size": 24,
            },
            "vision_config": {**_QWEN_VISION, "num_position_embeddings": 16},
        },
        auto=AutoModelForImageTextToText,
    ),
    "qwen3_5_moe_text": Family(
        {**_HEAD, **_MOE, **_DELTA_NET, "shared_expert_intermediate_size": 24}
    ),
    "qwen3_5_text": Family({**_HEAD, **_DELTA_NET}),
    "qwen3_moe": Family({**_HEAD, **_MOE, "mlp_only_layers": [0]}),
    "qwen3_next": Family(
        {
            **_HEAD,
            **_MOE,
            **_DELTA_NET,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "shared_expert_intermediate_size": 24,
            "mlp_only_layers": [0],
        }
    ),
    "qwen3_vl": Family(
        {
            **_VISION_TOKENS,
            "text_config": {**_HEAD, "rope_parameters": _MROPE},
            "vision_config": {
                **_QWEN_VISION,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        },
        auto=AutoModelForImageTextToText,
    ),
    "qwen3_vl_moe": Family(
        {
            **_VISION_TOKENS,
            "text_config": {**_HEAD, **_MOE, "mlp_only_layers": [0], "rope_parameters": _MROPE},
            "vision_config": {
                **_QWEN_VISION,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        },
        auto=AutoModelForImageTextToText,
    ),
    "recurrent_gemma": Family(
        {
            **_HEAD,
            "num_hidden_layers": 3,
            "lru_width": D_MODEL,
            "attention_window_size": 8,
        }
    ),
    "rwkv": Family(
        {
            **_SPECIAL,
            "num_hidden_layers": 2,
            "hidden_size": D_MODEL,
            "intermediate_size": D_MLP,
            "attention_hidden_size": D_MODEL,
            "context_length": N_CTX,
            "vocab_size": D_VOCAB,
        }
    ),
    "seed_oss": Family(_HEAD),
    "smollm3": Family({**_GQA, "no_rope_layers": [1, 0]}),
    "stablelm": Family({**_GQA, "use_qkv_bias": True}),
    "stablelm_parallel": Family(
        {**_GQA, "use_parallel_residual": True, "qk_layernorm": True}, "stablelm"
    ),
    "starcoder2": Family(_GQA),
    "switch_transformers": Family(
        {
            **_T5,
            "num_experts": 4,
            "expert_capacity": 64,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
        },
        auto=AutoModelForSeq2SeqLM,
    ),
    "t5gemma": Family(
        {"encoder": _SLIDING, "decoder": _SLIDING, "vocab_size": D_VOCAB, **_SPECIAL},
        auto=AutoModelForSeq2SeqLM,
    ),
    "t5gemma2": Family(
        {
            "encoder": {
                "text_config": _SLIDING,
                "vision_config": _PATCHES,
                "image_token_index": 49,
                "mm_tokens_per_image": 4,
            },
            "decoder": _SLIDING,
            "image_token_index": 49,
            "vocab_size": D_VOCAB,
            **_SPECIAL,
        },
        auto=AutoModelForSeq2SeqLM,
    ),
    "vaultgemma": Family({**_SLIDING, "query_pre_attn_scalar": 8}),
    "vit": Family(_PATCHES, auto=AutoModelForImageClassification),
    "vit_base": Family(_PATCHES, "vit", AutoModel),
    "xglm": Family(
        {
            **_SPECIAL,
            "d_model": D_MODEL,
            "ffn_dim": D_MLP,
            "num_layers": 2,
            "attention_heads": 4,
            "vocab_size": D_VOCAB,
            "max_position_embeddings": N_CTX,
        }
    ),
    "youtu": Family({**_BASE, **_MLA}),
    "zamba2": Family(
        {
            **_GQA,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "chunk_size": 4,
            "use_mamba_kernels": False,
            "use_shared_attention_adapter": True,
            "use_mem_rope": True,
            "adapter_rank": 4,
        }
    ),
}

_REMOTE = "transformers has no class for it: its code comes from the Hub"
_RESEARCH = "no public class: TransformerLens maps a research repository's own module"

REFUSED: dict[str, str] = {
    "BD3LM": _REMOTE,
    "BaichuanForCausalLM": _REMOTE,
    "BloomModel": "its adapter looks for the layers of BloomForCausalLM",
    "DreamModel": _REMOTE,
    "ExaoneForCausalLM": _REMOTE,
    "GPT2LMHeadCustomModel": _REMOTE,
    "GiddForDiffusionLM": _REMOTE,
    "HyenaDNAForCausalLM": _REMOTE,
    "InternLM2ForCausalLM": _REMOTE,
    "LLaDA2MoeModelLM": _REMOTE,
    "LLaDAModelLM": _REMOTE,
    "MT5ForConditionalGeneration": "boots, but its forward pass fails as T5's does",
    "MinGPTForCausalLM": _RESEARCH,
    "NanoGPTForCausalLM": _RESEARCH,
    "NeelSoluOldForCausalLM": _RESEARCH,
    "OpenELMForCausalLM": _REMOTE,
    "OuroForCausalLM": _REMOTE,
    "QwenForCausalLM": _REMOTE,
    "RWKV7ForCausalLM": _REMOTE,
    "RavenForCausalLM": _REMOTE,
    "T5ForConditionalGeneration": (
        "boots, but T5BlockBridge returns five values where transformers 5.23 unpacks three"
    ),
    "TransformerLensNative": "built by boot_native, not from a transformers model",
    "TransformerLensPretrain": "built by build_pretrain_bridge, not from a transformers model",
}

# Whose attention fills its mask in float32, with a number that float64 alone can hold.
FLOAT32_ONLY = frozenset({"xglm"})

# Whose norms, softmax, router or state space compute in float32 whatever the model's dtype.
FLOAT32_INSIDE = frozenset(FAMILIES) - {
    "bart",
    "bert",
    "bert_causal",
    "blenderbot",
    "falcon",
    "falcon_new",
    "florence2",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gpt_neox_sequential",
    "hubert",
    "hubert_base",
    "m2m_100",
    "marian",
    "mbart",
    "openai-gpt",
    "pegasus",
}


class _Towers:
    """AutoModel as gemma3n calls it: its vision needs timm, and text does without."""

    @staticmethod
    def from_config(config: Any) -> nn.Module:
        if config.model_type == "gemma3n_vision":
            return nn.Identity()
        return AutoModel.from_config(config)


def huggingface(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """Random weights, far enough from zero that every activation bends, and biases too."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family.model_type or name, **deepcopy(family.config))
    if family.architecture:
        config.architectures = [family.architecture]
    with mock.patch.object(modeling_gemma3n, "AutoModel", _Towers):
        model = family.auto.from_config(
            config, attn_implementation="eager", experts_implementation="eager"
        )
    model.config.architectures = [family.architecture or type(model).__name__]
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in key and "A_log" not in key:
                nn.init.normal_(parameter, std=0.2)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    # Unlike to, which would also make the complex rotations of llama4 real.
    return model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t).eval()


def bridge(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> TransformerBridge:
    # Processors need the Hub, torchvision and timm. Text does without, and a processor that
    # fails to load makes TransformerBridge install torchvision.
    with (
        mock.patch.object(AutoProcessor, "from_pretrained", return_value=None),
        mock.patch.object(ArchitectureAdapter, "_check_required_libraries"),
    ):
        return boot(huggingface(name, dtype, seed), dtype)


def inputs(
    name: str, batch: int = 1, pos: int = 5, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Keyword arguments of the bridge's forward pass."""
    generator = torch.Generator().manual_seed(1)

    def ids(pos: int) -> Tensor:
        return torch.randint(1, N_TEXT, (batch, pos), generator=generator)

    def signal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(dtype)

    family = FAMILIES[name]
    model_type = family.model_type or name
    if model_type in ("vit", "deit"):
        return {"input": signal(3, 16, 16)}
    if model_type == "audio-spectrogram-transformer":
        return {"input": signal(16, 16)}
    if model_type == "hubert":
        return {"input": signal(20 * pos + 10)}
    if model_type == "led":
        pos = 8  # Whole attention windows: gradients through a padded one are NaN.
    if AutoConfig.for_model(model_type).is_encoder_decoder:
        return {"input": ids(pos), "decoder_input_ids": ids(4)}
    return {"input": ids(pos)}
