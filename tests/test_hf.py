"""packops.hf: every family packed equals padded, patched equals stock; one instance changes, nothing else; the undo is exact."""

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
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import packops
import packops.hf
from cuda_streams import no_host_sync
from packops import PackingCollator
from packops.hf import families, record, rewrite
from packops.hf import loss as hf_loss
from packops.hf import mlp as hf_mlp
from packops.hf import norm as hf_norm
from packops.hf import rope as hf_rope

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 61
LENGTHS = (13, 5, 1, 22, 8)


@pytest.fixture(params=[False, True], ids=["logits", "fused"])
def fused(request, monkeypatch):
    """Without logits where nobody wants them, and with them, as for a lm_head that is more than its weight."""
    if not request.param:
        monkeypatch.setattr(hf_loss, "_is_plain_linear", lambda head: False)
    return request.param


# ---- tiny models of every family --------------------------------------------------------------------------------------------

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


# ---- exact ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, fused", [(f, True) for f in FAMILIES] + [(f, False) for f in BOTH], indirect=["fused"])
def test_patched_and_packed_equals_stock_and_padded(family, fused):
    model, texts = make(family), documents()
    stock = run(model, padded(texts))
    packops.hf.apply(model)
    report = packops.hf.report(model)
    assert report.tested
    assert report.replaced["tables"] == "fp32, from angles in fp64"
    assert ("apply_qk_norm_rope" in report.replaced["rope"]) == (family in FUSED_NORMS), report
    assert "lm_head" in report.replaced
    assert report.replaced.get("mlp") == (None if family in UNGATED else "packops.gated_linear in 2 modules")
    assert report.notes == []
    for name, module in model.named_modules():
        absorbed = family in FUSED_NORMS and name.endswith(("q_norm", "k_norm"))
        if "Norm" in type(module).__name__:
            assert ("forward" in vars(module)) == ("RMSNorm" in type(module).__name__ and not absorbed), name
    ours = run(model, packed(texts))
    assert difference(ours, stock) < 2e-5
    assert difference(run(model, padded(texts)), stock) < 2e-5, "patched, padded"


def test_every_family_is_tested():
    assert set(FAMILIES) == set(families.TESTED)


# ---- verify, and what it must catch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_verify_is_green(reduction, fused):
    model = packops.hf.apply(make("qwen3"), reduction=reduction)
    report = packops.verify(model, documents(), reduction=reduction)
    assert report.ok, report
    assert report.worst_leak == 0


def test_verify_runs_what_training_runs(monkeypatch):
    """A mistake in the path without logits is seen, although verify has the model in evaluation mode."""

    right = packops.linear_cross_entropy
    monkeypatch.setattr(packops, "linear_cross_entropy", lambda *inputs, **options: right(*inputs, **options) * 1.01)
    assert not packops.verify(packops.hf.apply(make("llama")), documents()).ok


def test_positions_that_do_not_restart_are_caught():
    def collate(texts):
        batch = PackingCollator()(texts)
        batch.position_ids = torch.arange(batch.num_tokens)[None]
        return batch

    report = packops.verify(packops.hf.apply(make("llama")), documents(), collator=collate)
    assert not report.ok
    assert report.worst_leak > 1e-3


def test_a_loss_across_the_boundary_is_caught(monkeypatch):
    """The last token of a document scored against the first of the next, as labels without boundaries have it."""

    def careless(self, logits, labels, vocab_size=None, num_items_in_batch=None, **kwargs):
        ids = kwargs["shift_labels"]
        return packops.cross_entropy(logits, ids, num_items=num_items_in_batch)

    def forward(model, batch, num_items):
        ids = torch.nn.functional.pad(batch.input_ids[:, 1:], (0, 1), value=-100)
        return model(**batch.to_hf(), shift_labels=ids, num_items_in_batch=num_items).loss

    report = packops.verify(packops.hf.apply(make("llama")), documents(), loss=forward)
    assert not report.ok
    assert "boundary" in report.findings[0]


def test_a_denominator_of_the_micro_batch_is_caught():
    def forward(model, batch, num_items):
        return model(**batch.to_hf()).loss

    report = packops.verify(packops.hf.apply(make("llama")), documents(), loss=forward)
    assert not report.ok
    assert "its own count" in report.findings[0]


@pytest.mark.parametrize("change", ["position", "pairs", "norm", "scale"])
def test_a_wrong_rotation_is_caught(change, monkeypatch):
    """The comparison of patched with stock notices each planted mistake by far more than its tolerance."""
    model, texts = make("qwen3"), documents()
    stock = run(model, packed(texts))
    original = hf_rope.apply_qk_norm_rope

    def wrong(q, k, q_weight, k_weight, *, cos, sin, **options):
        if change == "position":
            cos, sin = cos.roll(1, 1), sin.roll(1, 1)
        elif change == "pairs":
            options["interleaved"] = True
        elif change == "norm":
            q_weight, k_weight = k_weight, q_weight
        else:
            cos = cos * 1.001
        return original(q, k, q_weight, k_weight, cos=cos, sin=sin, **options)

    monkeypatch.setattr(hf_rope, "apply_qk_norm_rope", wrong)
    assert difference(run(packops.hf.apply(model), packed(texts)), stock) > 2e-4


# ---- one instance, and back -------------------------------------------------------------------------------------------------


def attributes(model):
    return {name: dict(vars(module)) for name, module in model.named_modules()}


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


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "cohere"])
def test_revert_is_exact(family, fused):
    model, texts = make(family), documents()
    before, stock = attributes(model), run(model, packed(texts))
    model.zero_grad(set_to_none=True)
    config = copy.deepcopy(model.config.to_dict())
    packops.hf.apply(model, attention="eager", reduction="seq-mean-token-sum")
    assert not same_attributes(before, attributes(model))
    assert float(run(model, packed(texts))[0]) != float(stock[0])
    packops.hf.revert(model)
    model.zero_grad(set_to_none=True)
    assert same_attributes(before, attributes(model))
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"
    again = run(model, packed(texts))
    assert torch.equal(again[0], stock[0])
    assert all(torch.equal(again[1][name], gradient) for name, gradient in stock[1].items())
    assert repr(packops.hf.report(model)) == f"packops.hf: nothing is replaced in {type(model).__name__}"
    packops.hf.revert(model)  # once more does nothing


