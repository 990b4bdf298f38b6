"""The loss of a patched model, and its lm_head."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import packops
import packops.hf
from packops import PackingCollator
from packops.hf import loss as hf_loss
from packops.hf.attention_documents import begin_anew

transformers = pytest.importorskip("transformers")

from hf_models import LENGTHS, VOCABULARY, difference, documents, make, mean_of_documents, packed, padded, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("bounds", ["cu_seq_lens_q", "position_ids"])
@pytest.mark.parametrize("reduction", ["mean", "seq-mean-token-mean"])
def test_boundaries_of_rows_without_logits_are_refused(reduction, bounds, fused):
    """logits_to_keep leaves the last rows, and nothing says where documents begin in these."""
    model, inputs = make("llama"), packed(documents(), logits_to_keep=20, num_valid=None)
    inputs["labels"] = inputs["labels"][:, -20:]
    if bounds == "position_ids":
        inputs["cu_seq_lens_q"] = None
    want = model(**inputs).loss.item()
    packops.hf.apply(model, reduction=reduction)
    message = r"position_ids of shape \(1, \d+\) cannot say .* in the 20 rows of logits that logits_to_keep leaves: .*shift"
    with pytest.raises(ValueError, match=message):
        model(**inputs)
    if reduction == "mean":  # as the message says
        shifted = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        assert model(**{**inputs, "cu_seq_lens_q": None}, shift_labels=shifted).loss.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("num_items", [29, 29.0, torch.tensor(29), torch.tensor(29.0, dtype=torch.float64), torch.tensor([29])])
def test_num_items_in_batch(num_items, fused):
    model, texts = make("llama"), documents()
    stock = run(model, packed(texts, num_items_in_batch=29))
    packops.hf.apply(model)
    assert difference(run(model, packed(texts, num_items_in_batch=num_items)), stock) < 1e-5


@pytest.mark.parametrize("reduction", ["mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["num_items_in_batch", "token_weight"])
def test_16_bits_hold_no_count_and_no_weights(name, dtype, reduction, fused):
    """1003 tokens would be 1004, and 70000 infinitely many."""
    model, inputs = packops.hf.apply(make("llama"), reduction=reduction).train(), packed(documents())
    given = torch.tensor(1003.0) if name == "num_items_in_batch" else torch.rand(inputs["labels"].shape)
    with pytest.raises(ValueError, match=rf"{name} must be a number or .* of 32 or 64 bits, got {dtype}.*cast_forward_inputs"):
        model(**inputs, **{name: given.to(dtype)})


def counting_trainer(model):
    """What of a Trainer counts the items of a step, as transformers has it."""

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
    with pytest.raises(ValueError, match=r"reduction='mean'\)\) divides by tokens"):
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


def test_a_tuple_has_its_logits_in_their_place(fused):
    """A model output leaves out what is None, and everything after it would move up."""
    inputs = packed(documents())
    for training in (True, False):
        model = make("llama").train(training)
        stock = model(**inputs, return_dict=False)
        packops.hf.apply(model)
        ours = model(**inputs, return_dict=False)
        assert [type(x) for x in ours] == [type(x) for x in stock]
        torch.testing.assert_close(ours[1], stock[1], rtol=1e-4, atol=1e-5)
        assert (model(**inputs, return_dict=True).logits is None) == (fused and training)
        with pytest.raises(ValueError, match="skip_logits=True would leave a hole in a tuple"):
            model(**inputs, return_dict=False, skip_logits=True)


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


def test_report_says_where_a_head_makes_logits():
    model = make("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    model.set_output_embeddings(model.lm_head)
    notes = packops.hf.report(packops.hf.apply(model)).notes
    assert notes == ["logits are made all the same while lm_head (Sequential) is more than its weight"]


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
    patched = packops.hf.apply(model).train()
    for nothing in ({"logits": None}, patched(**padded(texts))):
        with pytest.raises(ValueError, match="returned no logits"):
            packops.hf.compute_loss_func(nothing, labels)


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


# ---- calls whose loss would be wrong ------------------------------------------------------------------------------------------


def test_labels_that_are_counted_and_not_scored_are_refused(fused):
    """Trainer counts every label but the first of a row; the first token of a later document is not scored."""
    model, texts = packops.hf.apply(make("llama")), documents()
    inputs = packed(texts)
    scored, labels = sum(LENGTHS) - len(LENGTHS), inputs["input_ids"].clone()
    want = run(model, packed(texts))
    assert difference(run(model, {**inputs, "labels": labels, "num_valid": None}), want) < 1e-6, "alone, the model knows better"
    assert difference(run(model, {**inputs, "num_items_in_batch": scored}), want) < 1e-6
    for count in (sum(LENGTHS) - 1, torch.tensor(float(sum(LENGTHS) - 1))):
        with pytest.raises(ValueError, match=f"{sum(LENGTHS) - 1} labels are set and {scored} of them are scored"):
            model(**{**inputs, "labels": labels, "num_items_in_batch": count})
    shifted = PackingCollator(names="hf", shift_labels=True)(texts)
    assert difference(run(model, {**shifted, "labels": labels, "num_items_in_batch": scored}), want) < 1e-6
    two_rows = {"input_ids": labels.repeat(2, 1), "labels": inputs["labels"].repeat(2, 1), "use_cache": False}
    two_rows["position_ids"] = inputs["position_ids"].repeat(2, 1)
    bounds = inputs["cu_seq_lens_q"]
    two_rows["cu_seq_lens_q"] = torch.cat((bounds, bounds[1:] + bounds[-1]))
    assert difference(run(model, {**two_rows, "num_items_in_batch": 2 * scored}), want) < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_such_a_count_is_never_divided_by(device, compiled):
    """On a GPU looking at the labels would wait, so the count becomes NaN, and the loss; compiled, the operation refuses it."""
    loss = packops.hf.CausalLMLoss()
    if compiled:
        loss = torch.compile(loss, backend="eager", fullgraph=True)
    inputs = PackingCollator()(documents()).to(device).to_hf()
    logits = torch.randn(1, sum(LENGTHS), VOCABULARY, device=device)
    options = {"cu_seq_lens_q": inputs["cu_seq_lens_q"], "num_items_in_batch": torch.tensor(44.0, device=device)}
    right = packops.hf.CausalLMLoss()(logits, inputs["labels"], cu_seq_lens_q=inputs["cu_seq_lens_q"])
    torch.testing.assert_close(loss(logits, inputs["labels"], **options), right)
    if device.type == "cuda":
        assert loss(logits, inputs["input_ids"], **options).isnan()
    else:
        with pytest.raises(ValueError, match="got nan" if compiled else "labels are set"):
            loss(logits, inputs["input_ids"], **options)
    torch.compiler.reset()


@pytest.mark.parametrize("cross_entropy", [True, False])
@pytest.mark.parametrize(
    "name, family", [("sdpa", "llama"), ("eager", "llama"), ("packops_varlen", "llama"), ("packops_varlen", "opt")]
)
def test_boundaries_say_where_positions_begin_anew(name, family, cross_entropy):
    """transformers' attention looks at positions alone, and models that learn theirs would count on through the row."""
    texts, config = documents(), {"do_layer_norm_before": True, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
    model = make("llama") if family == "llama" else opt(**config)
    want = mean_of_documents(model, texts, "mean")
    packops.hf.apply(model, attention=name, rope=family == "llama", cross_entropy=cross_entropy)
    for positions in (packed(texts)["position_ids"], None):
        loss = model(**{**packed(texts), "position_ids": positions}).loss
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    counted = torch.arange(sum(LENGTHS))[None]
    model(
        input_ids=packed(texts)["input_ids"], position_ids=counted, cu_seq_lens_q=torch.tensor([0, sum(LENGTHS)])
    )  # a single one
    if name != "packops_varlen":
        with pytest.raises(ValueError, match=f"position_ids go on from one document of cu_seq_lens_q to the next, and '{name}'"):
            model(**{**packed(texts), "position_ids": counted})
        with pytest.raises(
            ValueError, match=f"cu_seq_lens_q without position_ids, by which alone '{name}' tells documents apart"
        ):
            model(**{**packed(texts), "position_ids": None, "pixel_values": torch.zeros(1)})


def opt(**config):
    torch.manual_seed(2)
    configuration = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, **config
    )
    return transformers.AutoModelForCausalLM.from_config(configuration).eval()


