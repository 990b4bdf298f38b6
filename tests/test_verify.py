"""verify says yes to what is right and catches, and names, each known way to be wrong."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import packops
import packops.hf
from packops import PackingCollator, verify
from packops.verify import hf_forward

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 61
LENGTHS = (13, 5, 1, 22, 8, 17)


@pytest.fixture
def documents():
    generator = torch.Generator().manual_seed(0)
    documents = [{"input_ids": torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()} for n in LENGTHS]
    documents[3]["completion_mask"] = [0] * 15 + [1] * 7
    return documents


def llama(attention="sdpa", dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,  # heads of 16: FlexAttention on a GPU wants no less
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention, dtype=dtype)


# ---- right -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llama_packed_equals_one_by_one(documents, attention, device):
    model = llama(attention).to(device)
    report = verify(model, documents)
    assert report.ok, report
    assert report.findings == []
    assert report.loss_difference < 1e-6
    assert len(report.gradient_differences) == len(list(model.parameters()))
    assert report.worst_gradient[1] < 1e-5
    assert report.worst_leak == 0
    assert (report.leaks.diagonal() > 1e-3).all(), "changing a document must change itself"
    assert report.packs == [[0, 1, 2], [3, 4], [5]]
    assert "packed EQUALS one by one: 6 documents in 3 packs" in str(report)
    json.dumps(report.to_dict())


def test_flex_attention(documents, device):
    """FlexAttention has no backward on the CPU, so gradients are compared on a GPU only."""
    stance = "default" if device.type == "cuda" else "force_eager"  # transformers compiles it, which takes a minute on the CPU
    with torch.compiler.set_stance(stance):
        report = verify(llama("flex_attention").to(device), documents, gradients=device.type == "cuda")
    assert report.ok, report
    assert report.worst_leak == 0


def test_flex_attention_with_our_block_mask(documents):
    """PackedBatch.block_mask() is the mask that transformers would make."""

    def forward(model, batch):
        return model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.block_mask()).logits

    with torch.compiler.set_stance("force_eager"):
        report = verify(llama("flex_attention"), documents, forward=forward, gradients=False)
    assert report.ok, report


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(documents, dtype):
    report = verify(llama(dtype=dtype), documents)
    assert report.ok, report
    assert report.worst_gradient[1] > 0, (
        "packing changes the order of additions, so an exact zero would mean nothing was compared"
    )
    assert report.tolerance == {torch.float64: 1e-6, torch.bfloat16: 4e-2}[dtype]


@pytest.mark.parametrize("reduction", ["mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_packops_losses_are_what_they_say(documents, reduction):
    report = verify(llama(), documents, forward=hf_forward, reduction=reduction)
    assert report.ok, report


@pytest.mark.parametrize("forward", [hf_forward, None])
def test_weights_of_tokens_are_those_of_the_truth(documents, forward):
    """Of which a whole step has less than one, so that nothing may be divided by 1 instead."""
    for document in documents:
        document["token_weight"] = [0.01 * (place % 3) for place in range(len(document["input_ids"]))]
    model, collator = packops.hf.apply(llama()), PackingCollator(columns={"token_weight": 0.0})
    for reduction in ("mean", "seq-mean-token-sum"):
        packops.hf.apply(model, reduction=reduction)
        report = verify(model, documents, forward=forward, collator=collator, reduction=reduction)
        assert report.ok, report

    def means(model, batch, num_items):
        return model(**batch.to_hf()).loss / 3

    packops.hf.apply(model)
    report = verify(model, documents, loss=means, collator=collator)
    assert report.findings[0].startswith("each micro-batch is divided by its own count")


def test_padding_does_not_matter(documents):
    collator = PackingCollator(pad_to_multiple_of=16, pad_doc_to_multiple_of=4)
    report = verify(llama(), documents, collator=collator)
    assert report.ok, report


def test_padded_equals_packed_for_every_gradient(documents):
    """The batch that packing replaces, right-padded with an attention mask, through transformers' own loss."""
    model = llama()
    longest = max(LENGTHS)
    rows = [d["input_ids"] + [0] * (longest - len(d["input_ids"])) for d in documents]
    masked = [d["input_ids"] if "completion_mask" not in d else [-100] * 15 + d["input_ids"][15:] for d in documents]
    labels = torch.tensor([ids + [-100] * (longest - len(ids)) for ids in masked])
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in LENGTHS])
    padded = model(input_ids=torch.tensor(rows), attention_mask=mask, labels=labels).loss
    padded.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    packed = model(**PackingCollator(names="hf")(documents)).loss
    packed.backward()
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    # and with the loss of packops on the same logits
    model.zero_grad()
    batch = PackingCollator()(documents)
    loss = packops.cross_entropy(hf_forward(model, batch), batch.labels, cu_seqlens=batch.cu_seqlens, shift=True)
    loss.backward()
    torch.testing.assert_close(loss, padded, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_model_gets_everything_back(documents):
    model = llama().train()
    model.model.layers[0].eval()
    before = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = before
    verify(model, documents)
    assert model.training
    assert not model.model.layers[0].training
    assert model.lm_head.weight.grad is before
    assert (before == 1).all()
    assert model.model.norm.weight.grad is None


# ---- wrong: the negative controls ------------------------------------------------------------------------------------------


def finding(report):
    assert not report.ok, report
    assert "DOES NOT EQUAL" in str(report)
    assert len(report.findings) == 1, report
    return report.findings[0]


def with_cache(model, batch):
    return model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits


def test_catches_the_cache_of_transformers(documents):
    """use_cache=True is transformers' default, and with it sdpa and eager models do not see that a row is packed."""
    report = verify(llama(), documents, forward=with_cache)
    assert "documents see each other" in finding(report)
    assert report.leaks[0, 1] > 1e-4
    assert report.leaks[1, 0] == 0, "causal attention leaks forward only"
    assert report.leaks[0, 3].isnan(), "of another pack"
    assert "0 \\##" in str(report)


def test_catches_a_mask_of_ones(documents):
    def forward(model, batch):
        inputs = batch.to_hf() | {"attention_mask": torch.ones_like(batch.input_ids)}
        for name in ("labels", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            del inputs[name]
        return model(**inputs).logits

    assert "documents see each other" in finding(verify(llama(), documents, forward=forward))


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=128, n_embd=32, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config)


def test_catches_positions_that_do_not_restart(documents):
    """A learned table of positions, attention blocked correctly: only the positions are wrong."""

    def forward(model, batch, **positions):
        mask = batch.attention_mask("4d", dtype=torch.float32)
        return model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False, **positions).logits

    report = verify(gpt2(), documents, forward=forward)
    assert "positions do not restart" in finding(report)
    assert report.worst_leak == 0
    assert (report.logit_differences[[0, 3, 5]] < 1e-5).all(), "the first document of a pack is right"
    right = verify(gpt2(), documents, forward=lambda model, b: forward(model, b, position_ids=b.position_ids))
    assert right.ok, right