def test_only_this_instance_changes(fused):
    from transformers.models.qwen3 import modeling_qwen3 as module

    def world():
        classes = [value for value in vars(module).values() if isinstance(value, type)]
        return dict(vars(module)), [dict(vars(cls)) for cls in classes], torch.nn.functional.cross_entropy

    model, other, texts = make("qwen3"), make("qwen3"), documents()
    stock, before, outside = run(other, packed(texts)), attributes(other), world()
    packops.hf.apply(model)
    run(model, packed(texts))
    other.zero_grad(set_to_none=True)
    assert same_attributes(before, attributes(other))
    assert world() == outside
    again = run(other, packed(texts))
    assert all(torch.equal(again[1][name], gradient) for name, gradient in stock[1].items())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert model.state_dict().keys() == other.state_dict().keys()


def test_apply_again_changes_the_options():
    model = make("llama")
    before = attributes(model)
    packops.hf.apply(model)
    packops.hf.apply(model, rope=False, reduction="seq-mean-token-mean")
    assert packops.hf.report(model).replaced["loss"] == "packops.cross_entropy, reduction 'seq-mean-token-mean'"
    assert "rope" not in packops.hf.report(model).replaced
    packops.hf.revert(model)
    assert same_attributes(before, attributes(model))


def test_parts():
    model = make("llama")
    assert packops.hf.apply(model, cross_entropy=False, rms_norm=False, mlp=False) is model
    assert set(packops.hf.report(model).replaced) == {"rope", "tables"}
    assert model.loss_function.__name__ == "ForCausalLMLoss"
    packops.hf.apply(model, rope=False, cross_entropy=False, mlp=False)
    assert packops.hf.report(model).replaced == {"rms_norm": "packops.rms_norm (torch's on the CPU) in 5 modules"}
    packops.hf.apply(model, rope=False, cross_entropy=False, rms_norm=False)
    assert packops.hf.report(model).replaced == {"mlp": "packops.gated_linear in 2 modules"}
    packops.hf.apply(model, rope=False, cross_entropy=False, rms_norm=False, mlp=False)
    assert packops.hf.report(model).replaced == {}


