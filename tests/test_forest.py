"""Rows whose documents share prefixes give the loss and gradients of the documents one by one; nothing crosses branches."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import packops
from cuda_streams import capture
from packops.ops import attention_paths
from packops.ops.attention_paths import Rule

VOCAB = 7
REDUCTIONS = ["mean", "seq-mean-token-mean", "seq-mean-token-sum"]


def random_documents(seed: int, count: int | None = None) -> list[dict[str, np.ndarray]]:
    """Documents that continue prefixes of those before them, with labels that mask some tokens, and weights."""
    rng = np.random.default_rng(seed)
    documents: list[dict[str, np.ndarray]] = []
    for number in range(rng.integers(1, 7) if count is None else count):
        ids = np.zeros(0, np.int64)
        if number and rng.random() < 0.8:
            other = documents[rng.integers(number)]["input_ids"]
            ids = other[: rng.integers(len(other) + 1)]
        ids = np.concatenate([ids, rng.integers(0, VOCAB, rng.integers(0, 6))])
        labels = np.where(rng.random(len(ids)) < 0.8, ids, -100)
        documents.append({"input_ids": ids, "labels": labels, "token_weight": rng.random(len(ids)).astype(np.float32) + 0.5})
    return documents


@st.composite
def forests(draw: st.DrawFn, longest: int = 5) -> list[dict[str, np.ndarray]]:
    """Documents that continue prefixes of those before them by up to ``longest`` tokens. Any token, of a prompt too, may be no
    label, and any row may weigh nothing."""
    documents: list[dict[str, np.ndarray]] = []
    for number in range(draw(st.integers(1, 6))):
        # A document to continue, rather than none: random ids of their own share next to nothing.
        before = draw(st.sampled_from(documents))["input_ids"].tolist() if number else []
        ids = before[: draw(st.integers(0, len(before)))]
        ids += draw(st.lists(st.integers(0, VOCAB - 1), max_size=longest))
        trained = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        weights = draw(st.lists(st.sampled_from([1.0, 0.5, 1.75, 0.0]), min_size=len(ids), max_size=len(ids)))
        documents.append(
            {
                "input_ids": np.array(ids, np.int64),
                "labels": np.array([x if train else -100 for x, train in zip(ids, trained, strict=True)], np.int64),
                "token_weight": np.array(weights, np.float32),
            }
        )
    return documents


def scored_rows(document: dict[str, np.ndarray]) -> np.ndarray:
    """Which rows of a document alone count."""
    rows = np.zeros(len(document["input_ids"]), bool)
    rows[:-1] = document["labels"][1:] != -100
    return rows & (document["token_weight"] > 0) if "token_weight" in document else rows


class Model(torch.nn.Module):
    """Two layers of attention with RoPE. ``attend(q, k, v, batch)`` says who sees whom."""

    def __init__(self, head_dim: int = 6, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(3)
        self.head_dim, width = head_dim, 2 * head_dim
        self.embed = torch.nn.Embedding(VOCAB, width, dtype=dtype)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, 3 * width, dtype=dtype) for _ in range(2))
        self.head = torch.nn.Linear(width, VOCAB, dtype=dtype)
        self.table = packops.rope_table(head_dim, 256, dtype=dtype)

    def forward(self, batch, attend):
        x = self.embed(batch.input_ids[0])
        for layer in self.layers:
            q, k, v = layer(x).view(-1, 3, 2, self.head_dim).unbind(1)
            q, k = packops.apply_rope(q, k, *(t.to(x.device) for t in self.table), position_ids=batch.position_ids[0])
            x = x + attend(q, k, v, batch).reshape(x.shape)
        return self.head(torch.tanh(x))


def by_mask(q, k, v, batch):
    scores = torch.einsum("qhd,khd->hqk", q, k) * 6**-0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~batch.attention_mask()[0], float("-inf")).softmax(-1), v)


def by_kernel(q, k, v, batch):
    return packops.attention(q, k, v, batch.cu_seqlens, getattr(batch, "parents", None))


def grads(model, loss):
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def one_by_one(model, documents, reduction):
    """The definition: every document alone."""
    total, tokens, counted = 0.0, 0.0, 0
    for document in documents:
        if not len(document["input_ids"]):
            continue
        batch = packops.PackedBatch.build(
            torch.tensor(document["input_ids"]), torch.tensor(document["labels"]), [0, len(document["input_ids"])]
        )
        weight = torch.tensor(document.get("token_weight", np.ones(len(document["input_ids"]), np.float32)))
        logits, labels = model(batch, by_mask), batch.labels[0]
        loss = packops.cross_entropy(logits, labels, shift=True, reduction="none") * weight
        scored = float(weight[:-1][labels[1:] != -100].double().sum())
        if scored == 0:
            continue
        total = total + (loss.sum() / scored if reduction == "seq-mean-token-mean" else loss.sum())
        tokens, counted = tokens + scored, counted + 1
    return total / ((tokens if reduction == "mean" else counted) or 1)


def of_forest(model, batch, attend):
    logits, labels, weight = model(batch, attend), batch.shift_labels[0], batch.token_weight[0]
    loss = (packops.cross_entropy(logits, labels, reduction="none") * weight).sum() / (batch.denominator or 1)
    # The op takes weights in fp32, which holds no third.
    own = packops.cross_entropy(logits, labels, token_weight=weight, num_items=batch.denominator)
    torch.testing.assert_close(own, loss, rtol=1e-6, atol=1e-6)
    return loss


def check_same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attend", [by_mask, by_kernel])
@given(
    documents=forests(),
    reduction=st.sampled_from(REDUCTIONS),
    weights=st.booleans(),
    min_shared=st.integers(1, 4),
    multiple=st.integers(1, 9),
)
@settings(max_examples=25)
def test_loss_and_gradients_are_those_of_the_documents_one_by_one(attend, documents, reduction, weights, min_shared, multiple):
    if not weights:
        documents = [{name: values for name, values in d.items() if name != "token_weight"} for d in documents]
    collate = packops.PackingCollator(
        share_prefixes=True,
        min_shared=min_shared,
        reduction=reduction,
        columns={"token_weight": 0.0} if weights else None,
        pad_to_multiple_of=multiple,
    )
    batch, model = collate(documents), Model()
    assert batch.num_items == sum(int(scored_rows(d).sum()) for d in documents)
    want = one_by_one(model, documents, reduction)
    if batch.num_items:
        check_same(grads(model, of_forest(model, batch, attend)), grads(model, want))


@pytest.mark.parametrize("attend", [by_mask, by_kernel])
@given(batches=st.lists(forests(), min_size=10, max_size=10), reduction=st.sampled_from(REDUCTIONS), min_shared=st.integers(1, 4))
@settings(max_examples=8, phases=(Phase.generate,))  # to shrink ten forests takes minutes, and the one before has done it
def test_ten_steps_of_training_end_at_the_same_weights(attend, batches, reduction, min_shared):
    collate = packops.PackingCollator(
        share_prefixes=True, min_shared=min_shared, reduction=reduction, columns={"token_weight": 0.0}
    )
    models = Model(), Model()
    # eps: at 1e-8 the rounding of a gradient that is 0 in exact arithmetic would be a step of 1e-10.
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.03, eps=1e-3) for model in models]
    for documents in batches:
        batch = collate(documents)
        if not batch.num_items:
            continue
        losses = of_forest(models[0], batch, attend), one_by_one(models[1], documents, reduction)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    check_same([p.detach() for p in models[0].parameters()], [p.detach() for p in models[1].parameters()])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ten_steps_in_bf16_differ_from_fp64_by_rounding(device, reduction):
    exact, rounded = Model(64), Model(64, torch.float32)
    exact.embed.weight.data *= 0.3  # so that no step is a leap, which would make rounding large
    rounded.load_state_dict(exact.state_dict())
    before = [p.detach().clone() for p in exact.parameters()]
    rounded.to(device)
    collate = packops.PackingCollator(share_prefixes=True, min_shared=1, reduction=reduction, columns={"token_weight": 0.0})
    for step in range(10):
        documents = random_documents(step, count=5)
        batch = collate(documents).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = rounded(batch, by_kernel)
            loss = packops.cross_entropy(
                logits, batch.shift_labels[0], token_weight=batch.token_weight[0], num_items=batch.denominator
            )
        want = one_by_one(exact, documents, reduction)
        torch.testing.assert_close(loss.double().cpu(), want, rtol=1e-2, atol=1e-2)
        for model, value in ((rounded, loss), (exact, want)):
            for p, grad in zip(model.parameters(), torch.autograd.grad(value, list(model.parameters())), strict=True):
                p.data -= 0.02 * grad
    for p, q, old in zip(rounded.parameters(), exact.parameters(), before, strict=True):
        error = (p.double().cpu() - q).norm() / (q - old).norm()
        assert error < 0.15, error


@pytest.mark.parametrize("attend", [by_mask, by_kernel])
@given(documents=forests(), min_shared=st.integers(1, 4), multiple=st.integers(1, 9))
@settings(max_examples=40)
def test_no_gradient_crosses_from_one_branch_to_another(attend, documents, min_shared, multiple):
    """A row reads exactly the rows of its documents up to itself: asked of the documents, not of the batch's own mask."""
    batch = packops.PackingCollator(share_prefixes=True, min_shared=min_shared, pad_to_multiple_of=multiple)(documents)
    rows = torch.arange(batch.num_tokens)
    allowed = torch.zeros(batch.num_tokens, batch.num_tokens, dtype=torch.bool)
    for path in batch.unpack(rows[None]):
        for at, row in enumerate(path):
            allowed[row, path[: at + 1]] = True
    q, k, v = (torch.randn(batch.num_tokens, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, batch)
    for row in rows[allowed.any(1)]:
        of_keys, of_values = ((g != 0).any((1, 2)) for g in torch.autograd.grad(out[row].sum(), (k, v), retain_graph=True))
        assert torch.equal(of_values, allowed[row])
        assert not (of_keys & ~allowed[row]).any()


def dialogues(depth: int) -> list[list[int]]:
    """Every turn is answered in two ways, and the dialogue goes on from one of them."""
    rng = np.random.default_rng(depth)
    trunk: list[int] = []
    documents = []
    for _ in range(depth):
        trunk = trunk + rng.integers(0, VOCAB, 3).tolist()
        documents.append(trunk + rng.integers(0, VOCAB, 2).tolist())
    return documents


def answers(prompt: int, lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(prompt)
    ids = rng.integers(0, VOCAB, prompt).tolist()
    return [ids + rng.integers(0, VOCAB, length).tolist() for length in lengths]


def labelled(documents: list[list[int]], score: Callable[[int, int], bool]) -> list[dict[str, np.ndarray]]:
    """``score(i, n)``: whether token i of n of a document is a label."""
    return [
        {"input_ids": np.array(ids), "labels": np.array([x if score(i, len(ids)) else -100 for i, x in enumerate(ids)])}
        for ids in documents
    ]


# Documents, and where they share: (documents, tokens of the row).
EDGES: dict[str, tuple[list[dict[str, np.ndarray]], int | None]] = {
    "50 turns that all branch": (labelled(dialogues(50), lambda i, n: True), None),
    "300 branches of 3 tokens": (labelled(answers(20, [3] * 300), lambda i, n: True), None),
    "branches of one token": (labelled([[1, 2, 3, i] for i in range(VOCAB)], lambda i, n: True), 2 + 2 * VOCAB),
    "all equal": (labelled([[1, 2, 3, 4]] * 5, lambda i, n: True), 4),
    "each begins the next": (labelled([[1, 2, 3, 4, 5, 6][:n] for n in range(1, 7)], lambda i, n: True), 6),
    "nothing shared": (labelled([[1, 2, 3], [2, 3, 1], [3, 1]], lambda i, n: True), 8),
    "one document": (labelled([[1, 2, 3]], lambda i, n: True), 3),
    "one token each": (labelled([[1], [2], [1], [3]], lambda i, n: True), None),
    "labels on the prompt alone": (labelled(answers(9, [4, 3, 1, 5]), lambda i, n: i < 9), None),
    "labels on the answer alone": (labelled(answers(9, [4, 3, 1, 5]), lambda i, n: i >= 9), None),
    "label on the last token of the prompt": (labelled(answers(9, [4, 3, 1, 5]), lambda i, n: i == 8), None),
    "label on the first token of the answer": (labelled(answers(9, [4, 3, 1, 5]), lambda i, n: i == 9), None),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", EDGES)
def test_edges(name, reduction):
    documents, tokens = EDGES[name]
    batch = packops.PackingCollator(share_prefixes=True, min_shared=1, reduction=reduction)(documents)
    assert tokens in (None, batch.num_tokens)
    assert batch.num_tokens <= sum(len(d["input_ids"]) for d in documents)
    model = Model()
    loss, want = of_forest(model, batch, by_kernel), one_by_one(model, documents, reduction)
    if batch.num_items:
        check_same(grads(model, loss), grads(model, want))
    else:
        assert name == "one token each"
        assert loss.item() == 0


@given(documents=forests(), min_shared=st.integers(1, 4), reduction=st.sampled_from(REDUCTIONS))
def test_a_row_weighs_as_much_as_in_all_documents_through_it(documents, min_shared, reduction):
    """A prompt that is trained on counts for every document that trains on it, and for no other."""
    collate = packops.PackingCollator(
        share_prefixes=True, min_shared=min_shared, reduction=reduction, columns={"token_weight": 0.0}
    )
    batch = collate(documents)
    want = torch.zeros(batch.num_tokens, dtype=torch.float64)
    for path, document in zip(batch.unpack(torch.arange(batch.num_tokens)[None]), documents, strict=True):
        rows = scored_rows(document)
        weight = document["token_weight"].astype(np.float64) * rows
        if rows.any():
            want[path] += torch.tensor(weight / (weight.sum() if reduction == "seq-mean-token-mean" else 1))
            labels = torch.tensor(document["input_ids"])
            assert torch.equal(batch.shift_labels[0, path[:-1]][rows[:-1]], labels[1:][rows[:-1]])
    torch.testing.assert_close(batch.token_weight[0].double(), want, rtol=1e-6, atol=1e-6)
    assert (batch.num_items, batch.num_valid) == (sum(int(scored_rows(d).sum()) for d in documents), int((want > 0).sum()))


def test_a_prompt_that_all_documents_train_on_weighs_as_much_as_all_of_them():
    documents = labelled(answers(9, [4, 3, 1, 5]), lambda i, n: i < 9)
    batch = packops.PackingCollator(share_prefixes=True, min_shared=1, reduction="mean")(documents)
    assert batch.token_weight[0].tolist() == [4.0] * 8 + [0.0] * (batch.num_tokens - 8)
    assert (batch.num_items, batch.denominator, batch.num_valid) == (32, 32, 8)


def test_unpack_gives_every_document_its_rows_back():
    documents = random_documents(5, count=6)
    batch = packops.PackingCollator(share_prefixes=True, min_shared=1, columns={"token_weight": 0.0})(documents)
    for name, values in (("input_ids", batch.input_ids), ("positions", batch.position_ids)):
        for document, part in zip(documents, batch.unpack(values), strict=True):
            ids = document["input_ids"]
            assert part.tolist() == (ids if name == "input_ids" else np.arange(len(ids))).tolist()


def test_sums_per_document_count_a_shared_row_for_each():
    documents = random_documents(8, count=6)
    batch = packops.PackingCollator(share_prefixes=True, min_shared=1, columns={"token_weight": 0.0})(documents)
    values = torch.randn(1, batch.num_tokens, dtype=torch.float64, requires_grad=True)
    want = []
    for document, part in zip(documents, batch.unpack(values), strict=True):
        want.append(part[:-1][torch.tensor(document["labels"][1:] != -100)].sum() if len(part) else values.new_zeros(()))
    got = batch.document_sums(values)
    weight = torch.randn(6, dtype=torch.float64)
    check_same(
        [got, *torch.autograd.grad(got @ weight, values)], [x := torch.stack(want), *torch.autograd.grad(x @ weight, values)]
    )
    flat = packops.PackingCollator(pad_to_multiple_of=50)([[1, 2, 3], [4, 5]])
    assert flat.document_sums(torch.ones(1, 50)).tolist() == [3, 2]


def test_documents_that_share_nothing_are_packed_as_ever():
    documents = [[1, 2, 3], [4, 5], [], [6]]
    forest = packops.PackingCollator(share_prefixes=True, pad_to_length=9, num_documents=8)(documents)
    flat = packops.PackingCollator(pad_to_length=9, num_documents=8, shift_labels=True)([[1, 2, 3], [4, 5], [6]])
    assert (forest.parents == -1).all()
    for name in ("input_ids", "position_ids", "cu_seqlens", "shift_labels", "seq_idx", "real_tokens"):
        assert torch.equal(getattr(forest, name), getattr(flat, name)), name
    assert (forest.num_items, forest.num_sequences, forest.num_valid) == (flat.num_items, flat.num_sequences, flat.num_valid)


def test_a_labels_disagreement_is_an_error_and_a_mask_is_none():
    prompt = [1, 2, 3, 4]
    collate = packops.PackingCollator(share_prefixes=True, min_shared=1)
    masked = {"input_ids": [*prompt, 5], "labels": [-100, -100, -100, -100, 5]}
    batch = collate([masked, {"input_ids": [*prompt, 6]}])
    assert batch.token_weight[0].tolist() == [1, 1, 1, 1, 0, 1, 0]  # of the prompt the second document alone
    assert collate([[*prompt, 5], [*prompt, 6]]).token_weight[0].tolist() == [2, 2, 2, 1, 0, 1, 0]
    with pytest.raises(ValueError, match="labels of document 1 differ"):
        collate([[*prompt, 5], {"input_ids": [*prompt, 6], "labels": [1, 9, 3, 4, 6]}])
    extra = packops.PackingCollator(share_prefixes=True, min_shared=1, columns={"kind": 0})
    with pytest.raises(ValueError, match="kind of document 1 differs"):
        extra([{"input_ids": prompt, "kind": [1, 1, 1, 1]}, {"input_ids": [*prompt, 5], "kind": [1, 2, 1, 1, 1]}])


def test_a_row_of_weight_0_is_not_scored():
    """By the document that gives it none: another one may score it, and its label there says nothing."""
    collate = packops.PackingCollator(share_prefixes=True, min_shared=1, columns={"token_weight": 0.0})
    documents = [
        {"input_ids": [1, 2, 3, 4, 5], "token_weight": [0.0, 1.0, 0.0, 1.0, 1.0]},
        {"input_ids": [1, 2, 3, 4, 6], "labels": [1, 9, 3, 4, 6], "token_weight": [0.0, 1.0, 1.0, 1.0, 0.0]},
        {"input_ids": [7, 8], "token_weight": [0.0, 0.0]},
    ]
    batch = collate([{name: np.array(x) for name, x in document.items()} for document in documents])
    assert batch.input_ids[0].tolist() == [1, 2, 3, 4, 5, 4, 6, 7, 8]
    assert batch.token_weight[0].tolist() == [0, 2, 1, 1, 0, 1, 0, 0, 0]
    assert (batch.num_items, batch.num_valid, batch.num_sequences) == (5, 4, 2)
    assert batch.document_sums(torch.ones(1, 9)).tolist() == [2, 3, 0]


@pytest.mark.parametrize("attention", ["packops_varlen", "packops_varlen by segments", "sdpa"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_hugging_face_models(attention, reduction, family, monkeypatch):
    if attention.endswith("by segments"):
        monkeypatch.setattr(attention_paths, "CALL_PER_SEGMENT", 0)
    attention = attention.split()[0]
    transformers = pytest.importorskip("transformers")
    if attention == "sdpa" and family != "llama":
        pytest.skip("the mask has no window")
    config = transformers.AutoConfig.for_model(
        family,
        **{"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    )
    if family != "llama":
        config.sliding_window = 4
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa" if attention == "sdpa" else "eager"
    ).double()
    documents = [{**d, "token_weight": np.ones(len(d["input_ids"]), np.float32)} for d in random_documents(4, count=6)]
    total = counted = tokens = 0
    for document in documents:
        ids, labels = (torch.tensor(document[name])[None] for name in ("input_ids", "labels"))
        scored = int((labels[0, 1:] != -100).sum())
        if scored:
            mean = model(input_ids=ids, labels=labels).loss
            total = total + mean * (1 if reduction == "seq-mean-token-mean" else scored)
            tokens, counted = tokens + scored, counted + 1
    want = grads(model, total / (tokens if reduction == "mean" else counted))

    batch = packops.PackingCollator(share_prefixes=True, min_shared=1, reduction=reduction, pad_to_multiple_of=7)(documents)
    assert batch.num_tokens < sum(batch.lengths)
    packops.hf.apply(model, attention="packops_varlen" if attention == "packops_varlen" else None)
    got = grads(model, model(**batch.to_hf(attention=attention)).loss)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-6, atol=2e-7)  # transformers' own loss is fp32


def test_log_probabilities_of_a_hugging_face_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = packops.hf.apply(transformers.AutoModelForCausalLM.from_config(config).double(), attention="packops_varlen")
    documents = [{"input_ids": d["input_ids"], "labels": d["labels"]} for d in random_documents(4, count=6)]
    batch = packops.PackingCollator(share_prefixes=True, min_shared=1)(documents)
    flat = packops.PackingCollator()([d for d in documents if len(d["input_ids"])])
    sums = iter(flat.document_sums(packops.hf.log_probs(model, flat).log_probs))
    want = [next(sums) if len(d["input_ids"]) else torch.zeros((), dtype=torch.float64) for d in documents]
    got = batch.document_sums(packops.hf.log_probs(model, batch).log_probs)
    check_same(
        [got, *torch.autograd.grad(got.square().sum(), model.lm_head.weight)],
        [x := torch.stack(want), *torch.autograd.grad(x.square().sum(), model.lm_head.weight)],
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_verify(reduction):
    documents = [d["input_ids"] for d in random_documents(4, count=6)]

    def forward(model, batch):
        return model(batch, by_kernel)[None]

    report = packops.verify(Model(), documents, forward=forward, reduction=reduction, share_prefixes=True)
    assert report.ok, report
    assert report.worst_leak == 0

    rows = [{"input_ids": d, "token_weight": [0.5 * (place % 3) for place in range(len(d))]} for d in documents]
    collate = packops.PackingCollator(share_prefixes=True, min_shared=1, reduction=reduction, columns={"token_weight": 0.0})
    report = packops.verify(Model(), rows, forward=forward, reduction=reduction, share_prefixes=True, collator=collate)
    assert report.ok, report

    def siblings_seen(model, batch):  # every token sees all of its tree before it
        if not isinstance(batch, packops.PackedForest):
            return forward(model, batch)
        roots = [int(batch.cu_seqlens[i]) for i, parent in enumerate(batch.parents.tolist()) if parent < 0]
        trees = torch.tensor([*roots, batch.num_tokens])
        return forward(model, packops.PackedBatch.from_cu_seqlens(batch.input_ids, trees))

    report = packops.verify(Model(), documents, forward=siblings_seen, reduction=reduction, share_prefixes=True)
    assert any("see each other" in finding for finding in report.findings)


def test_verify_scores_the_documents_alone_as_the_collator_does():
    """Its ``ignore_index``, here a token that occurs, and its columns, which a ``forward`` may read."""
    documents = [[3, 1, 4, 1, 5], [3, 1, 4, 2], [3, 1, 2, 2, 1]]
    rows = [{"input_ids": d, "labels": d, "scale": [1.5] * len(d)} for d in documents]

    def forward(model, batch):
        return model(batch, by_kernel)[None] * batch.columns["scale"][..., None]

    collate = packops.PackingCollator(share_prefixes=True, min_shared=1, ignore_index=1, columns={"scale": 1.0})
    report = packops.verify(Model(), rows, forward=forward, share_prefixes=True, collator=collate)
    assert report.ok, report


def test_verify_of_hugging_face_models_and_of_nothing_shared():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, bos_token_id=1
    )
    config.eos_token_id = 2
    model = packops.hf.apply(transformers.AutoModelForCausalLM.from_config(config), attention="packops_varlen")
    documents = [d["input_ids"] for d in random_documents(4, count=6)]
    report = packops.verify(model, documents, share_prefixes=True)
    assert report.ok, report
    with pytest.raises(ValueError, match="share a prefix"):
        packops.verify(model, [[1, 2, 3], [2, 3, 4], [3, 4]], share_prefixes=True)


# Segments about as long as the kernels' tiles of 64; a tree in a tree; an empty segment; padding.
SEGMENTS = [0, 70, 71, 134, 198, 198, 330, 331, 340, 420, 425, 500]
PARENTS = [-1, 0, 0, 2, 2, 2, 0, -1, 7, 8, -1]


def tensors(device, *shapes):
    dtype = torch.float64 if device.type == "cpu" else torch.bfloat16
    return [torch.randn(*shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_metadata(device, index):
    cu_seqlens, parents = (torch.tensor(x, dtype=index, device=device) for x in (SEGMENTS, PARENTS))
    got = packops.packed_metadata(cu_seqlens, 510, parents)
    want = packops.reference.packed_forest(cu_seqlens, 510, parents)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("options", [{}, {"window": 90}, {"window": 2}, {"softcap": 2.0}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 96])
def test_attention(device, head_dim, options):
    if device.type == "cpu":
        head_dim //= 16
    q, k, v = tensors(device, (510, 4, head_dim), (510, 2, head_dim), (510, 2, head_dim))
    cu_seqlens, parents = torch.tensor(SEGMENTS, device=device), torch.tensor(PARENTS, dtype=torch.int32, device=device)
    incoming = torch.randn_like(q)
    got = packops.attention(q, k, v, cu_seqlens, parents, **options)
    want = packops.reference.attention(q, k, v, cu_seqlens, parents, **options)
    got = [got.detach(), *torch.autograd.grad(got, (q, k, v), incoming)]
    want = [want.detach(), *torch.autograd.grad(want, (q, k, v), incoming.double())]
    for x, y in zip(got, want, strict=True):
        error = (x.double() - y.double()).norm() / y.double().norm()
        assert error < (1e-12 if device.type == "cpu" else 1e-2), error
        assert (x[500:] == 0).all()  # padding


def test_attention_without_sharing_has_the_bits_of_documents(device):
    q, k, v = tensors(device, (510, 4, 64), (510, 2, 64), (510, 2, 64))
    cu_seqlens = torch.tensor(SEGMENTS, dtype=torch.int32, device=device)
    for parents in (None, torch.full((len(PARENTS),), -1, device=device)):
        out = packops.attention(q, k, v, cu_seqlens, parents)
        results = [out.detach(), *torch.autograd.grad(out.double().square().sum(), (q, k, v))]
        if parents is None:
            flat = results
    assert all(torch.equal(a, b) for a, b in zip(results, flat, strict=True))


def one_tree_after_the_other(trees: list[tuple[list[int], list[int]]]) -> tuple[list[int], list[int]]:
    """cu_seqlens and parents of several trees, each given by the lengths of its segments and their parents."""
    lengths, parents = [], []
    for own_lengths, own_parents in trees:
        parents += [parent + len(lengths) if parent >= 0 else -1 for parent in own_parents]
        lengths += own_lengths
    return [0, *itertools.accumulate(lengths)], parents


# Trees by name, each small enough for a reference of all its tokens by all its tokens.
TREES = {
    "boundaries at every residue of a tile": [([n, n % 7 + 1, 129 - n, n], [-1, 0, 0, 2]) for n in range(1, 129)],
    "depth 50": [([5] + [3, 4] * 50, [-1] + [x for i in range(50) for x in (2 * i, 2 * i)])],
    "1000 branches of 3 tokens": [([100] + [3] * 1000, [-1] + [0] * 1000)],
    "branches of one token": [([65] + [1] * 70, [-1] + [0] * 70)],
    "nothing in the shared part": [([0, 70, 3, 64], [-1, 0, 0, 0]), ([0, 0, 0, 66], [-1, 0, 1, 2])],
    "segments that hold nothing": [([64, 0, 64, 0, 3], [-1, 0, 0, 2, 0])],
}


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("name", TREES)
def test_attention_of_trees(device, name, window):
    trees, head_dim = TREES[name], 64
    if device.type == "cpu":
        trees, head_dim = trees[:: max(1, len(trees) // 16)], 4
        if name.startswith("1000"):
            trees = [(trees[0][0][:100], trees[0][1][:100])]
    boundaries, parents = one_tree_after_the_other(trees)
    total = boundaries[-1] + 5
    q, k, v = tensors(device, (total, 2, head_dim), (total, 1, head_dim), (total, 1, head_dim))
    incoming = torch.randn_like(q)
    index = torch.tensor(boundaries, dtype=torch.int32, device=device)
    got = packops.attention(q, k, v, index, torch.tensor(parents, device=device), window=window)
    got = [got.detach(), *torch.autograd.grad(got, (q, k, v), incoming)]
    begin = 0
    for lengths, own in trees:
        rows = slice(begin, begin := begin + sum(lengths))
        leaves = [x[rows].detach().double().requires_grad_() for x in (q, k, v)]
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], device=device)
        want = packops.reference.attention(*leaves, bounds, torch.tensor(own, device=device), window=window)
        want = [want.detach(), *torch.autograd.grad(want, leaves, incoming[rows].double())]
        for x, y in zip(got, want, strict=True):
            error = (x[rows].double() - y).norm() / y.norm().clamp(min=1e-3)
            assert error < (1e-12 if device.type == "cpu" else 1e-2), (rows, error)
    assert all((x[begin:] == 0).all() for x in got)


def by_torch(q, k, v, cu_seqlens, parents, window):
    return attention_paths.attend(q, k, v, cu_seqlens, parents, Rule(window=window))


def by_packops(q, k, v, cu_seqlens, parents, window):
    return packops.attention(q, k, v, cu_seqlens, parents, window=window)


@pytest.mark.parametrize("attend", [by_packops, by_torch])
@pytest.mark.parametrize("window", [None, 90])
def test_nan_in_a_branch_stays_in_the_documents_through_it(device, window, attend):
    head_dim = 64 if device.type == "cuda" else 4
    values = [x.detach() for x in tensors(device, (510, 4, head_dim), (510, 2, head_dim), (510, 2, head_dim))]
    incoming = torch.randn_like(values[0])
    cu_seqlens, parents = (torch.tensor(x, dtype=torch.int32, device=device) for x in (SEGMENTS, PARENTS))

    def results(bad: slice):
        q, k, v, grad = (x.clone() for x in (*values, incoming))
        for x in (q, k, v, grad):
            x[bad] = float("nan")
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, cu_seqlens, parents, window)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def continues(segment: int, other: int) -> bool:
        while segment > other:
            segment = PARENTS[segment]
        return segment == other

    # On CUDA torch adds gradients of queries with atomics.
    near = functools.partial(torch.allclose, rtol=2**-6, atol=2**-6)
    same = near if attend is by_torch and device.type == "cuda" else torch.equal

    want = results(slice(0, 0))
    for bad in range(len(PARENTS)):
        if SEGMENTS[bad] == SEGMENTS[bad + 1]:
            continue
        got = results(slice(SEGMENTS[bad], SEGMENTS[bad + 1]))
        assert got[0][SEGMENTS[bad] : SEGMENTS[bad + 1]].isnan().all()
        for other in range(len(PARENTS)):
            rows = slice(SEGMENTS[other], SEGMENTS[other + 1])
            reads, is_read = continues(other, bad), continues(bad, other)
            for at, (x, y) in enumerate(zip(got, want, strict=True)):
                if not reads and (at < 2 or not is_read):
                    assert same(x[rows], y[rows]), (bad, other, at)
            if reads and window is None:
                assert got[0][rows].isnan().all()


@pytest.mark.parametrize("parents", [[5] * 11, list(range(11)), [-2] + [0] * 10, [-1, 0, -1, 0, *[-1] * 7]], ids=str)
def test_parents_out_of_order_are_an_error_on_the_cpu(parents):
    q = torch.zeros(510, 1, 4)
    for call in (
        lambda p: packops.attention(q, q, q, torch.tensor(SEGMENTS), p),
        lambda p: packops.packed_metadata(torch.tensor(SEGMENTS), 510, p),
    ):
        with pytest.raises(ValueError, match=r"parents must be -1 or, depth first, .* got parents\[\d+\] = -?\d+"):
            call(torch.tensor(parents))


def test_the_backward_refuses_numbers_of_no_forest_on_the_cpu():
    """What it reads of them are places in memory."""
    ops = torch.ops.packops
    q, k = torch.randn(12, 4, 8), torch.randn(12, 2, 8)
    cu_seqlens, parents = torch.tensor([0, 3, 9, 11]), torch.tensor([-1, 0, 0])
    out, lse, tiles, forest = ops._attention(q, k, k, cu_seqlens, parents)
    others = [torch.full_like(forest, number) for number in (2**31 - 1, -(2**31))]
    for place in range(len(forest)):
        others.append(forest.clone())
        others[-1][place] += 1
    for other in (*others, forest[:-1]):
        with pytest.raises(ValueError, match=r"packops\.attention: (forest must be that of the forward pass|parents must be)"):
            ops._attention_backward(out, q, k, k, out, lse, tiles, other, cu_seqlens)
    ops._attention_backward(out, q, k, k, out, lse, tiles, forest, cu_seqlens)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 900])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 96])
def test_a_graph_is_replayed_on_other_trees(head_dim, window):
    """Which prefixes are long, and what continues them, is decided on the device at every replay."""
    trees = [
        ([0, 3000, 3800, 4500, 4501, 6000, 6200], [-1, 0, 0, -1, -1, -1]),
        ([0, 100, 2600, 2700, 5000, 5900, 6000], [-1, -1, 1, 2, 1, -1]),
        ([0, 2500, 2600, 2700, 2800, 2900, 6400], [-1, 0, 1, 2, 3, 0]),
        ([0, 1, 2, 3, 4, 5, 6400], [-1, 0, 0, 0, 0, -1]),
    ]
    q, k, v, grad = tensors(torch.device("cuda"), *((6400, heads, head_dim) for heads in (4, 2, 2, 4)))
    cu_seqlens, parents = (torch.tensor(numbers, dtype=torch.int32, device="cuda") for numbers in trees[0])

    def step():
        out = packops.attention(q, k, v, cu_seqlens, parents, window=window)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), grad.detach())

    graph, captured = capture(step)
    for numbers in (*trees[1:], trees[0]):
        cu_seqlens.copy_(torch.tensor(numbers[0]))
        parents.copy_(torch.tensor(numbers[1]))
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(captured, step(), strict=True))


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    q, k, v = tensors(torch.device("cuda"), (510, 4, 64), (510, 2, 64), (510, 2, 64))
    cu_seqlens, parents = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (SEGMENTS, PARENTS))
    torch.cuda.set_sync_debug_mode("error")
    try:
        packops.packed_metadata(cu_seqlens, 510, parents)
        packops.attention(q, k, v, cu_seqlens, parents).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_columns_of_a_forest_keep_their_kind():
    documents, columns = [np.arange(5), np.arange(4)], {"x": [np.array([0.5, 0.25, 1.5, 2, 3]), np.array([0.5, 0.25, 1.5, 2])]}
    forest = packops.PackedForest.from_documents(documents, columns=columns)
    assert forest.unpack(forest.columns["x"])[0].tolist() == [0.5, 0.25, 1.5, 2, 3]
    assert forest.columns["x"].dtype == torch.float32


