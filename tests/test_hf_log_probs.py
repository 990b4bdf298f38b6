"""packops.hf.log_probs: every document as the model alone would score it, without logits."""

import dataclasses
from pathlib import Path

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


def test_labels_that_weigh_nothing_in_a_loss_have_one():
    documents = [torch.randint(0, 99, (n,)) for n in (5, 9)]
    batch = batch_of(documents)
    model = hf.apply(llama())
    want = hf.log_probs(model, batch).log_probs
    weight = torch.arange(14.0).remainder(3)[None]
    assert torch.equal(hf.log_probs(model, dataclasses.replace(batch, columns={"token_weight": weight})).log_probs, want)


def test_what_is_refused():
    batch = batch_of([torch.randint(0, 99, (6,))])
    model = llama()
    with pytest.raises(ValueError, match=r"call packops\.hf\.apply on this LlamaForCausalLM first"):
        hf.log_probs(model, batch)
    hf.apply(model)
    with pytest.raises(ValueError, match="batch must have labels"):
        hf.log_probs(model, {"input_ids": batch.input_ids})
    with pytest.raises(TypeError, match="batch must be a PackedBatch or a mapping, got a list"):
        hf.log_probs(model, [[1, 2, 3]])
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        hf.log_probs(model, batch, temperature=0.0)
    assert hf.log_probs(model, batch, entropy=False).entropy is None
    loss_function = model.loss_function
    with pytest.raises(TypeError):
        hf.log_probs(model, batch, nonsense=object(), input_ids=3)
    assert model.loss_function is loss_function  # put back when the forward fails


def test_num_valid_arrives():
    """It spares the rows that are not scored their part of the product; fewer than there are is an error."""
    batch = batch_of([torch.randint(0, 99, (6,))])
    with pytest.raises(ValueError, match="num_valid"):
        hf.log_probs(hf.apply(llama()), batch, num_valid=batch.num_valid - 1)


def recipe():
    """The class that docs/hugging_face.md puts in the place of TRL's function."""
    text = (Path(__file__).resolve().parents[1] / "docs" / "hugging_face.md").read_text()
    block = text.split("class LogProbs:")[1].split("\n\n\n")[0]
    scope = {"packops": packops, "torch": torch}
    exec("class LogProbs:" + block, scope)
    return scope["LogProbs"]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}], ids=str)
def test_recipe_for_trl(monkeypatch, options):
    """What TRL's trainers ask its head for is the same from TRL's function and from the recipe, gradients too."""
    utils = pytest.importorskip("trl.trainer.utils")
    asked = ("log_probs", "entropy", "mean_logits", "is_top1")
    ids = torch.randint(0, 99, (3, 17))
    labels = ids.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        labels[:, 8] = llama()(input_ids=ids).logits[:, 7].argmax(-1)
    found = []
    for replaced in (False, True):
        model = llama()
        utils.add_fused_lm_head(model, outputs=asked, **options)
        if replaced:
            monkeypatch.setattr(utils, "_ChunkedLogProbFunction", recipe())
        made = model(input_ids=ids, labels=labels, fused_lm_head=True)
        made.is_top1[0, 5]  # a tensor, as the trainers want it
        (made.log_probs.sum() + 0.3 * made.entropy.sum() + made.loss).backward()
        found.append([getattr(made, name).detach().float() for name in (*asked, "loss")] + [p.grad for p in model.parameters()])
    assert found[0][3].sum() > 0  # some labels are the most likely
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "arguments", [(0.7, 64, 5.0, 1.0, ()), (1.0, 64, None, 1.0, ("log_sum_sq_probs",)), (1.0, 64, 5.0, 1.0, ("mean_logits",))]
)
def test_recipe_for_trl_refuses_what_it_cannot(arguments):
    hidden, weight, labels = torch.randn(4, 8), torch.randn(11, 8), torch.arange(4)
    with pytest.raises(NotImplementedError):
        recipe().apply(hidden, weight, None, labels, *arguments)


class Wrapper(torch.nn.Module):
    """As PEFT's: it hands on what it does not know, and keeps what is set on it."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


def test_of_a_wrapped_model():
    batch = batch_of([torch.randint(0, 99, (n,)) for n in (5, 1, 9)])
    model = hf.apply(llama(), attention="packops_varlen")
    want = hf.log_probs(model, batch)
    wrapped = Wrapper(model)
    found = hf.log_probs(wrapped, batch)
    assert torch.equal(found.log_probs, want.log_probs)
    assert "_loss_function" not in vars(wrapped)
    assert wrapped(**batch.to_hf()).loss.dim() == 0  # its loss is back


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_wrapper_that_rounds_log_probabilities_is_refused(dtype):
    """FSDP2 does, with MixedPrecisionPolicy(output_dtype=torch.bfloat16), which is accelerate's."""

    class Rounds(Wrapper):
        def forward(self, *args, **kwargs):
            return torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(dtype), super().forward(*args, **kwargs))

    batch = batch_of([torch.randint(0, 99, (n,)) for n in (5, 1, 9)])
    with pytest.raises(ValueError, match=rf"log_probs: .* rounded them to {dtype}: .*output_dtype=None"):
        hf.log_probs(Rounds(hf.apply(llama(), attention="packops_varlen")), batch)