@pytest.mark.parametrize("reduction", ["mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_a_documents_first_label_is_never_scored(reduction):
    """Nor where positions alone say where it begins, and its label is set."""
    model, texts = make("llama"), documents()
    want = mean_of_documents(model, texts, reduction)
    packops.hf.apply(model, attention="packops_varlen", reduction=reduction)
    ids = torch.cat([torch.as_tensor(text) for text in texts])[None]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    loss = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)


def forest_of(**options):
    """Documents that begin alike, and the batch in which their prefix stands once."""
    generator = torch.Generator().manual_seed(6)
    texts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (70, 5, 1, 9)]
    texts = [texts[0] + text for text in texts[1:]]
    return texts, PackingCollator(share_prefixes=True, **options)(texts)


@pytest.mark.parametrize("ignore_index", [-100, 0, -1])
def test_labels_that_are_not_scored_reach_the_model_as_it_knows_them(ignore_index):
    """transformers and its Trainer know -100 alone."""
    model, texts = make("llama").train(), documents()
    rows = [{"input_ids": text, "completion_mask": [i >= len(text) // 2 for i in range(len(text))]} for text in texts]
    want = PackingCollator(pad_to_length=60)(rows)
    for share in (False, True):
        batch = PackingCollator(pad_to_length=60, ignore_index=ignore_index, share_prefixes=share)(rows)
        inputs, plain = batch.to_hf(), PackingCollator(pad_to_length=60, share_prefixes=share)(rows).to_hf()
        assert torch.equal(inputs["labels"], plain["labels"])
        packops.hf.apply(model, attention="packops_varlen")
        torch.testing.assert_close(model(**inputs).loss, model(**want.to_hf()).loss, rtol=1e-5, atol=0)
        assert int((packops.hf.log_probs(model, batch).log_probs != 0).sum()) == want.num_items


def test_forests_of_an_attention_or_a_loss_that_does_not_know_them_are_refused(fused):
    model, (texts, forest) = make("llama").train(), forest_of()
    want = mean_of_documents(model, texts, "mean")
    packops.hf.apply(model, attention="packops_varlen")
    torch.testing.assert_close(model(**forest.to_hf()).loss, want, rtol=1e-5, atol=0)
    for name in ("sdpa", "eager"):
        packops.hf.apply(model, attention=name)
        with pytest.raises(ValueError, match=f"attention '{name}' does not know documents that share prefixes"):
            model(**forest.to_hf())
    packops.hf.apply(model, attention="sdpa")
    torch.testing.assert_close(model(**forest.to_hf(attention="sdpa")).loss, want, rtol=1e-5, atol=0)
    packops.hf.apply(model, attention="eager")
    with pytest.raises(ValueError, match=r"a 4-D attention_mask of bools, which 'eager' would add to the scores as 0 and 1"):
        model(**forest.to_hf(attention="sdpa"))
    for attention in ("sdpa", "packops_varlen"):
        slides = packops.hf.apply(make("gemma3_text", sliding_window=5).train(), attention=attention)
        with pytest.raises(ValueError, match=r"layers with a sliding window, here of 5 tokens, obey a 4-D attention_mask"):
            slides(**forest.to_hf(attention="sdpa"))
        slides(**forest.to_hf(attention="sdpa") | {"token_weight": None})  # the mask may be anyone's
    packops.hf.apply(model, attention="packops_varlen", cross_entropy=False)
    with pytest.raises(
        ValueError, match="token_weight is given, and this call would not use it: the model's loss is not packops'"
    ):
        model(**forest.to_hf())
    packops.hf.apply(model, attention="packops_varlen")
    with pytest.raises(
        ValueError, match=r"would not use it: it has no labels\. The loss of a compute_loss_func, or of Trainer's label"
    ):
        model(**{**forest.to_hf(), "labels": None})
    with torch.no_grad():
        assert model(**{**forest.to_hf(), "labels": None}).logits.shape[1] == forest.num_tokens


@pytest.mark.parametrize("reduction", ["mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_weights_of_shared_rows_are_counted(reduction):
    """What Trainer counts, labels, is refused; count_weights adds up what such losses are divided by."""
    model, (texts, _) = make("llama"), forest_of()
    want = mean_of_documents(model, texts, reduction)
    packops.hf.apply(model, attention="packops_varlen")
    collate = PackingCollator(share_prefixes=True, names="hf", reduction=reduction)
    batches = [collate(texts[:2]), collate(texts[2:])]
    trainer = counting_trainer(model)
    with pytest.raises(ValueError, match=r"num_items_in_batch is a torch\.\w+ tensor.*packops\.hf\.count_weights\(trainer\)"):
        model(**{**batches[0], "num_items_in_batch": trainer._get_num_items_in_batch(batches, torch.device("cpu"))})
    packops.hf.count_weights(trainer)
    count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    loss = sum(model(**{**batch, "num_items_in_batch": count}).loss for batch in batches)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    trainer.model_accepts_loss_kwargs = False
    with pytest.raises(ValueError, match="this trainer counts nothing"):
        trainer._get_num_items_in_batch(batches, torch.device("cpu"))


def weighted(texts, values):
    generator = torch.Generator().manual_seed(3)
    choices = torch.tensor(values)
    return [
        {"input_ids": text, "token_weight": choices[torch.randint(len(values), (len(text),), generator=generator)].tolist()}
        for text in texts
    ]


def weighted_mean(model, rows):
    """By its definition, documents one by one: row t has the loss of token t + 1 and the weight of token t."""
    total = weights = 0
    for row in rows:
        ids, weight = torch.tensor(row["input_ids"]), torch.tensor(row["token_weight"])[:-1]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total += (weight * nn.functional.cross_entropy(logits, ids[1:], reduction="none")).sum()
        weights += weight.sum()
    return total / weights


@pytest.mark.parametrize("shift", [False, True])
def test_weights_of_packed_documents_are_counted(shift, fused):
    """Trainer's count of labels is refused where it is not what the weights add up to, and count_weights adds these up."""
    model, rows = make("llama"), weighted(documents(), [0.25, 0.0, 1.5])
    want = weighted_mean(model, rows)
    packops.hf.apply(model)
    collate = PackingCollator(names="hf", columns={"token_weight": 0.0}, shift_labels=shift)
    batches = [collate(rows[:2]), collate(rows[2:])]
    trainer = counting_trainer(model)
    labels = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    for count in (labels, labels.long()):
        with pytest.raises(ValueError, match=rf"num_items_in_batch is a {count.dtype} tensor.*packops\.hf\.count_weights"):
            model(**batches[0], num_items_in_batch=count)
    packops.hf.count_weights(trainer)
    count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    assert float(count) == float(packops.loss_normalizer([PackingCollator(columns={"token_weight": 0.0})(rows)]))
    for given in (count, float(count)):
        loss = sum(model(**batch, num_items_in_batch=given).loss for batch in batches)
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("values", [[0.0, 1.0], [1.0]], ids=str)
def test_weights_of_0_and_1_need_no_other_count(values, fused):
    """PackedBatch.to_hf() masks labels of weight 0, so that Trainer's count is right as it is."""
    model, rows = make("llama"), weighted(documents(), values)
    want = weighted_mean(model, rows)
    packops.hf.apply(model)
    collate = PackingCollator(columns={"token_weight": 0.0})
    batches = [collate(rows[:2]), collate(rows[2:])]
    inputs = [batch.to_hf() for batch in batches]
    counts = [counting_trainer(model)._get_num_items_in_batch(inputs, torch.device("cpu"))]
    counts += [sum(batch.num_items for batch in batches), torch.tensor(sum(batch.num_items for batch in batches))]
    for count in counts:
        loss = sum(model(**batch, num_items_in_batch=count).loss for batch in inputs)
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    own = {**inputs[0], "labels": batches[0].labels}  # a collator that leaves labels of weight 0, which Trainer counts
    if 0.0 in values:
        with pytest.raises(ValueError, match=r"the token_weight of 16 labels adds up to \d+, and num_items_in_batch is"):
            model(**own, num_items_in_batch=counts[0])
    shifted = PackingCollator(columns={"token_weight": 0.0}, shift_labels=True, names="hf")(rows)
    with pytest.raises(ValueError, match=r"which may be that of several documents .* packops\.hf\.count_weights"):
        model(**shifted, num_items_in_batch=counts[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_count_of_labels_never_divides_weights(device, compiled):
    """As for first labels that are counted: NaN on a GPU, and an error of the operation where it is compiled."""
    loss = packops.hf.CausalLMLoss()
    if compiled:
        loss = torch.compile(loss, backend="eager", fullgraph=True)
    inputs = PackingCollator()(documents()).to(device).to_hf()
    logits = torch.randn(1, sum(LENGTHS), VOCABULARY, device=device)
    ones, count = torch.ones(1, sum(LENGTHS), device=device), torch.tensor(44.0, device=device)
    right = packops.hf.CausalLMLoss()(logits, inputs["labels"])
    near = ones + 1e-7 * torch.randn(ones.shape, device=device)  # scaled to a mean of 1, but for roundings
    for weight in (ones, near):
        found = loss(logits, inputs["labels"], num_items_in_batch=count, token_weight=weight)
        torch.testing.assert_close(found, right)
    if device.type == "cuda":
        assert loss(logits, inputs["labels"], num_items_in_batch=count, token_weight=ones / 2).isnan()
    else:
        with pytest.raises(ValueError, match="got nan" if compiled else "token_weight of 44 labels adds up to 22"):
            loss(logits, inputs["labels"], num_items_in_batch=count, token_weight=ones / 2)
    torch.compiler.reset()


def test_count_weights_of_other_batches():
    texts = documents()
    trainer = counting_trainer(packops.hf.apply(make("llama")))
    counts_labels = trainer._get_num_items_in_batch
    packops.hf.count_weights(trainer)
    for batch in (packed(texts), padded(texts)):
        assert trainer._get_num_items_in_batch([batch], torch.device("cpu")) == counts_labels([batch], torch.device("cpu"))
    with pytest.raises(ValueError, match=r"reduction='seq-mean-token-sum', which divides by documents: packops\.hf\.count_doc"):
        packops.hf.count_weights(counting_trainer(packops.hf.apply(make("llama"), reduction="seq-mean-token-sum")))
    trainer.compute_loss_func = packops.hf.compute_loss_func
    for knows_no_weights in (trainer, counting_trainer(make("llama"))):
        with pytest.raises(ValueError, match="knows weights, which it would only be divided by"):
            packops.hf.count_weights(knows_no_weights)


def test_count_documents_leaves_out_those_that_weigh_nothing():
    model, texts = packops.hf.apply(make("llama"), reduction="seq-mean-token-mean"), documents()
    rows = [{"input_ids": text, "token_weight": [float(i != 1)] * len(text)} for i, text in enumerate(texts)]
    trainer = counting_trainer(model)
    packops.hf.count_documents(trainer)
    for shift in (False, True):
        batch = PackingCollator(names="hf", columns={"token_weight": 0.0}, shift_labels=shift)(rows)
        assert float(trainer._get_num_items_in_batch([batch], torch.device("cpu"))) == sum(len(t) > 1 for t in texts) - 1


def test_prefill_in_chunks_of_a_batch_that_is_padded_on_the_left():
    """A chunk's positions begin at 0 behind padding, which a mask as long as the cache tells."""
    model = make("llama").eval()
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :5] = ids[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "prefill_chunk_size": 4}
    want = model.generate(ids, **options)
    packops.hf.apply(model)
    assert torch.equal(model.generate(ids, **options), want)
    packed_behind_padding = torch.tensor([[3, 0, 1, 2]]), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    assert begin_anew(*packed_behind_padding)


CALLS = {
    "a cache": {"use_cache": True},
    "the cache of the configuration": {"use_cache": None},
    "a mask of ones": {"attention_mask": torch.ones(1, sum(LENGTHS), dtype=torch.int64)},
    "two rows": {"use_cache": None, "rows": 2},
}


@pytest.mark.parametrize("never_looks", [False, True])
@pytest.mark.parametrize("bounds", [True, False], ids=["boundaries", "positions alone"])
@pytest.mark.parametrize("name", CALLS)
def test_what_hides_packed_documents_from_transformers_is_refused(name, bounds, never_looks, monkeypatch):
    """Beside a mask or a cache, transformers does not look where positions begin anew; some families never do."""
    change = dict(CALLS[name])
    rows = change.pop("rows", 1)
    if rows == 2 and bounds:
        pytest.skip("boundaries are of one row")
    monkeypatch.setattr(packops.hf.families, "never_looks", lambda model: never_looks)
    model, inputs = make("llama"), packed(documents())
    if not bounds:
        inputs = {key: inputs[key].repeat(rows, 1) for key in ("input_ids", "labels", "position_ids")} | {"use_cache": False}
    model.config.use_cache = True
    packops.hf.apply(model)
    if not never_looks:
        model(**inputs)
        message = "with an attention_mask" if "attention_mask" in change else "with use_cache=True, the configuration's default"
    else:
        message = "never looks where packed documents"
    inputs |= change
    with pytest.raises(ValueError, match=message):
        model(**inputs)
    alone = torch.tensor([[0, 0, 5, 6, 7]])
    seen = (alone > 0).long()
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    model(alone, attention_mask=seen, position_ids=positions, labels=alone)  # padded, not packed
    packops.hf.apply(model, attention="packops_varlen")
    model(**inputs)


@pytest.mark.parametrize("attention", [None, "packops_varlen"])
def test_prompts_that_are_learned_are_refused(attention):
    """PEFT puts its tokens before a packed row's first document, and drops the positions."""
    model, inputs = packops.hf.apply(make("llama"), attention=attention), packed(documents())
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    embeddings = torch.cat((torch.randn(1, 10, 32), embeddings), dim=1)
    labels = torch.nn.functional.pad(inputs.pop("labels"), (10, 0), value=-100)
    with pytest.raises(ValueError, match="prompt learning"):
        model(**{**inputs, "position_ids": None}, inputs_embeds=embeddings, labels=labels)


@pytest.mark.parametrize("attention", [None, "packops_varlen"])
def test_prompts_that_are_learned_are_refused_by_positions_alone(attention):
    """Without cu_seq_lens_q: PEFT passes None for the positions that it drops, or moves them behind what is in the cache."""
    model = packops.hf.apply(make("llama"), attention=attention).train().requires_grad_(False)
    inputs = packed(documents())
    ids, labels, positions = (inputs[name] for name in ("input_ids", "labels", "position_ids"))
    embeddings = torch.cat((torch.randn(1, 10, 32), model.get_input_embeddings()(ids)), dim=1).requires_grad_()
    longer = torch.nn.functional.pad(labels, (10, 0), value=-100)
    with pytest.raises(ValueError, match=r"position_ids were dropped, .* prompt learning"):
        model(inputs_embeds=embeddings, labels=longer, position_ids=None)
    with pytest.raises(ValueError, match="prompt learning"):
        model(inputs_embeds=embeddings, position_ids=None)  # another's loss
    alone = {"use_cache": False}
    if attention is None:  # it finds no positions
        assert model(inputs_embeds=embeddings, labels=longer, **alone).loss > 0
    model.requires_grad_(True)
    assert model(inputs_embeds=embeddings, labels=longer, position_ids=torch.arange(59)[None], **alone).loss > 0

    with torch.no_grad():
        cache = model(torch.ones(1, 10, dtype=torch.long), position_ids=torch.arange(10)[None], use_cache=True).past_key_values
    for mask in (None, torch.ones(1, 59, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"packed documents with a cache. .*prompt learning"):
            model(ids, labels=labels, position_ids=positions + 10, past_key_values=cache, attention_mask=mask)
    mask = torch.ones(1, 59, dtype=torch.long)
    assert model(ids, labels=labels, position_ids=torch.arange(10, 59)[None], past_key_values=cache, attention_mask=mask).loss > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_prompt_learning_of_peft_is_refused(kind):
    peft = pytest.importorskip("peft", reason="needs peft")
    model, texts = packops.hf.apply(make("llama")), documents()
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=10)
    wrapped = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="prompt learning"):
        wrapped(**packed(texts), num_items_in_batch=44)
    with pytest.raises(ValueError, match="prompt learning"):
        wrapped(**{name: packed(texts)[name] for name in ("input_ids", "labels", "position_ids")})
    wrapped(**padded(texts)).loss.backward()


def test_a_reduction_that_would_be_ignored_is_refused():
    """Whoever calls the model in training without labels computes another loss."""
    model, inputs = packops.hf.apply(make("llama"), reduction="seq-mean-token-mean").train(), packed(documents())
    del inputs["labels"]
    with pytest.raises(ValueError, match="reduction='seq-mean-token-mean', and it was called without labels"):
        model(**inputs)
    with torch.no_grad():
        model(**inputs)
    model.eval()(**inputs)
    packops.hf.apply(model)
    model.train()(**inputs)


@pytest.mark.parametrize("reduction", ["mean", "seq-mean-token-sum"])
def test_the_forward_of_trl_is_watched(reduction):
    """TRL puts a forward of its own on the model, and its trainers compute their loss from it."""
    model, inputs = packops.hf.apply(make("llama"), reduction=reduction), packed(documents())
    before = model.forward

    @functools.wraps(type(model).forward)
    def fused_forward(self, *args, fused_lm_head=False, **kwargs):
        return "log-probabilities" if fused_lm_head else before(*args, **kwargs)

    model.forward = fused_forward.__get__(model)
    if reduction == "mean":
        assert model(**inputs, fused_lm_head=True) == "log-probabilities"
        with pytest.raises(ValueError, match=r"would not use it: TRL asked for log-probabilities .*docs/hugging_face\.md shows"):
            model(**inputs, token_weight=torch.ones(1, sum(LENGTHS)), fused_lm_head=True)
    else:
        with pytest.raises(ValueError, match=r"TRL asked it for log-probabilities .*docs/hugging_face\.md shows for TRL"):
            model(**inputs, fused_lm_head=True)
    assert model(**inputs).loss > 0
    del model.forward
    packops.hf.revert(model)


def fused_lm_head(model):
    """As TRL puts it on a model: the decoder is called, not the model's own forward."""

    @functools.wraps(type(model).forward)
    def fused_forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        return self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state

    model.forward = fused_forward.__get__(model)
    return model


def test_calls_that_trl_takes_past_the_forward_are_checked():
    texts = documents()
    model, stock, inputs = packops.hf.apply(make("llama")).train(), make("llama"), packed(texts)
    want = stock.model(**{name: x for name, x in inputs.items() if name != "labels"}).last_hidden_state
    fused_lm_head(model)
    torch.testing.assert_close(model(**inputs, fused_lm_head=True), want, rtol=1e-4, atol=1e-5)
    del inputs["position_ids"]
    torch.testing.assert_close(model(**inputs, fused_lm_head=True), want, rtol=1e-4, atol=1e-5)
    mask = torch.ones_like(inputs["input_ids"])
    with pytest.raises(ValueError, match="with an attention_mask, beside which transformers does not look"):
        model(**inputs, attention_mask=mask, fused_lm_head=True)
    assert model(**padded(texts), fused_lm_head=True).shape == (5, 22, 32)


def test_the_fused_lm_head_of_trl_is_checked():
    utils = pytest.importorskip("trl.trainer.utils", reason="needs trl")
    texts, found = documents(), []
    for model in (make("llama"), packops.hf.apply(make("llama"))):
        utils.add_fused_lm_head(model.train())
        found.append(model(**packed(texts), fused_lm_head=True).loss)
    torch.testing.assert_close(found[0], found[1])
    with pytest.raises(ValueError, match="with an attention_mask, beside which transformers does not look"):
        model(**packed(texts), attention_mask=torch.ones(1, 49, dtype=torch.long), fused_lm_head=True)


def test_count_documents_where_nothing_counts_documents():
    trainer = counting_trainer(make("llama"))
    with pytest.raises(ValueError, match="divides by tokens"):
        packops.hf.count_documents(trainer)
    trainer.compute_loss_func = functools.partial(packops.hf.compute_loss_func, reduction="seq-mean-token-mean")
    packops.hf.count_documents(trainer)
    assert float(trainer._get_num_items_in_batch([packed(documents())], torch.device("cpu"))) == 4


# ---- the router loss of experts -----------------------------------------------------------------------------------------------

ROUTERS = ["mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "granitemoe"]


@pytest.mark.parametrize("family", ROUTERS)
def test_the_router_loss_leaves_out_padding(family, fused):
    """At the end of the row, in documents, and where a rank has no document at all."""
    options = {"output_router_logits": True, "router_aux_loss_coef": 0.7}
    model, texts = make(family, **options), documents()
    stock = run(model, packed(texts))
    packops.hf.apply(model)
    assert difference(run(model, packed(texts)), stock) < 1e-5
    for more in ({"pad_to_multiple_of": 16}, {"pad_to_length": 90, "pad_token_id": 7}, {"pad_doc_to_multiple_of": 4}):
        inputs = PackingCollator(names="hf", **more)(texts)
        assert difference(run(model, inputs), stock) < 2e-5, more
    inputs = PackingCollator(names="hf", pad_to_length=24, pad_token_id=7)([])
    loss, gradients = run(model, {**inputs, "num_items_in_batch": 44})
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients.values())
    assert float(run(model, {**packed(texts), "output_router_logits": False})[0]) < float(stock[0]) - 0.5
    both = run(model, padded(texts))  # which says itself what is padding
    packops.hf.revert(model)
    assert difference(both, run(model, padded(texts))) < 1e-5
