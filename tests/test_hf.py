"""packops.hf: every family packed equals padded, patched equals stock; one instance changes and nothing else; the undo is exact."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import os
import pickle
import subprocess
import sys
import threading
import traceback
import warnings

import pytest
import torch
from torch import nn

import packops
import packops.hf
from packops import PackedBatch, PackingCollator
from packops.hf import families, record, rewrite
from packops.hf import loss as hf_loss
from packops.hf import rope as hf_rope

transformers = pytest.importorskip("transformers")

VOCABULARY = 61
LENGTHS = (13, 5, 1, 22, 8)


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small only lose by sharing their work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[False, True], ids=["logits", "fused"])
def fused(request, monkeypatch):
    """With and without packops.linear_cross_entropy."""
    if not request.param:
        monkeypatch.delattr(packops, "linear_cross_entropy", raising=False)
    elif not hasattr(packops, "linear_cross_entropy"):
        monkeypatch.setattr(packops, "linear_cross_entropy", linear_cross_entropy, raising=False)
    return request.param


def linear_cross_entropy(hidden, weight, labels, *, bias=None, num_valid=None, **options):
    """What the name promises, with the logits."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    return packops.cross_entropy(logits, labels, **options)


# ---- tiny models of every family ---------------------------------------------------------------------------------------------

# (class prefix, further configuration). hidden 32, two layers, heads of 8 unless it says otherwise.
FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 7, "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8, "attn_implementation": "eager"}),
    "gemma3_text": ("Gemma3", {"head_dim": 8, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("Phi3", {"pad_token_id": 0, "partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0], "pad_token_id": 0}),
    "granite": ("Granite", {"logits_scaling": 3.0, "attention_multiplier": 0.4}),
    "cohere": ("Cohere", {"logit_scale": 0.3, "use_qk_norm": True}),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.5}),
    "glm4": ("Glm4", {"head_dim": 8, "pad_token_id": 0}),
    "mixtral": ("Mixtral", {"num_local_experts": 3}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 8, "num_experts": 3, "moe_intermediate_size": 16, "num_experts_per_tok": 2}),
}
FUSED_NORMS = {"qwen3", "gemma3_text", "olmo2", "olmo3", "qwen3_moe"}


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


# ---- exact -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_patched_and_packed_equals_stock_and_padded(family, fused):
    model, texts = make(family), documents()
    stock = run(model, padded(texts))
    packops.hf.apply(model)
    report = packops.hf.report(model)
    assert report.tested
    assert report.replaced["tables"] == "fp32, from angles in fp64"
    assert ("apply_qk_norm_rope" in report.replaced["rope"]) == (family in FUSED_NORMS), report
    assert ("lm_head" in report.replaced) == fused
    assert report.notes == []
    ours = run(model, packed(texts))
    assert difference(ours, stock) < 2e-5
    assert difference(run(model, padded(texts)), stock) < 2e-5, "patched, padded"


def test_every_family_is_tested():
    assert set(FAMILIES) == set(families.TESTED)
