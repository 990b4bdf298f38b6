"""RoPE of patched models: conventions, tables, and the norms of q and k that come with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import packops
import packops.hf
from packops.hf import families
from packops.hf import rope as hf_rope

transformers = pytest.importorskip("transformers")

from hf_models import difference, documents, make, packed, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


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
    model.bfloat16()
    for _ in range(2):  # of what happened after apply, and before it
        (note,) = packops.hf.report(model).notes
        assert "inv_freq" in note
        packops.hf.apply(model)
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
        assert found.form.kind is type(layer.q_norm)
        return found.q, found.k, *found.form[1:], found.across_heads

    assert norms("qwen3") == ("q_norm", "k_norm", "variance_epsilon", False, False)
    assert norms("gemma3_text") == ("q_norm", "k_norm", "eps", True, False)
    assert norms("olmo2") == ("q_norm", "k_norm", "variance_epsilon", False, True)


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
