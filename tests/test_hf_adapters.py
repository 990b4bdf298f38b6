"""Adapters on a patched model, as PEFT makes them: those of a weight are as right packed as alone, those of a row are refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import packops
import packops.hf
from packops.hf import attention_documents, calls
from packops.hf.adapters import reason_against_packing

transformers = pytest.importorskip("transformers")

from hf_models import difference, documents, make, packed, padded  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Adapter(nn.Module):
    """What PEFT's layers say of themselves."""

    def __init__(self):
        super().__init__()
        self.active_adapters, self.disable_adapters = ["default"], False


CONFIGS = {
    "alora": SimpleNamespace(peft_type="LORA", alora_invocation_tokens=[7]),
    "lily": SimpleNamespace(peft_type="LILY"),
    "lora": SimpleNamespace(peft_type="LORA", alora_invocation_tokens=None),
}


@pytest.mark.parametrize("attention", [None, "packops_varlen"])
@pytest.mark.parametrize(("kind", "message"), [("alora", "last place of a row"), ("lily", "mean over all tokens of the batch")])
def test_adapters_of_a_whole_row_are_refused(kind, message, attention):
    model = packops.hf.apply(make("llama"), attention=attention).train()
    model.peft_config, model.adapter = {"other": CONFIGS["lora"], "default": CONFIGS[kind]}, Adapter()
    texts = documents()
    inputs = packed(texts)
    by_positions = {name: inputs[name] for name in ("input_ids", "labels", "position_ids")} | {"use_cache": False}
    for packed_inputs in (inputs, by_positions):
        with pytest.raises(ValueError, match=f"would change each other by PEFT's adapter 'default': .*{message}"):
            model(**packed_inputs)
    model(**padded(texts))
    model(**packed(texts[:1]))
    model.adapter.disable_adapters = True
    model(**inputs)
    model.adapter.disable_adapters, model.adapter.active_adapters = False, ["other"]
    model(**inputs)
    model.peft_config = None
    assert reason_against_packing(model) is None


def test_positions_that_are_not_read_may_tell_of_packed_rows(monkeypatch):
    """As on a GPU, where to look at them is to wait."""
    for module in (calls, attention_documents):
        monkeypatch.setattr(module, "may_read", lambda positions: False)
    ids = torch.tensor([documents()[0]])
    rows = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(ids.numel())[None], "use_cache": False}
    model = packops.hf.apply(make("llama")).train()
    cache = model(torch.ones_like(ids), use_cache=True).past_key_values
    behind = rows | {"past_key_values": cache, "use_cache": None, "position_ids": rows["position_ids"] + ids.numel()}
    model(**rows)
    with pytest.raises(ValueError, match=r"with a cache\. .*prompt learning"):
        model(**behind)
    model.eval()(**behind)
    model.train().peft_config, model.adapter = {"default": CONFIGS["alora"]}, Adapter()
    with pytest.raises(ValueError, match=r"by PEFT's adapter 'default'.*without position_ids or with an attention_mask"):
        model(**rows)
    model(**rows | {"attention_mask": torch.ones_like(ids)})
    model(**rows | {"position_ids": None})
    model.eval()(**rows)


def lora(**options):
    return lambda peft: peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": PROJECTIONS, **options})


KINDS = {
    "lora": lora(),
    "lm_head": lora(target_modules=["lm_head", "down_proj"]),
    "embeddings": lora(target_modules=["embed_tokens", "q_proj"]),
    "dora": lora(use_dora=True),
    "saved head": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "saved norms": lora(modules_to_save=["norm", "input_layernorm", "q_norm"]),
    "saved layers": lora(modules_to_save=["self_attn", "mlp"], target_modules=["lm_head"]),
    "tokens": lora(trainable_token_indices=[3, 5]),
    "ia3": lambda peft: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}


def wrap(kind, apply, **options):
    """A model with an adapter that is not 0."""
    peft = pytest.importorskip("peft", reason="needs peft")
    model = make("qwen3")
    if apply == "before":
        packops.hf.apply(model, **options)
    torch.manual_seed(3)
    model = peft.get_peft_model(model, KINDS[kind](peft))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return packops.hf.apply(model, **options) if apply == "after" else model


def one_by_one(model, texts, count):
    """(loss, gradients by name) of documents that were never in a row together."""
    model.train()
    losses = [model(**packed([text]), num_items_in_batch=count).loss for text in texts if len(text) > 1]
    sum(losses).backward()
    return sum(losses).detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def together(model, texts, count):
    model.train()
    model.zero_grad(set_to_none=True)
    loss = model(**packed(texts), num_items_in_batch=count).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("options", [{}, {"attention": "packops_varlen"}], ids=["sdpa", "varlen"])
@pytest.mark.parametrize("apply", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft(kind, apply, options):
    """The same loss and gradients as without packops and without packing; after a merge, too."""
    texts = documents()
    count = sum(len(text) - 1 for text in texts)
    stock, model = wrap(kind, None), wrap(kind, apply, **options)
    assert difference(together(model, texts, count), one_by_one(stock, texts, count)) < 2e-5
    assert difference(together(copy.deepcopy(model), texts, count), one_by_one(wrap(kind, None), texts, count)) < 2e-5
    merged = [m.merge_and_unload().requires_grad_(True) for m in (stock, model)]
    merged[0].zero_grad(set_to_none=True)
    assert difference(together(merged[1], texts, count), one_by_one(merged[0], texts, count)) < 2e-5


@pytest.mark.parametrize("kind", ["lora", "lm_head", "saved head"])
def test_report_of_a_head_with_an_adapter(kind):
    """It does not say that logits are skipped where they are made."""
    model = wrap(kind, "after").train()
    notes = [note for note in packops.hf.report(model).notes if "logits are made all the same while lm_head (" in note]
    assert len(notes) == (kind != "lora")
    assert (model(**packed(documents())).logits is None) == (kind == "lora")


@pytest.mark.parametrize("kind", ["alora", "lily"])
def test_adapters_of_a_whole_row_of_peft_are_refused(kind):
    peft = pytest.importorskip("peft", reason="needs peft")
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
    if kind == "lily" and not hasattr(peft, "LilyConfig"):
        pytest.skip("this peft has no Lily")
    config = peft.LilyConfig(**options) if kind == "lily" else peft.LoraConfig(alora_invocation_tokens=[7], **options)
    model = peft.get_peft_model(packops.hf.apply(make("llama")), config).train()
    with pytest.raises(ValueError, match="would change each other by PEFT's adapter 'default'"):
        model(**packed(documents()))
    model(**padded(documents()))
    with model.disable_adapter():
        model(**packed(documents()))


@pytest.mark.parametrize("apply", ["before", "after"])
def test_adaption_prompts(apply):
    """They turn queries once more, by the model's tables."""
    peft = pytest.importorskip("peft", reason="needs peft")
    texts, models = documents(), []
    for when in (None, apply):
        model = make("llama")
        if when == "before":
            packops.hf.apply(model)
        torch.manual_seed(3)
        model = peft.get_peft_model(model, peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "adaption_gate" in name:
                    parameter.fill_(0.7)
        models.append(model)
    if apply == "before":
        with pytest.raises(ValueError, match=r"was replaced after .*, by a AdaptedAttention that reads"):
            models[1](**packed(texts))
    packops.hf.apply(models[1])
    count = sum(len(text) - 1 for text in texts)
    assert difference(together(models[1], texts, count), one_by_one(models[0], texts, count)) < 2e-5
