"""packops.hf.log_probs: every document as the model alone would score it, without logits."""

import pytest
import torch

import packops
from packops import hf

transformers = pytest.importorskip("transformers")


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=0,
        **options,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def batch_of(documents):
    bounds = torch.tensor([0, *(len(d) for d in documents)]).cumsum(0).tolist()
    labels = torch.cat(documents)
    labels[2] = -100
    return packops.PackedBatch.build(torch.cat(documents), labels, bounds)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("training", [False, True])
def test_each_document_as_alone(temperature, training):
    documents = [torch.randint(0, 99, (n,)) for n in (5, 1, 9)]
    batch = batch_of(documents)
    model = hf.apply(llama(), attention="packops_varlen").train(training)
    loss_function = model.loss_function
    found = hf.log_probs(model, batch, temperature=temperature)
    assert model.loss_function is loss_function
    assert found.log_probs.shape == batch.labels.shape
    expected = []
    for ids, labels in zip(batch.unpack(batch.input_ids), batch.unpack(batch.labels), strict=True):
        log_p = (model(input_ids=ids[None]).logits[0].float() / temperature).log_softmax(-1)
        scored = torch.cat([labels[1:] != -100, torch.tensor([False])])
        taken = log_p.gather(1, ids.roll(-1)[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        expected.append(torch.where(scored, torch.stack([taken, entropy]), 0))
    log_probs, entropies = torch.cat(expected, 1)
    torch.testing.assert_close(found.log_probs[0], log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy[0], entropies, rtol=1e-5, atol=1e-5)
    weights = torch.randn(2, len(log_probs))
    ours = torch.autograd.grad((weights[0] * found.log_probs + weights[1] * found.entropy).sum(), list(model.parameters()))
    theirs = torch.autograd.grad((weights[0] * log_probs + weights[1] * entropies).sum(), list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_is_refused():
    batch = batch_of([torch.randint(0, 99, (6,))])
    model = llama()
    with pytest.raises(ValueError, match=r"call packops\.hf\.apply on this LlamaForCausalLM first"):
        hf.log_probs(model, batch)
    hf.apply(model)
    with pytest.raises(ValueError, match="batch must have labels"):
        hf.log_probs(model, {"input_ids": batch.input_ids})
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        hf.log_probs(model, batch, temperature=0.0)
    assert hf.log_probs(model, batch, entropy=False).entropy is None
    loss_function = model.loss_function
    with pytest.raises(TypeError):
        hf.log_probs(model, batch, nonsense=object(), input_ids=3)
    assert model.loss_function is loss_function  # put back when the forward fails
