"""Tiny models of every family that packops.hf is tested with, and how the tests of packops.hf run and compare them."""

from __future__ import annotations

import pytest
import torch

from packops import PackingCollator

transformers = pytest.importorskip("transformers")

VOCABULARY = 61
LENGTHS = (13, 5, 1, 22, 8)

MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPS = {"n_routed_experts": 3, "n_group": 1, "topk_group": 1}

# (class prefix, further configuration). hidden 32, two layers, heads of 8 unless it says otherwise.
FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 8,
            "sliding_window": 7,
            "final_logit_softcapping": 1.5,
            "query_pre_attn_scalar": 8,
            "attn_implementation": "eager",
        },
    ),
    "gemma3_text": ("Gemma3", {"head_dim": 8, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "granite": ("Granite", {"logits_scaling": 3.0, "attention_multiplier": 0.4}),
    "cohere": ("Cohere", {"logit_scale": 0.3, "use_qk_norm": True}),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.5}),
    "glm4": ("Glm4", {"head_dim": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 3}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 8, "num_experts": 3, **MOE}),
    "olmo": ("Olmo", {}),
    "olmoe": ("Olmoe", {"num_experts": 3, "num_experts_per_tok": 2}),
    "stablelm": ("StableLm", {}),
    "starcoder2": ("Starcoder2", {}),
    "phi": ("Phi", {}),
    "cohere2": ("Cohere2", {}),
    "ernie4_5": ("Ernie4_5", {}),
    "glm": ("Glm", {"head_dim": 8}),
    "glm4_moe": ("Glm4Moe", {"head_dim": 8, **MOE, **GROUPS}),
    "helium": ("Helium", {"head_dim": 8}),
    "exaone4": ("Exaone4", {}),
    "seed_oss": ("SeedOss", {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0}),
    "nemotron": ("Nemotron", {}),
    "persimmon": ("Persimmon", {}),
    "apertus": ("Apertus", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {"head_dim": 8}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 3, "shared_expert_intermediate_size": 16, **MOE}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "dots1": ("Dots1", {"head_dim": 8, "first_k_dense_replace": 2, **MOE, **GROUPS}),
    "ministral": ("Ministral", {"head_dim": 8}),
    "arcee": ("Arcee", {}),
}

# The first ones run with and without logits.
BOTH = list(FAMILIES)[: list(FAMILIES).index("olmo")]

# Experts, or MLPs without a gate.
UNGATED = {
    "gpt_neox", "mixtral", "qwen3_moe", "olmoe", "starcoder2", "phi", "nemotron", "persimmon", "apertus", "granitemoe", "arcee",
}  # fmt: skip

FUSED_NORMS = {"qwen3", "gemma3_text", "olmo2", "olmo3", "qwen3_moe", "apertus", "dots1"}


def make(family, dtype=torch.float32, attention="sdpa", **more):
    prefix, options = FAMILIES[family]
    name = f"{prefix}TextConfig" if family == "gemma3_text" else f"{prefix}Config"
    base = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": None,
    }
    if family != "gpt_neox":
        base["num_key_value_heads"] = 2
    options = {**base, **options, **more}
    attention = options.pop("attn_implementation", attention)
    config = getattr(transformers, name)(**options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")._from_config(config, attn_implementation=attention, dtype=dtype)
    # The usual initialisation is so small that attention is uniform: a wrong rotation would hardly show. Norms of ones hide more.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.add_((0.3 * noise).to(dtype))
    return model


def documents(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def padded(texts, **options):
    """How transformers is used without packing: one document a row, padding on the right."""
    length = max(map(len, texts))
    ids = torch.tensor([text + [0] * (length - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "use_cache": False, **options}


def packed(texts, **options):
    return {**PackingCollator(names="hf")(texts), **options}


def run(model, inputs):
    """(loss, gradients by name)"""
    model.zero_grad(set_to_none=True)
    model.train()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def difference(ours, theirs):
    """The largest difference of the loss and of each gradient, relative to the largest gradient of that parameter."""
    worst = abs(float(ours[0] - theirs[0])) / abs(float(theirs[0]))
    assert ours[1].keys() == theirs[1].keys()
    floor = 1e-3 * max(float(g.abs().max()) for g in theirs[1].values())
    for name, gradient in theirs[1].items():
        worst = max(worst, float((ours[1][name] - gradient).abs().max()) / max(float(gradient.abs().max()), floor))
    return worst


def attributes(model):
    return {name: {"__class__": type(module), **vars(module)} for name, module in model.named_modules()}


def same_attributes(before, after):
    if before.keys() != after.keys():
        return False
    for name in before:
        if before[name].keys() != after[name].keys():
            return False
        for key, value in before[name].items():
            now = after[name][key]
            if now is not value and not (isinstance(now, dict) and now == value):
                return False
    return True


def mean_of_documents(model, texts, reduction):
    """By its definition, documents one by one, with the stock loss."""
    losses = [model(input_ids=torch.tensor([t]), labels=torch.tensor([t]), use_cache=False).loss for t in texts if len(t) > 1]
    weights = [1 if reduction == "seq-mean-token-mean" else len(t) - 1 for t in texts if len(t) > 1]
    total = sum(w * x for w, x in zip(weights, losses, strict=True))
    return total / (sum(weights) if reduction == "mean" else len(losses))