def test_a_document_whose_weights_add_up_to_0_counts_as_in_a_flat_row():
    """Advantages of either sign: their mean is of no document, and its loss 0."""
    torch.manual_seed(0)
    documents = [
        {"input_ids": [1, 2, 3], "token_weight": [1.0, -1.0, 0.0]},
        {"input_ids": [1, 2, 4], "token_weight": [1.0, 1.0, 1.0]},
    ]
    logits, options = torch.randn(5, 5), {"columns": {"token_weight": 0.0}}
    flat = packops.PackingCollator(**options)(documents)
    want = packops.cross_entropy(
        logits[flat.input_ids],
        flat.labels,
        cu_seqlens=flat.cu_seqlens,
        shift=True,
        token_weight=flat.columns["token_weight"],
        reduction="seq-mean-token-mean",
    )
    forest = packops.PackingCollator(share_prefixes=True, min_shared=1, reduction="seq-mean-token-mean", **options)(documents)
    loss = packops.cross_entropy(
        logits[forest.input_ids], forest.shift_labels, token_weight=forest.token_weight, num_items=forest.denominator
    )
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"labels": [[1, 2], [1, 2, 4]]}, ValueError, r"labels of document 0 must have one entry per token \(3\), got \(2,\)"),
        ({"labels": [[1, 2, 3], [1, 2.5, 4]]}, TypeError, "labels of document 1 must be a sequence of integers, got"),
        ({"columns": {"x": [[7], [7]]}}, ValueError, r"x of document 0 must have one entry per token \(3\), got \(1,\)"),
        ({"length": 9.0}, TypeError, "length must be an int on the host or None, got a float, 9.0"),
        ({"columns": [[7, 7, 7]]}, TypeError, "columns must be a mapping or None, got a list"),
        ({"columns": {"x": [[7, 7, 7]]}}, ValueError, r"x must have one array per document \(2\), got 1"),
        ({"forest": packops.prefix_forest([[1], [1, 2, 4]])}, ValueError, "input_ids of document 0 must have one entry"),
    ],
)
def test_what_makes_no_forest_is_named(options, error, message):
    """A single number would be spread over the document, and a label cut to an integer."""
    with pytest.raises(error, match=message):
        packops.PackedForest.from_documents([[1, 2, 3], [1, 2, 4]], **options)