def test_deepcopy_is_patched_and_on_its_own(fused):
    model, texts = make("qwen3"), documents()
    packops.hf.apply(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    stock = run(make("qwen3"), packed(texts))
    assert difference(run(twin, packed(texts)), stock) < 1e-5, "the copy computes with the original's weights"
    layer = twin.model.layers[0].self_attn
    for module in (layer, twin.model.norm):
        assert vars(module)["forward"].__self__ is module
    packops.hf.revert(twin)
    assert "forward" not in vars(layer)
    assert "forward" in vars(model.model.layers[0].self_attn)
    assert packops.hf.report(model).replaced
    assert difference(run(twin, packed(texts)), stock) == 0


def test_pickled_models_come_back_stock(fused):
    model, texts = make("qwen3"), documents()
    stock = run(model, packed(texts))
    model.zero_grad(set_to_none=True)
    packops.hf.apply(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert packops.hf.report(twin).replaced == {}
    assert difference(run(twin, packed(texts)), stock) == 0
    packops.hf.apply(twin)
    assert packops.hf.report(twin).replaced == packops.hf.report(model).replaced
    assert 0 < difference(run(twin, packed(texts)), stock) < 1e-5
    packops.hf.revert(twin)
    assert difference(run(twin, packed(texts)), stock) == 0
    packops.hf.revert(pickle.loads(pickle.dumps(model)))


def test_save_pretrained(tmp_path):
    model = make("llama")
    packops.hf.apply(model)
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert packops.hf.report(again).replaced == {}
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_threads():
    """Models patched, run and reverted at the same time give what they give alone."""
    texts, failures = documents(), []
    stock = {family: run(make(family), packed(texts)) for family in ("llama", "qwen3")}

    def work(family):
        try:
            model = make(family)
            for _ in range(3):
                packops.hf.apply(model)
                assert 0 < difference(run(model, packed(texts)), stock[family]) < 1e-5
                packops.hf.revert(model)
                assert difference(run(model, packed(texts)), stock[family]) == 0
        except BaseException:
            failures.append(traceback.format_exc())

    threads = [threading.Thread(target=work, args=(family,)) for family in ("llama", "qwen3") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_something_else_in_the_way():
    model = make("llama")
    layer = model.model.layers[1].self_attn
    layer.forward = functools.partial(type(layer).forward, layer)  # as accelerate's hooks do
    with pytest.raises(
        ValueError, match=r"forward of model\.layers\.1\.self_attn \(LlamaAttention\) was already replaced.*functools"
    ):
        packops.hf.apply(model)
    assert "forward" not in vars(model.model.layers[0].self_attn), "a refusal changes nothing"
    del layer.forward
    packops.hf.apply(model)
    ours = layer.forward
    layer.forward = functools.partial(ours)
    with pytest.raises(RuntimeError, match=r"forward of model\.layers\.1\.self_attn was replaced again"):
        packops.hf.revert(model)
    assert "forward" in vars(model.model.layers[0].self_attn), "all or nothing"
    del layer.forward  # which is one way out, and putting ours back another
    packops.hf.revert(model)
    assert not any("forward" in vars(module) for module in model.modules())


# ---- ways to run a model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, fused):
    model, texts = make("qwen3"), documents()
    stock = run(model, packed(texts))
    packops.hf.apply(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # 5.23, before it
    enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert difference(run(model, packed(texts)), stock) < 1e-5


@pytest.mark.parametrize("family, fused", [("llama", True), ("qwen3", False)], indirect=["fused"])
def test_compile(family, fused):
    """In one graph, which holds our operations and not the stock ones."""
    model, texts = make(family), documents()
    stock = run(model, packed(texts))
    packops.hf.apply(model)
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert difference(run_compiled(compiled, model, packed(texts)), stock) < 1e-5
    op = "packops.qk_norm_rope" if family == "qwen3" else "packops.rope"
    assert sum(target.startswith(op) for target in targets) == 2
    losses = ("packops.cross_entropy", "packops.linear_cross_entropy")
    assert sum(target.startswith(losses) for target in targets) == 1
    assert sum("rms_norm" in target for target in targets) == 5
    assert not any("rsqrt" in target or "silu" in target for target in targets)
    torch.compiler.reset()


def run_compiled(compiled, model, inputs):
    model.zero_grad(set_to_none=True)
    model.train()
    loss = compiled(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text", "cohere"])
def test_generate(family):
    model = make(family).eval()
    prompt = {"input_ids": torch.tensor([[0, 0, 7, 8, 9], [3, 4, 5, 6, 7]])}
    prompt["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    want = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert len(set(want[:, 5:].flatten().tolist())) > 4, "a model that says one thing proves nothing"
    packops.hf.apply(model)
    assert torch.equal(model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0), want)


def test_autocast(fused):
    model, texts = make("qwen3"), documents()
    model.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY))
    exact = run(model, packed(texts))
    with torch.autocast("cpu", torch.bfloat16):
        stock = difference(run(model, packed(texts)), exact)
        ours = difference(run(packops.hf.apply(model), packed(texts)), exact)
    assert ours < 1.5 * stock < 0.5
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_wrappers():
    """PEFT and its like hold the model; what is below is found, and nothing is changed above."""

    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.base_model = model

    wrapper = Wrapper(make("llama"))
    assert packops.hf.apply(wrapper) is wrapper
    assert set(vars(wrapper)) == set(vars(Wrapper(make("llama"))))
    assert packops.hf.report(wrapper).replaced == packops.hf.report(wrapper.base_model).replaced != {}
    packops.hf.revert(wrapper)
    assert packops.hf.report(wrapper).replaced == {}
    with pytest.raises(TypeError, match=r"must be a transformers\.PreTrainedModel or hold one, got Linear"):
        packops.hf.apply(nn.Linear(2, 2))


def test_signature_and_traceback():
    """Trainer reads the first, people the second."""
    model = make("llama")
    before = inspect.signature(model.forward)
    packops.hf.apply(model)
    assert inspect.signature(model.forward) == before
    layer = model.model.layers[0].self_attn
    assert inspect.signature(layer.forward) == inspect.signature(type(layer).forward.__get__(layer))
    layer.q_proj = None
    with pytest.raises(TypeError) as caught:
        model(**packed(documents()))
    shown = "".join(traceback.format_exception(caught.value))
    assert "modeling_llama.py" in shown
    assert "query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)" in shown
    assert "outputs: BaseModelOutputWithPast = self.model(" in shown


# ---- RMS norms --------------------------------------------------------------------------------------------------------------


def norms_of(dtype=torch.float32, width=40):
    """A norm of each kind: weight rounded last, weight in fp32, 1 + weight."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    norms = LlamaRMSNorm(width, eps=1e-3), Olmo2RMSNorm(width, eps=1e-3), Gemma2RMSNorm(width, eps=1e-3)
    for norm in norms:
        norm.weight.data += 0.3 * torch.randn(width)
        norm.to(dtype)
    return norms


def patched(norm):
    """The norm as ``apply`` has it, on its own."""
    twin = copy.deepcopy(norm)
    hf_norm.patch(twin, record.Record(record.Report("", "", True)))
    assert "forward" in vars(twin)
    return twin


def test_norms_are_recognised():
    llama, olmo, gemma = norms_of()
    assert hf_norm.recognise(llama) == (type(llama), "variance_epsilon", False)
    assert hf_norm.recognise(olmo) == (type(olmo), "variance_epsilon", False)
    assert hf_norm.recognise(gemma) == (type(gemma), "eps", True)
    assert hf_norm.recognise(llama.to("meta")) == (type(llama), "variance_epsilon", False)


class Norm(nn.Module):
    """``forward`` in one line, given the normed input too."""

    def __init__(self, **more):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6
        for name, value in more.items():
            self.register_parameter(name, value) if isinstance(value, nn.Parameter) else self.register_buffer(name, value)

    def normed(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Biased(Norm):
    def forward(self, x):
        return self.normed(x) * self.weight + self.bias


class Buffered(Norm):
    def forward(self, x):
        return self.normed(x) * self.weight * self.scale


class Gated(Norm):
    def forward(self, x, gate=None):
        return self.normed(x) * self.weight if gate is None else self.normed(x) * self.weight * gate


class Weightless(Norm):
    def forward(self, x):
        return self.normed(x)


class EpsilonOutside(Norm):
    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class Clipped(Norm):
    def forward(self, x):
        return self.weight * self.normed(x.clamp(-50, 50))


class InGroups(Norm):
    def forward(self, x):
        return self.weight * self.normed(x.unflatten(-1, (2, -1))).flatten(-2)


class Doubled(Norm):
    def forward(self, x):
        return self.normed(x) * (2 + self.weight)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(32, bias=False),
        nn.LayerNorm(32),
        nn.BatchNorm1d(32),
        nn.GroupNorm(4, 32),
        Biased(bias=nn.Parameter(torch.zeros(32))),
        Buffered(scale=torch.ones(())),
        Gated(),
        Weightless(),
        EpsilonOutside(),
        Clipped(),
        InGroups(),
        Doubled(),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_norms_that_compute_something_else_are_left_alone(norm):
    model = make("llama")
    model.model.norm = norm
    before = [tensor.clone() for tensor in norm.state_dict().values()]
    packops.hf.apply(model)
    assert packops.hf.report(model).replaced["rms_norm"] == "packops.rms_norm (torch's on the CPU) in 4 modules"
    assert "forward" not in vars(norm)
    assert all(map(torch.equal, before, norm.state_dict().values())), "asking has changed it"


def test_a_norm_without_numbers_is_left_alone():
    """DeepSpeed's partitioned weights hold none, so any answer would agree."""
    llama, _, _ = norms_of()
    llama.weight.data = torch.empty(0)
    assert hf_norm.recognise(llama) is None


def test_a_norm_that_somebody_else_replaced_is_left_alone():
    model, texts = make("llama"), documents()
    norm = model.model.norm
    norm.forward = theirs = functools.partial(type(norm).forward, norm)
    stock = run(model, packed(texts))
    packops.hf.apply(model)
    assert packops.hf.report(model).replaced["rms_norm"] == "packops.rms_norm (torch's on the CPU) in 4 modules"
    assert difference(run(model, packed(texts)), stock) < 1e-5
    packops.hf.revert(model)
    assert vars(norm)["forward"] is theirs


def test_norms_of_16_bits_are_no_less_accurate_than_stock(device):
    """Against fp64, output and both gradients. The stock norms round more often."""
    x = torch.randn(64, 40, dtype=torch.bfloat16, device=device)
    grad = torch.randn_like(x)

    def errors(norm, exact):
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(results(norm, x, grad), exact, strict=True)]

    def results(norm, x, grad):
        x = x.clone().requires_grad_()
        y = norm(x)
        return y.detach(), *torch.autograd.grad(y, (x, norm.weight), grad)

    for norm in norms_of(torch.bfloat16):
        norm = norm.to(device)
        exact = results(patched(norm).double(), x.double(), grad.double())
        ours, stock = errors(patched(norm), exact), errors(norm, exact)
        assert all(a < 1.02 * b for a, b in zip(ours, stock, strict=True)), (ours, stock)
        assert max(ours) < 4e-3
        plain = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-3)
        gain = norm.weight.double() + (type(norm).__name__ == "Gemma2RMSNorm")
        torch.testing.assert_close(exact[0], plain * gain)


@pytest.mark.parametrize("autocast", [False, True])
def test_norms_return_the_dtype_of_stock(device, autocast):
    """Where weight and input differ, too; then the module's own forward runs."""
    for weight in (torch.float32, torch.bfloat16):
        for norm in norms_of(weight):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                norm, x = norm.to(device), torch.randn(6, 40, dtype=dtype, device=device)
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    ours, stock = patched(norm)(x), norm(x)
                assert ours.dtype == stock.dtype
                if weight != dtype and type(norm).__name__ != "Gemma2RMSNorm":
                    assert torch.equal(ours, stock)


def test_a_norm_reads_its_epsilon_at_every_call():
    for norm in norms_of():
        twin, x = patched(norm), torch.randn(3, 40)
        setattr(twin, hf_norm.recognise(norm).eps, 2.0)
        setattr(norm, hf_norm.recognise(norm).eps, 2.0)
        torch.testing.assert_close(twin(x), norm(x))


def test_which_rows_have_a_kernel(monkeypatch):
    def has_kernel(columns, dtype=torch.bfloat16, is_cuda=True):
        x = SimpleNamespace(shape=(3, columns), dtype=dtype, is_cuda=is_cuda, element_size=lambda: dtype.itemsize)
        return hf_norm.has_kernel(x)

    monkeypatch.setattr(hf_norm, "HAS_KERNELS", True)
    f32 = torch.float32
    assert all(has_kernel(*row) for row in ((8,), (8192,), (4, f32), (4096, f32)))
    assert not any(has_kernel(*row) for row in ((0,), (12,), (8200,), (8192, f32), (64, torch.float64)))
    assert not has_kernel(64, is_cuda=False)
    monkeypatch.setattr(hf_norm, "HAS_KERNELS", False)
    assert not has_kernel(64)


@pytest.mark.gpu
def test_norms_are_fused_on_a_gpu():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.add(str(op))
            return op(*args, **(kwargs or {}))

    for norm in norms_of(torch.bfloat16):
        norm, seen = patched(norm.to("cuda")), set()
        x = torch.randn(3, 5, 40, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        with Ops():
            norm(x).sum().backward()
        assert {"packops._rms_norm.default", "packops._rms_norm_backward.default"} <= seen
        assert not {op for op in seen if "rsqrt" in op or "pow" in op or "_to_copy" in op}


# ---- gated MLPs -------------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """As most families write it, and what subclasses make of it."""

    def __init__(self, act=None):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.act_fn = act or nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Exchanged(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Clamped(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=50.0)) * self.up_proj(x))


class Scaled(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 1.001


class Dropping(MLP):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.001, self.training)


class Routed(MLP):
    def forward(self, x, weights=None):
        return super().forward(x)


class WithMore(MLP):
    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()


class WithScale(MLP):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class Widths(MLP):
    """Computes with sizes of its own, which small projections do not have."""

    def forward(self, x):
        return super().forward(x.view(-1, 32)).view(x.shape)


def hooked():
    mlp = MLP()
    mlp.act_fn.register_forward_hook(lambda *_: None)
    return mlp


@pytest.mark.parametrize(
    "mlp",
    [
        Exchanged(), Clamped(), Scaled(), Dropping(), Routed(), WithMore(), WithScale(), Widths(), hooked(),
        MLP(nn.ReLU()), MLP(nn.Tanh()), MLP(nn.Sigmoid()), MLP(nn.Mish()), MLP(nn.PReLU(init=0.5)),
        MLP(transformers.activations.QuickGELUActivation()), MLP(transformers.activations.ClippedGELUActivation(-10, 10)),
    ],
    ids=lambda mlp: f"{type(mlp).__name__} {type(mlp.act_fn).__name__}",
)  # fmt: skip
def test_mlps_that_compute_something_else_are_left_alone(mlp):
    model = make("llama")
    model.model.layers[1].mlp = mlp
    random = torch.random.get_rng_state()
    packops.hf.apply(model.eval())  # dropout is off, and will be on
    assert packops.hf.report(model).replaced["mlp"] == "packops.gated_linear in 1 modules"
    assert "forward" not in vars(mlp)
    assert torch.equal(torch.random.get_rng_state(), random), "asking takes from the user's random numbers"


@pytest.mark.parametrize(
    ("act", "activation"),
    [
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        *((transformers.activations.ACT2FN[name], activation) for name, activation in (
            ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_new", "gelu_tanh"), ("swish", "silu"),
        )),
    ],
)  # fmt: skip
def test_activations_are_told_apart(act, activation):
    mlp = MLP(act)
    assert hf_mlp.recognise(mlp).activation == activation
    with torch.device("meta"):  # whatever the default device
        assert hf_mlp.recognise(mlp).activation == activation


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_mlps_of_16_bits_are_no_less_accurate_than_stock(device, family):
    mlp = make(family, torch.bfloat16).model.layers[0].mlp.to(device)
    x, grad = torch.randn(2, 64, 32, device=device).bfloat16()
    ours = copy.deepcopy(mlp)
    ours.forward = hf_mlp._forward(hf_mlp.recognise(mlp)).__get__(ours)

    def results(mlp, x, grad):
        x = x.clone().requires_grad_()
        y = mlp(x)
        return y.detach(), *torch.autograd.grad(y, (x, *mlp.parameters()), grad)

    exact = results(copy.deepcopy(mlp).double(), x.double(), grad.double()) if device.type == "cpu" else None
    exact = exact or [y.to(device) for y in results(copy.deepcopy(mlp).cpu().double(), x.cpu().double(), grad.cpu().double())]
    errors = [
        [float((a.double() - b).norm() / b.norm()) for a, b in zip(results(m, x, grad), exact, strict=True)] for m in (ours, mlp)
    ]
    assert all(a < 1.05 * b for a, b in zip(*errors, strict=True)), errors


class LoRA(nn.Module):
    """As PEFT wraps a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("first", ["lora", "apply"])
def test_projections_that_are_more_than_their_weight(family, first):
    """They are called, whether they were wrapped before or after apply; so is the activation, if somebody looks at it."""
    model, texts = make(family), documents()
    if first == "apply":
        packops.hf.apply(model)
    mlp = model.model.layers[0].mlp
    torch.manual_seed(3)
    for name in ("down_proj", "gate_up_proj" if family == "phi3" else "up_proj"):
        setattr(mlp, name, LoRA(getattr(mlp, name)))
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.1,))
    ours = run(model, packed(texts))
    packops.hf.revert(model)
    stock = run(model, packed(texts))
    if first == "lora":
        ours = run(packops.hf.apply(model), packed(texts))
        assert packops.hf.report(model).replaced["mlp"] == "packops.gated_activation in 2 modules"
    assert "model.layers.0.mlp.down_proj.a.weight" in stock[1]
    assert 0 < difference(ours, stock) < 1e-5

    seen = []
    packops.hf.apply(model)
    act = mlp.activation_fn if family == "phi3" else mlp.act_fn
    act.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert difference(run(model, packed(texts)), stock) < 1e-5
    assert len(seen) == 1


def test_a_mlp_that_somebody_else_replaced_is_left_alone():
    model, texts = make("llama"), documents()
    mlp = model.model.layers[0].mlp
    mlp.forward = theirs = functools.partial(type(mlp).forward, mlp)
    stock = run(model, packed(texts))
    packops.hf.apply(model)
    assert packops.hf.report(model).replaced["mlp"] == "packops.gated_linear in 1 modules"
    assert difference(run(model, packed(texts)), stock) < 1e-5
    packops.hf.revert(model)
    assert vars(mlp)["forward"] is theirs


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_patched_mlp_keeps_two_matrices(family):
    def kept(mlp):
        storages = {}

        def pack(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        parameters = {p.untyped_storage().data_ptr() for p in mlp.parameters()}
        x = torch.randn(100, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = mlp(x)
        del storages[x.untyped_storage().data_ptr()]
        assert out.requires_grad
        return sum(size for place, size in storages.items() if place not in parameters) / (100 * 48 * 4)

    model = make(family)
    assert kept(model.model.layers[0].mlp) == 4
    assert kept(packops.hf.apply(model).model.layers[0].mlp) == 2


# ---- the loss ---------------------------------------------------------------------------------------------------------------


def mean_of_documents(model, texts, reduction):
    """By its definition, documents one by one, with the stock loss."""
    losses = [model(input_ids=torch.tensor([t]), labels=torch.tensor([t]), use_cache=False).loss for t in texts if len(t) > 1]
    weights = [len(t) - 1 if reduction == "seq-mean-token-sum" else 1 for t in texts if len(t) > 1]
    return sum(w * x for w, x in zip(weights, losses, strict=True)) / len(losses)


@pytest.mark.parametrize("reduction", ["seq-mean-token-mean", "seq-mean-token-sum"])
def test_documents_are_found(reduction, fused):
    """By cu_seq_lens_q; by position_ids, as DataCollatorWithFlattening and TRL pack; by row, padded."""
    model, texts = make("llama").train(), documents()
    want = mean_of_documents(model, texts, reduction)
    packops.hf.apply(model, reduction=reduction)
    collated = transformers.DataCollatorWithFlattening()([{"input_ids": text} for text in texts])
    for inputs in (packed(texts), packed(texts, cu_seq_lens_q=None), {**collated, "use_cache": False}, padded(texts)):
        assert model(**inputs).loss.item() == pytest.approx(want.item(), rel=1e-5)
    right = padded(texts)
    left = {name: value if isinstance(value, bool) else value.flip(1) for name, value in right.items()}
    for row, text in enumerate(texts):
        left["input_ids"][row, -len(text) :] = left["labels"][row, -len(text) :] = torch.tensor(text)
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert model(**left).loss.item() == pytest.approx(want.item(), rel=1e-5), "padded on the left, positions given"


def test_documents_of():
    ids = torch.tensor([[0, 1, 2, 0, 1, 0], [5, 6, 0, 1, 2, 3]])
    assert hf_loss.documents_of(ids, ids.shape).tolist() == [0, 3, 5, 6, 8] + [12] * 8
    assert hf_loss.documents_of(torch.arange(4)[None], torch.Size((2, 4))).tolist() == [0, 4] + [8] * 7
    jumps = torch.tensor([4, 5, 5, 7, 8, 3])
    assert hf_loss.documents_of(jumps, torch.Size((1, 6))).tolist() == [0, 2, 3, 5, 6, 6, 6]
    with pytest.raises(ValueError, match=r"of shape \(3, 1, 6\) do not say where documents begin: pass cu_seq_lens_q"):
        hf_loss.documents_of(jumps.expand(3, 1, 6), torch.Size((1, 6)))


@pytest.mark.parametrize("num_items", [29, 29.0, torch.tensor(29), torch.tensor(29.0, dtype=torch.float64), torch.tensor([29])])
def test_num_items_in_batch(num_items, fused):
    model, texts = make("llama"), documents()
    stock = run(model, packed(texts, num_items_in_batch=29))
    packops.hf.apply(model)
    assert difference(run(model, packed(texts, num_items_in_batch=num_items)), stock) < 1e-5


def counting_trainer(model):
    """What of a Trainer counts the items of a step, as transformers has it."""
    from types import SimpleNamespace

    trainer = SimpleNamespace(
        model=model,
        model_accepts_loss_kwargs=True,
        compute_loss_func=None,
        _loss_shifts_labels=True,
        args=SimpleNamespace(average_tokens_across_devices=False, n_gpu=1, world_size=1),
        get_tp_size=lambda: 1,
        get_cp_size=lambda: 1,
        get_sp_size=lambda: 1,
    )
    trainer._get_num_items_in_batch = functools.partial(transformers.Trainer._get_num_items_in_batch, trainer)
    return trainer


def test_tokens_are_not_taken_for_documents(fused):
    """What Trainer counts, unless it is told otherwise, is refused rather than divided by."""
    model, texts = packops.hf.apply(make("llama"), reduction="seq-mean-token-mean"), documents()
    tokens = counting_trainer(model)._get_num_items_in_batch([packed(texts)], torch.device("cpu"))
    assert float(tokens) == sum(LENGTHS) - len(LENGTHS)
    for count in (tokens, torch.tensor(4)):
        with pytest.raises(
            ValueError, match=r"num_items_in_batch is a torch\.\w+ tensor.*packops\.hf\.count_documents\(trainer\)"
        ):
            model(**packed(texts, num_items_in_batch=count))
    model(**packed(texts, num_items_in_batch=torch.tensor(4.0, dtype=torch.float64)))
    model(**packed(texts, num_items_in_batch=4))


def test_count_documents():
    """Trainer's own count, of documents: of every micro-batch, with each way to tell documents apart."""
    texts = documents()  # one of them has a single token, so nothing to score
    batches = [
        packed(texts),
        packed(texts, cu_seq_lens_q=None),
        padded(texts),
        dict(PackingCollator(names="hf", shift_labels=True)(texts)),
        {**PackingCollator(names="hf", shift_labels=True)(texts), "cu_seq_lens_q": None},
    ]
    model = packops.hf.apply(make("llama"), reduction="seq-mean-token-mean").eval()
    trainer = counting_trainer(model)
    packops.hf.count_documents(trainer)
    for batch in batches:
        assert float(trainer._get_num_items_in_batch([batch], torch.device("cpu"))) == 4
    count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    assert float(count) == 20
    alone = [model(**batch).loss for batch in batches[:3]]
    together = [model(**batch, num_items_in_batch=count).loss for batch in batches[:3]]
    assert sum(together).item() == pytest.approx(sum(alone).item() * 4 / 20, rel=1e-5)
    with pytest.raises(ValueError, match=r"reduction='mean', which divides by tokens"):
        packops.hf.count_documents(counting_trainer(packops.hf.apply(model)))


def test_shift_labels_and_token_weight(fused):
    model, texts = make("llama"), documents()
    stock = run(model, packed(texts))
    packops.hf.apply(model)
    inputs = dict(PackingCollator(names="hf", shift_labels=True)(texts))
    assert difference(run(model, inputs), stock) < 1e-5
    inputs["labels"] = torch.full_like(inputs["labels"], 3)  # not looked at
    assert difference(run(model, inputs), stock) < 1e-5
    weight = torch.rand(1, sum(LENGTHS))
    weighted = model(**packed(texts, token_weight=weight)).loss.item()
    losses = packops.cross_entropy(
        model(**packed(texts), skip_logits=False).logits, packed(texts)["labels"], shift=True, reduction="none"
    )
    scored = packed(texts)["labels"].roll(-1, 1) != -100
    scored[:, -1] = False
    shares = losses * weight / (weight * scored).sum()
    assert weighted == pytest.approx(shares.sum().item(), rel=1e-5)


def test_logits_are_there_when_they_are_wanted(fused):
    model, inputs = packops.hf.apply(make("llama")).train(), packed(documents())
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    assert (model(**inputs).logits is None) == fused
    assert model(**inputs, skip_logits=False).logits.shape == (1, sum(LENGTHS), VOCABULARY)
    assert model(**unlabelled).logits is not None
    assert model(**unlabelled, skip_logits=True).logits is not None
    with torch.no_grad():
        assert model(**inputs).logits is not None
    model.eval()
    assert model(**inputs).logits is not None
    assert (model(**inputs, skip_logits=True).logits is None) == fused
    as_tuple = model(**inputs, skip_logits=True, return_dict=False)
    assert len(as_tuple) == 1 + (not fused)


def test_the_count_of_scored_tokens_reaches_the_lm_head(monkeypatch):
    """num_valid, which spares the others their matrix products."""
    seen, original = [], packops.linear_cross_entropy

    def note(*inputs, num_valid, **options):
        seen.append(num_valid)
        return original(*inputs, num_valid=num_valid, **options)

    monkeypatch.setattr(packops, "linear_cross_entropy", note)
    model, batch = packops.hf.apply(make("llama")).train(), PackingCollator()(documents())
    model(**batch.to_hf())
    model(**packed(documents(), num_valid=None))
    assert seen == [sum(LENGTHS) - len(LENGTHS), None]


def test_only_a_plain_lm_head_is_fused():
    """What a weight does not tell: LoRA on the head, hooks that gather its shards, a loss that the user put there later, and a
    parameter whose numbers are not the weight's."""
    texts = documents()

    class Quantised(nn.Parameter):
        pass

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = packops.hf.apply(make("llama")).train()
    assert model(**packed(texts)).logits is None
    hook = model.lm_head.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    doubled = model(**packed(texts))
    assert doubled.logits is not None
    hook.remove()
    assert model(**packed(texts)).logits is None
    weight = model.lm_head.weight
    model.lm_head = Scaled(32, VOCABULARY, bias=False)
    model.lm_head.weight = weight
    assert torch.equal(model(**packed(texts)).loss, doubled.loss)
    model = packops.hf.apply(make("llama")).train()
    model.lm_head.weight = Quantised(weight.detach().clone())
    assert model(**packed(texts)).logits is not None
    model = packops.hf.apply(make("llama")).train()
    model.loss_function = lambda logits, labels, **kwargs: logits.sum()
    assert model(**packed(texts)).logits is not None


def test_tied_embeddings_and_a_bias(fused):
    texts = documents()
    for model in (make("llama", tie_word_embeddings=True), make("llama")):
        if not model.config.tie_word_embeddings:
            model.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY))
        stock = run(model, packed(texts))
        assert difference(run(packops.hf.apply(model), packed(texts)), stock) < 1e-5