def test_catches_boundary_labels(documents):
    for d in documents:
        d.pop("completion_mask", None)

    def loss(model, batch, num_items):
        return model(**(batch.to_hf() | {"labels": batch.input_ids}), num_items_in_batch=num_items).loss

    report = verify(llama(), documents, loss=loss)
    assert "first of the next: mask the boundary labels" in finding(report)
    # padding that is scored as well is still the same mistake in the documents
    assert report.worst_leak == 0


def test_catches_means_of_micro_batches(documents):
    for scale in (1, 1 / 3):  # added, or averaged over the three micro-batches
        report = verify(llama(), documents, loss=lambda model, b, n, scale=scale: model(**b.to_hf()).loss * scale)
        assert "each micro-batch is divided by its own count" in finding(report)


def test_catches_the_mean_that_was_not_meant(documents):
    report = verify(llama(), documents, reduction="seq-mean-token-mean")
    assert "weighs every token alike, which is not 'seq-mean-token-mean': a Hugging Face model" in finding(report)


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


def packed_only(change):
    """A loss that is right, during which ``change`` is at work."""

    def loss(model, batch, num_items):
        handle = change()
        logits = hf_forward(model, batch)
        value = packops.cross_entropy(logits, batch.labels, cu_seqlens=batch.cu_seqlens, shift=True, num_items=num_items)
        value.backward()
        handle.remove()
        return value.detach()

    return loss


def test_catches_a_wrong_backward(documents):
    """Loss and logits are right, all gradients are off by a percent. The truth is computed without the patched loss."""

    def loss(model, batch, num_items):
        logits = WrongBackward.apply(hf_forward(model, batch))
        return packops.cross_entropy(logits, batch.labels, cu_seqlens=batch.cu_seqlens, shift=True, num_items=num_items)

    assert "the loss is right but the gradient of" in finding(verify(llama(), documents, loss=loss))


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"],
)
def test_catches_one_wrong_gradient(documents, name):
    """One parameter's, by a percent, and it is named."""
    model = llama()
    parameter = model.get_parameter(name)
    report = verify(model, documents, loss=packed_only(lambda: parameter.register_hook(lambda grad: grad * 1.01)))
    assert f"the gradient of {name} is not" in finding(report)
    assert report.worst_gradient[1] == pytest.approx(0.01, rel=0.01)
    others = [value for other, value in report.gradient_differences.items() if other != name]
    assert max(others) < 1e-5


