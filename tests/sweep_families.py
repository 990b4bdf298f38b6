"""Every causal language model of the installed transformers, tiny, under packops.hf: right, refused, or wrong.

    python tests/sweep_families.py            # all of them: some five minutes, a line each; exit status: how many crash
    python tests/sweep_families.py doge opt   # some

tests/test_hf_sweep.py runs those that have something of their own.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import packops
import packops.hf

LENGTHS = (13, 5, 1, 22, 8)
RIGHT = 1e-4  # of the largest difference of the loss or a gradient, relative
LARGEST = 3_000_000  # parameters: a family that is not tiny with the sizes below is left out

# Every name that some configuration has for a size, an index or a dropout, and what is tiny.
TINY: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "attention_hidden_size", "token_embed_dim"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), 48),
    "ffn_hidden_size": 48,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
         "encoder_attention_heads", "attention_heads", "num_global_key_value_heads", "swa_num_attention_heads"), 4,
    ),
    **dict.fromkeys(
        ("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_channels", "global_head_dim", "swa_head_dim",
         "d_kv", "linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8,
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "index_topk"), 128),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "index_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", "rotary_dim"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_k", "moe_topk", "index_n_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "type_vocab_size"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("sliding_window", "attention_window"), 7),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(
        ("attention_dropout", "residual_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop", "dropout",
         "hidden_dropout_prob", "attention_probs_dropout_prob", "embedding_dropout", "router_jitter_noise",
         "input_jitter_noise"), 0.0,
    ),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), None),
    "mamba_d_ssm": 64, "mamba_n_groups": 1, "tie_word_embeddings": False, "is_decoder": True, "num_kv_shared_layers": 0,
}  # fmt: skip


def families() -> dict[str, str]:
    """model_type -> the class of its causal language model."""
    return {t: names if isinstance(names, str) else names[0] for t, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}


def tiny_configuration(cls: Any, **more: Any) -> Any:
    """With two layers, of different kinds where the family has some."""
    default = cls()
    known = set(vars(default)) | set(getattr(cls, "attribute_map", {}) or {})
    options = {name: value for name, value in {**TINY, **more}.items() if name in known}
    for name, value in vars(default).items():
        if isinstance(value, (list, tuple)) and (name.endswith("layer_types") or name in ("layers_block_type", "block_types")):
            options[name] = (list(dict.fromkeys(value)) * 2)[:2]
    for name, below in (getattr(cls, "sub_configs", None) or {}).items():
        if inspect.isclass(below) and below.__name__ != "AutoConfig":
            options[name] = tiny_configuration(below)
    for left_out in ((), ("layer_types",), ("head_dim",), ("sliding_window",), ("rotary_dim",)):
        try:
            return cls(**{name: value for name, value in options.items() if name not in left_out})
        except Exception as error:
            failed = error
    raise failed


def build(family: str, device: str = "cpu", **more: Any) -> Any:
    """A tiny model with weights that are far from uniform attention; on ``device="meta"`` however many it has."""
    cls = getattr(transformers, families()[family])
    configuration = tiny_configuration(cls.config_class or CONFIG_MAPPING[family], **more)
    with torch.device("meta"):
        model = cls(configuration)
    if device == "meta":
        return model
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > LARGEST:
        raise ValueError(f"not tiny: {count} parameters")
    torch.manual_seed(0)
    try:
        model = cls._from_config(configuration, attn_implementation="sdpa")
    except ValueError:
        model = cls._from_config(configuration, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return model.train()


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 60, (length,), generator=generator).tolist() for length in LENGTHS]


def packed(model: Any) -> dict[str, torch.Tensor]:
    """The loss and the gradients of the documents packed."""
    model.zero_grad()
    loss = model(**packops.PackingCollator(names="hf")(documents())).loss
    loss.backward()
    return _results(model, loss)


def alone(model: Any) -> dict[str, torch.Tensor]:
    """The same of each document in a row of its own, with torch's cross entropy."""
    model.zero_grad()
    count, total = sum(LENGTHS) - len(LENGTHS), torch.zeros(())
    for document in documents():
        ids = torch.tensor([document])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum") / count
        if loss.requires_grad and len(document) > 1:
            loss.backward()
            total += loss.detach()
    return _results(model, total)


def _results(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest, relative to each one's largest (or a thousandth of the largest of all, if that is more)."""
    floor = 1e-3 * max(float(value.abs().max()) for value in theirs.values())
    worst = 0.0
    for name, value in theirs.items():
        apart = (ours[name] - value).abs().max() if name in ours else torch.tensor(torch.inf)
        worst = max(worst, float(apart) / max(float(value.abs().max()), floor))
    return worst


def outcome(model: Any, expected: dict[str, torch.Tensor], **options: Any) -> str:
    """What ``packops.hf.apply(model, **options)`` makes of packed documents: right, WRONG, refused, or CRASHES, and a reason."""
    try:
        packops.hf.apply(model, **options)
    except ValueError as error:
        return f"refused: {error}"
    try:
        found = difference(packed(model), expected)
        return f"{'right' if found < RIGHT else 'WRONG'} {found:.0e}"
    except (ValueError, NotImplementedError) as error:
        return f"refused when called: {error}"
    except Exception as error:
        return f"CRASHES {type(error).__name__}: {error}"
    finally:
        packops.hf.revert(model)


def sweep(family: str) -> dict[str, str]:
    """Each way to call a family -> what comes of it."""
    try:
        model = build(family)
        expected = alone(model)
    except Exception as error:
        return {"not tried": f"{type(error).__name__}: {error}"}
    try:
        stock = f"{'right' if (found := difference(packed(model), expected)) < RIGHT else 'WRONG'} {found:.0e}"
    except Exception as error:
        stock = f"refused when called: {error}"
    return {
        "stock, packed": stock,
        "applied": outcome(model, expected),
        "packops_varlen": outcome(model, expected, attention="packops_varlen"),
        "packops_varlen without rope": outcome(model, expected, attention="packops_varlen", rope=False),
    }


def main(names: list[str]) -> int:
    transformers.logging.set_verbosity_error()
    crashes = 0
    for family in names or families():
        found = sweep(family)
        crashes += any(value.startswith("CRASHES") for value in found.values())
        print(" | ".join([family, *(f"{way}: {' '.join(value.split())[:100]}" for way, value in found.items())]), flush=True)
    return crashes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