def test_router_loss_is_kept(fused):
    model, texts = make("mixtral", router_aux_loss_coef=0.7), documents()
    stock = run(model, packed(texts, output_router_logits=True))
    packops.hf.apply(model)
    assert difference(run(model, packed(texts, output_router_logits=True)), stock) < 1e-5
    assert float(run(model, packed(texts))[0]) < float(stock[0]) - 0.5, "the router's loss is not in it"


def test_compute_loss_func():
    model, texts = make("gemma2"), documents()
    stock = float(model(**padded(texts)).loss)
    inputs = padded(texts)
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    assert float(packops.hf.compute_loss_func(outputs, labels)) == pytest.approx(stock, rel=1e-5)
    assert float(packops.hf.compute_loss_func(dict(outputs), labels, num_items_in_batch=2)) == pytest.approx(
        stock * (sum(LENGTHS) - len(LENGTHS)) / 2, rel=1e-5
    )
    by_document = functools.partial(packops.hf.compute_loss_func, reduction="seq-mean-token-mean")
    want = mean_of_documents(model.eval(), texts, "seq-mean-token-mean")
    assert float(by_document(outputs, labels)) == pytest.approx(float(want), rel=1e-5)
    with pytest.raises(ValueError, match="cannot tell which documents are in a single row"):
        by_document(model(**{k: v for k, v in packed(texts).items() if k != "labels"}), packed(texts)["labels"])
    with pytest.raises(ValueError, match="returned no logits"):
        packops.hf.compute_loss_func({"logits": None}, labels)


