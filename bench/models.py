"""Shapes of the models that the benchmarks train, with random weights."""

from __future__ import annotations

from typing import Any


def configuration(name: str, tiny: bool) -> Any:
    """transformers' configuration of the shape that ``name`` is known by."""
    import transformers

    shapes: dict[str, tuple[type, dict[str, Any]]] = {
        "llama": (
            transformers.LlamaConfig,
            {
                "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5,
                "rope_parameters": {
                    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
                },
            },
        ),
        "qwen3": (
            transformers.Qwen3Config,
            {
                "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            },
        ),
        "gemma2": (
            transformers.Gemma2Config,
            {
                "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096,
                "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
            },
        ),
    }  # fmt: skip
    kind, shape = shapes[name]
    shape |= {"max_position_embeddings": 131072, "tie_word_embeddings": True, "use_cache": False}
    shape |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    if tiny:
        shape |= {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        if name == "gemma2":
            shape |= {"sliding_window": 32, "query_pre_attn_scalar": 16}
    return kind(**shape)


MODELS = {"llama": "Llama-3.2-1B", "qwen3": "Qwen3-0.6B", "gemma2": "Gemma-2-2B"}