def test_catches_a_small_gradient_that_is_wrong(documents):
    """One whose elements are hundreds of times smaller than others' counts by its own size."""
    model, name = llama(), "model.layers.1.self_attn.q_proj.weight"
    parameter, sizes = model.get_parameter(name), largest_gradients(model, documents)
    assert 1.5e-3 < sizes[name] / max(sizes.values()) < 8e-3
    report = verify(model, documents, loss=packed_only(lambda: parameter.register_hook(lambda grad: grad * 1.01)))
    assert f"the gradient of {name} is not" in finding(report)
    assert report.worst_gradient[1] == pytest.approx(0.01, rel=0.01)


def largest_gradients(model, documents):
    batch = PackingCollator()(documents)
    model.zero_grad()
    packops.cross_entropy(hf_forward(model, batch), batch.labels, cu_seqlens=batch.cu_seqlens, shift=True).backward()
    return {name: float(parameter.grad.abs().max()) for name, parameter in model.named_parameters()}


def test_gradients_that_are_nothing_but_rounding_do_not_matter(documents):
    """What is added to all logits alike changes no loss: its gradient is 0, but for what rounding makes of it."""
    model = llama()
    model.shift = nn.Parameter(torch.ones(1))
    report = verify(model, documents, forward=lambda model, batch: hf_forward(model, batch) + 0.01 * model.shift)
    assert report.ok, report
    assert report.gradient_differences["shift"] > 0, "rounding made nothing of it, so nothing was shown"


def moe(**options):
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, initializer_range=0.12, **options,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_add_in_another_order_do_not_leak(dtype):
    """Which tokens an expert computes together depends on the other documents, and so does the order of additions."""
    generator, leaks = torch.Generator().manual_seed(0), []
    documents = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in (40, 61, 13, 30)]
    for seed in range(6):
        torch.manual_seed(seed)
        model = moe().to(dtype)
        report = verify(model, documents, gradients=False)
        assert not any("see each other" in finding for finding in report.findings), report
        leaks.append(report.worst_leak)

        report = verify(model, documents, forward=with_cache, gradients=False)
        assert any("see each other" in finding for finding in report.findings), report
    if dtype == torch.float32:
        assert max(leaks) > 0, "nothing is shown by models that add in one order"
        assert report.leak_tolerance < 1e-5


def test_the_balancing_loss_of_experts_is_left_out():
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in (40, 61, 13, 30)]
    torch.manual_seed(0)
    report = verify(moe(output_router_logits=True, router_aux_loss_coef=0.5), documents)
    assert report.ok, report


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_other_heads_are_refused(documents, head):
    model = getattr(transformers, f"LlamaFor{head}")(llama().config)
    with pytest.raises(ValueError, match=f"LlamaFor{head} is no causal language model"):
        verify(model, documents)


def test_models_that_are_no_causal_language_models_are_refused(documents):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    for model in (
        transformers.BertForMaskedLM(transformers.BertConfig(**sizes)),
        transformers.LlamaModel(transformers.LlamaConfig(**sizes)),
        transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCABULARY, d_model=32, num_layers=1, d_ff=32)),
    ):
        with pytest.raises(ValueError, match="is no causal language model"):
            verify(model, documents)


def test_a_forward_that_gives_something_else_is_refused(documents):
    model = llama()
    for forward, message in (
        (lambda model, batch: model(batch.input_ids), "got CausalLMOutputWithPast"),
        (lambda model, batch: hf_forward(model, batch)[0], r"\(1, 13, V\), got shape \(13, 61\)"),
        (lambda model, batch: hf_forward(model, batch)[..., :7], "is not one of their 7 columns"),
    ):
        with pytest.raises(ValueError, match=message):
            verify(model, documents, forward=forward)


def test_catches_values_that_are_no_numbers(documents):
    def forward(model, batch):
        logits = hf_forward(model, batch)
        return logits * torch.where(batch.seq_idx == 1, torch.nan, 1.0)[..., None]

    report = verify(llama(), documents, forward=forward)
    assert not report.ok
    assert report.logit_differences[1] == torch.inf


def test_a_recurrent_layer_leaks(documents):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.cell, self.head = (
                nn.Embedding(VOCABULARY, 8),
                nn.GRU(8, 8, batch_first=True),
                nn.Linear(8, VOCABULARY),
            )

        def forward(self, ids):
            return self.head(self.cell(self.embed(ids))[0])

    torch.manual_seed(0)
    report = verify(Recurrent(), documents, forward=lambda model, batch: model(batch.input_ids))
    assert "documents see each other" in finding(report)