# ---- rotary tables ----------------------------------------------------------------------------------------------------------

ROPE_TYPES = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.1, 2.2, 2.3],
    },
}


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_rope_types(kind):
    """Every scaling, on both sides of the trained length, where "dynamic" and "longrope" change their frequencies."""
    parameters = {"rope_type": kind, "rope_theta": 100.0, **ROPE_TYPES[kind]}
    stock, ours = (make("llama", rope_parameters=dict(parameters)) for _ in range(2))
    packops.hf.apply(ours)
    assert packops.hf.report(ours).replaced["tables"].startswith("fp32")
    for lengths in ((9, 4), (30, 3), (9, 4), (70, 9), (5, 2)):
        inputs = packed(documents(lengths))
        assert difference(run(ours, inputs), run(stock, inputs)) < 3e-5, lengths


def test_tables_are_more_accurate_than_stock():
    """bf16 model, far positions: the rotation is that of the model's own frequencies, rounded once."""
    model = make("llama", dtype=torch.bfloat16)
    rotary = model.model.rotary_emb
    position_ids = torch.tensor([[0, 1, 4095, 131071]])
    x = torch.zeros(1, 4, 32, dtype=torch.bfloat16)
    angles = position_ids.double()[..., None] * rotary.inv_freq.double()
    stock = rotary(x, position_ids)[0][..., :4]
    packops.hf.apply(model)
    cos, sin = rotary(x, position_ids)
    assert cos.dtype == sin.dtype == torch.float32
    assert float((cos.double() - angles.cos()).abs().max()) < 1e-7
    assert float((sin.double() - angles.sin()).abs().max()) < 1e-7
    assert float((stock.double() - angles.cos()).abs().max()) > 1e-3
    assert rotary(x.double(), position_ids)[0].dtype == torch.float64


def test_rounded_frequencies_are_told():
    model = make("llama")
    assert packops.hf.report(packops.hf.apply(model)).notes == []
    model = packops.hf.apply(model.bfloat16())
    (note,) = packops.hf.report(model).notes
    assert "inv_freq" in note
    assert "note: the rotary frequencies" in repr(packops.hf.report(model))


def test_another_table_is_noticed():
    """By its numbers, and where it depends on more than a few numbers could tell, by the names it uses."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

    class Swapped(LlamaRotaryEmbedding):
        def forward(self, x, position_ids):
            angles = position_ids[..., None].float() * self.inv_freq
            table = torch.cat((angles, angles), dim=-1)
            return table.sin().to(x.dtype), table.cos().to(x.dtype)

    Swapped.__module__ = LlamaRotaryEmbedding.__module__
    model, texts = make("llama"), documents()
    assert hf_rope._same_tables(model.model.rotary_emb, families.Convention(False, "cat"))
    assert not hf_rope._same_tables(model.model.rotary_emb, families.Convention(False, "repeat"))
    assert not hf_rope._same_tables(PhimoeRotaryEmbedding(model.config), families.Convention(False, "cat"))
    model.model.rotary_emb = Swapped(model.config)
    stock = run(model, packed(texts))
    packops.hf.apply(model)
    assert packops.hf.report(model).replaced["tables"].startswith("the model's own")
    assert difference(run(model, packed(texts)), stock) < 1e-5


def test_own_tables_are_kept_where_they_are_not_understood(monkeypatch):
    """Then RoPE reads what the model gathered, in each convention."""
    monkeypatch.setattr(hf_rope, "_same_tables", lambda rotary, convention: False)
    for family in ("llama", "cohere", "glm4", "gpt_neox"):
        model, texts = make(family), documents()
        stock = run(model, packed(texts))
        packops.hf.apply(model)
        assert packops.hf.report(model).replaced["tables"].startswith("the model's own")
        assert difference(run(model, packed(texts)), stock) < 1e-5, family


# ---- what is not known is refused -------------------------------------------------------------------------------------------


def test_conventions():
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm
    from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as gpt_oss
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama
    from transformers.models.nanochat.modeling_nanochat import apply_rotary_pos_emb as nanochat

    assert families.convention_of(llama) == (False, "cat")
    assert families.convention_of(cohere) == (True, "repeat")
    assert families.convention_of(glm) == (True, "cat")
    assert families.convention_of(gpt_oss) == (False, "half")
    assert families.convention_of(nanochat) is None, "it turns the other way"
    assert families.convention_of(lambda q, k, cos, sin: (q, k)) is None


@pytest.mark.parametrize(
    "config, reason",
    [
        (("NanoChat", {"head_dim": 8}), "turns heads in a way of its own"),
        (("GPT2", {"n_embd": 32, "n_layer": 1, "n_head": 4}), "no layer of it calls apply_rotary_pos_emb"),
    ],
)
def test_unknown_families_are_refused(config, reason):
    prefix, options = config
    base = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 32,
    }
    config = getattr(transformers, f"{prefix}Config")(**({} if prefix == "GPT2" else base), **options)
    name = "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    model = getattr(transformers, name)(config)
    before = attributes(model)
    with pytest.raises(ValueError, match=reason) as caught:
        packops.hf.apply(model)
    assert "Llama, Mistral" in str(caught.value)
    assert "rope=False" in str(caught.value)
    assert same_attributes(before, attributes(model))
    packops.hf.apply(model, rope=False)
    assert "rope" not in packops.hf.report(model).replaced
    assert "do not cover" in repr(packops.hf.report(model))


def test_other_tasks_are_refused():
    config = make("llama").config
    model = transformers.LlamaForSequenceClassification(config)
    with pytest.raises(ValueError, match=r"LlamaForSequenceClassification \('ForSequenceClassification'\): it does not score"):
        packops.hf.apply(model)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
    with pytest.raises(ValueError, match="does not score each token's successor"):
        packops.hf.apply(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)), rope=False)
    packops.hf.apply(model, cross_entropy=False)
    assert "rope" in packops.hf.report(model).replaced


def test_an_ending_that_is_not_known_keeps_its_logits():
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, position_ids=None, **kwargs):
            logits = self.lm_head(self.model(input_ids, position_ids=position_ids, **kwargs).last_hidden_state)
            logits = logits.square()
            loss = None
            if labels is not None:
                loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
            return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    model, texts = Odd(make("llama").config), documents()
    model.loss_type = "ForCausalLM"
    stock = run(model, packed(texts))
    packops.hf.apply(model)
    assert difference(run(model, packed(texts)), stock) < 1e-5
    assert "logits are always made" in packops.hf.report(model).notes[0]


def test_norms_that_are_absorbed():
    from transformers.models import cohere, exaone4, gemma3, olmo2, olmoe, qwen3

    between = hf_rope._norms_before_rope
    for module in (
        qwen3.modeling_qwen3.Qwen3Attention,
        gemma3.modeling_gemma3.Gemma3Attention,
        olmo2.modeling_olmo2.Olmo2Attention,
    ):
        assert between(module) == ("q_norm", "k_norm")
    assert between(cohere.modeling_cohere.CohereAttention) is None, "the norms are in an if"
    assert between(exaone4.modeling_exaone4.Exaone4Attention) is None, "RoPE is in an if"
    assert between(olmoe.modeling_olmoe.OlmoeAttention) is None, "values are clamped between the norms and RoPE"
    assert between(transformers.models.llama.modeling_llama.LlamaAttention) is None

    def norms(family):
        layer = make(family).model.layers[0].self_attn
        found = hf_rope._norms(layer)
        assert found.kind is type(layer.q_norm)
        return found._replace(kind=None)

    assert norms("qwen3") == ("q_norm", "k_norm", None, "variance_epsilon", False, False)
    assert norms("gemma3_text") == ("q_norm", "k_norm", None, "eps", True, False)
    assert norms("olmo2") == ("q_norm", "k_norm", None, "variance_epsilon", False, True)


def test_norms_that_are_not_rms_are_left():
    model, texts = make("qwen3"), documents()
    layers = [layer.self_attn for layer in model.model.layers]
    layers[0].q_norm = nn.LayerNorm(8)
    stock = run(model, packed(texts))
    packops.hf.apply(model)
    assert "(1 of them)" in packops.hf.report(model).replaced["rope"]
    assert difference(run(model, packed(texts)), stock) < 1e-5
    layers[1].k_norm.variance_epsilon = 0.5  # the kernel has one epsilon for both
    ours = run(model, packed(texts))
    packops.hf.revert(model)
    assert difference(ours, run(model, packed(texts))) < 1e-5
    packops.hf.apply(model)
    assert "packops.apply_rope" in packops.hf.report(model).replaced["rope"]
    assert difference(run(model, packed(texts)), ours) < 1e-5


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
@pytest.mark.parametrize("first", ["hook", "apply"])
def test_norms_with_hooks_are_called(family, first):
    """DeepSpeed gathers sharded weights in hooks, tensor parallelism reduces gradients in them."""
    model, texts = make(family), documents()
    if first == "apply":
        packops.hf.apply(model)
    model.model.layers[0].self_attn.k_norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.1,))
    ours = run(model, packed(texts))
    packops.hf.revert(model)
    stock = run(model, packed(texts))
    if first == "hook":
        ours = run(packops.hf.apply(model), packed(texts))
    assert 0 < difference(ours, stock) < 1e-5


def test_rewrite_refuses():
    class Closure(nn.Module):
        def forward(self):
            return super().forward()

    with pytest.raises(rewrite.CannotRewriteError, match="closure over __class__"):
        rewrite.build(Closure.forward, rewrite.parse(Closure.forward), {})
    with pytest.raises(rewrite.CannotRewriteError, match="not a Python function"):
        rewrite.parse(len)
    scope = {}
    exec("def forward(self): return 1", scope)
    with pytest.raises(rewrite.CannotRewriteError, match="source of forward is not installed"):
        rewrite.parse(scope["forward"])


def test_attention():
    """Any of transformers' implementations by name."""
    model, texts = make("llama"), documents()
    stock = run(model, packed(texts))
    packops.hf.apply(model, attention="eager")
    assert model.config._attn_implementation == "eager"
    assert packops.hf.report(model).replaced["attention"] == "eager"
    assert difference(run(model, packed(texts)), stock) < 1e-5
    packops.hf.revert(model)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError):
        packops.hf.apply(model, attention="no_such_attention")
    assert packops.hf.report(model).replaced == {}
    assert model.config._attn_implementation == "sdpa"
    assert "forward" not in vars(model)