def test_bad_arguments(documents):
    with pytest.raises(ValueError, match="Linear is no Hugging Face model"):
        verify(nn.Linear(2, 2), documents)
    with pytest.raises(ValueError, match="at least two that have a token, got 1"):
        verify(llama(), [[1, 2], []])
    with pytest.raises(ValueError, match="max_length = 22 leaves every document in a pack of its own"):
        verify(llama(), [[1] * 22] * 3, max_length=22)
    with pytest.raises(ValueError, match=r"max_length must be at least the longest document \(22 tokens\), got 21"):
        verify(llama(), [[1], [1] * 22], max_length=21)
    with pytest.raises(ValueError, match="at least two different tokens"):
        verify(llama(), [[0] * 5] * 3)
    with pytest.raises(ValueError, match=r"reduction must be one of 'mean', .* got 'sum'"):
        verify(llama(), documents, reduction="sum")


@pytest.mark.parametrize(
    "collator, error, message",
    [
        (packops.PackingCollator(names="hf"), TypeError, r"collator must return a packops.PackedBatch, got a dict"),
        (
            packops.PackingCollator(share_prefixes=True, min_shared=1),
            ValueError,
            "collator shares prefixes: that needs share_prefixes=True",
        ),
    ],
)
def test_collators_that_verify_cannot_take(collator, error, message):
    documents = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7]]
    with pytest.raises(error, match=message):
        packops.verify(torch.nn.Linear(1, 1), documents, collator=collator, forward=lambda *given: None)


class Plain(torch.nn.Module):
    """Each token by itself, so that packing changes nothing; ``masked`` columns are -inf."""

    def __init__(self, masked: bool = False, leaks: float = 0):
        super().__init__()
        self.embedding, self.masked, self.leaks = torch.nn.Embedding(20, 16), masked, leaks
        self.head = torch.nn.Linear(16, 20, bias=False)

    def forward(self, ids):
        hidden = self.embedding(ids)
        if self.leaks:
            hidden = hidden + self.leaks * hidden.cumsum(1)
        logits = self.head(hidden).float()
        return logits.index_fill(-1, torch.tensor([18, 19]), -torch.inf) if self.masked else logits


def of_ids(model, batch):
    return model(batch.input_ids)


TEXTS = [[5, 6, 7, 8], [9, 6, 4], [7, 5, 3, 2, 1], [11, 12]]


def test_autocast_is_as_coarse_as_it_is():
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = packops.verify(Plain(), TEXTS, forward=of_ids)
    assert report.ok, report
    assert report.tolerance == 4e-2


def test_masked_columns_are_the_same_packed():
    torch.manual_seed(0)
    assert packops.verify(Plain(masked=True), TEXTS, forward=of_ids).ok
    leaky = packops.verify(Plain(masked=True, leaks=0.1), TEXTS, forward=of_ids)
    assert not leaky.ok
    assert "documents see each other" in leaky.findings[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_leak_of_one_rounding_is_seen_in_16_bits(dtype):
    torch.manual_seed(0)
    model = Plain(leaks=0.001).to(dtype)
    report = packops.verify(model, TEXTS, forward=of_ids)
    assert "documents see each other" in finding(report)
    assert report.noise == 0
    assert report.worst_leak < 2 * torch.finfo(dtype).eps
    assert report.leak_tolerance < 1e-6


@pytest.mark.parametrize("name", ["expert", "A_log"])
def test_layers_that_add_up_tokens_are_allowed_roundings(name):
    torch.manual_seed(0)
    model = Plain(leaks=0.001)
    model.register_parameter(name, torch.nn.Parameter(torch.zeros(1)))
    report = packops.verify(model.to(torch.bfloat16), TEXTS, forward=of_ids)
    assert report.ok, report
    assert 0 < report.worst_leak < report.leak_tolerance == 2 * report.rounding


def test_16_bits_say_what_they_cannot_show():
    torch.manual_seed(0)
    for dtype, says in ((torch.bfloat16, True), (torch.float32, False)):
        report = packops.verify(Plain().to(dtype), TEXTS, forward=of_ids)
        assert report.ok, report
        assert report.rounding == torch.finfo(dtype).eps
        assert ("leaks below 8e-03 of a value may be rounded away: fp32 shows them (--dtype fp32)" in str(report)) == says


def test_where_nothing_would_be_verified():
    model = Plain()
    for documents, options, message in (
        ([[1], [2], [3]], {}, "no token of these documents is scored"),
        (TEXTS, {"max_length": 0}, "max_length must be"),
        (TEXTS, {"tolerance": math.inf}, "tolerance must be positive and finite, got inf"),
        (TEXTS, {"tolerance": math.nan}, "tolerance must be positive and finite, got nan"),
        (TEXTS, {"collator": lambda documents: packops.PackingCollator()(documents[:1])}, "collator must keep all documents"),
    ):
        with pytest.raises(ValueError, match=message):
            packops.verify(model, documents, forward=of_ids, **options)
    with pytest.raises(ValueError, match="model must have parameters"):
        packops.verify(torch.nn.Identity(), TEXTS, forward=lambda model, batch: torch.zeros(1, batch.num_tokens, 20))