def test_bad_arguments():
    with pytest.raises(
        ValueError, match="reduction must be one of 'mean', 'seq-mean-token-mean', 'seq-mean-token-sum', got 'sum'"
    ):
        packops.hf.apply(make("llama"), reduction="sum")
    with pytest.raises(ValueError, match="needs labels or shift_labels"):
        packops.hf.CausalLMLoss()(torch.zeros(1, 2, 3), None)


# ---- versions ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def version(monkeypatch):
    def pretend(value):
        monkeypatch.setattr(families.importlib.metadata, "version", lambda name: value)
        families.require_transformers.cache_clear()

    yield pretend
    families.require_transformers.cache_clear()


def test_versions_of_transformers(version, monkeypatch):
    model = make("llama")
    version("4.57.1")
    with pytest.raises(ImportError, match=r"transformers 5\.20 to 5\.23, found 4\.57\.1: pip install 'packops\[hf\]'"):
        packops.hf.apply(model)
    version("6.0.0.dev0")
    with pytest.raises(ImportError, match=r"found 6\.0\.0"):
        packops.hf.apply(model)
    version("5.99.0")
    with pytest.warns(UserWarning, match=r"tested with transformers 5\.20 to 5\.23, found 5\.99\.0") as caught:
        packops.hf.apply(model)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packops.hf.apply(model)  # once is enough
    monkeypatch.setattr(families.importlib.util, "find_spec", lambda name: None)
    families.require_transformers.cache_clear()
    with pytest.raises(ImportError, match=r"not installed: pip install 'packops\[hf\]'"):
        packops.hf.report(model)


def test_import_is_light():
    """No transformers, and not a word."""
    code = "import sys, packops.hf; assert 'transformers' not in sys.modules; import packops; packops.hf.apply"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_apply_is_silent(capfd):
    model = packops.hf.apply(make("llama"))
    run(model, packed(documents()))
    packops.hf.revert(model)
    assert capfd.readouterr() == ("", "")


# ---- on a GPU ---------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_equals_stock_on_a_gpu(family):
    device = torch.device("cuda")
    model, texts = make(family).to(device), documents((130, 50, 1, 220, 80))
    inputs = PackingCollator()(texts).to(device).to_hf()
    stock = run(model, inputs)
    packops.hf.apply(model)
    assert difference(run(model, inputs), stock) < 1e-4


@pytest.mark.gpu
def test_no_host_sync_on_a_gpu():
    device = torch.device("cuda")
    model = packops.hf.apply(make("qwen3", dtype=torch.bfloat16).to(device), reduction="seq-mean-token-mean")
    inputs = PackingCollator()(documents()).to(device).to_hf()
    inputs["cu_seq_lens_q"] = inputs["cu_seq_lens_k"] = None  # documents found by position_ids
    position_ids, labels = inputs["position_ids"], inputs["labels"]
    run(model, inputs)
    rotary, loss = model.model.rotary_emb, model.loss_function
    logits = torch.randn(*labels.shape, VOCABULARY, device=device, requires_grad=True)
    with no_host_sync():
        rotary(logits, position_ids)
        loss(
            logits, labels, position_ids=position_ids, num_items_in_batch=torch.ones((), dtype=torch.float64, device=device)
        ).backward()


def test_record_says_what_it_cannot_undo():
    """A record is of one model; undoing it twice is nothing."""
    model = packops.hf.apply(make("llama"))
    kept = vars(model)[record.ATTRIBUTE]
    packops.hf.revert(model)
    kept.undo()
    assert "forward" not in vars(model)
