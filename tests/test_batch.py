"""PackedBatch and PackingCollator: what a model, its attention and its loss are handed."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import packops
from packops import PackedBatch, PackingCollator, max_docs_for_flash_attention
from packops.data.documents import length_of, slice_document

DOCUMENTS = [[11, 12, 13], [21], [31, 32, 33, 34]]


def test_by_hand():
    batch = PackingCollator(pad_token_id=9, pad_to_multiple_of=6, shift_labels=True)(DOCUMENTS)
    n = -100
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 31, 32, 33, 34, 9, 9, 9, 9]]
    assert batch.labels.tolist() == [[n, 12, 13, n, n, 32, 33, 34, n, n, n, n]]
    assert batch.shift_labels.tolist() == [[12, 13, n, n, 32, 33, 34, n, n, n, n, n]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.seq_idx.tolist() == [[0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3]]
    assert batch.cu_seqlens.tolist() == list(batch.boundaries) == [0, 3, 4, 8, 12]
    assert (batch.cu_seqlens.dtype, batch.seq_idx.dtype, batch.input_ids.dtype) == (torch.int32, torch.int32, torch.int64)
    assert (batch.max_seqlen, batch.num_items, batch.num_valid, batch.num_sequences) == (4, 5, 5, 2)
    assert (batch.num_documents, batch.lengths, batch.num_tokens) == (3, (3, 1, 4), 12)
    assert repr(batch) == "PackedBatch(3 documents, 12 tokens (4 padding), 5 scored, longest 4, on cpu)"


def test_labels_and_masks_are_kept():
    documents = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
        {"input_ids": [5, 6, 7], "completion_mask": [1, 0, 1]},
        {"input_ids": [8, 9], "assistant_masks": [0, 1], "labels": None},
    ]
    batch = PackingCollator()(documents)
    n = -100
    assert batch.labels.tolist() == [[n, n, 3, 4, n, n, 7, n, 9]]
    assert (batch.num_items, batch.num_sequences) == (4, 3)
    assert PackingCollator(ignore_index=-1)(documents[1:]).labels.tolist() == [[-1, -1, 7, -1, 9]]


def test_a_document_without_a_scored_token_is_no_sequence():
    batch = PackingCollator()([{"input_ids": [1, 2, 3], "completion_mask": [1, 0, 0]}, [4, 5]])
    assert (batch.num_items, batch.num_sequences, batch.num_documents) == (1, 1, 2)


def test_padding_inside_documents():
    batch = PackingCollator(pad_doc_to_multiple_of=4, pad_token_id=9)([[1, 2, 3, 4, 5], [6, 7]])
    n = -100
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 9, 9, 9, 6, 7, 9, 9]]
    assert batch.labels.tolist() == [[n, 2, 3, 4, 5, n, n, n, n, 7, n, n]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]]
    assert batch.boundaries == (0, 8, 12)
    assert [part.tolist() for part in batch.unpack(batch.input_ids)] == [[1, 2, 3, 4, 5], [6, 7]]


def test_static_shapes():
    collate = PackingCollator(pad_to_length=16, num_documents=6)
    shapes = set()
    for documents in ([[1] * 16], DOCUMENTS, [[1], [2], [3], [4], [5]]):
        batch = collate(documents)
        shapes.add((batch.input_ids.shape, batch.cu_seqlens.shape))
        assert batch.cu_seqlens[-1] == 16
        assert batch.num_documents == len(documents)
    assert shapes == {(torch.Size([1, 16]), torch.Size([7]))}
    with pytest.raises(ValueError, match="the documents have 17 tokens, more than pad_to_length = 16"):
        collate([[1] * 17])
    with pytest.raises(ValueError, match=r"7 documents \(padding is one\) do not fit a cu_seqlens for 6"):
        collate([[1]] * 6)


def test_nothing_to_collate():
    batch = PackingCollator(pad_to_multiple_of=4)([])
    assert batch.input_ids.shape == (1, 4)
    assert (batch.num_items, batch.num_sequences, batch.num_documents) == (0, 0, 0)
    assert (batch.labels == -100).all()
    assert batch.unpack(batch.input_ids) == []
    with_empty = PackingCollator()([[], [1, 2], []])
    assert with_empty.boundaries == (0, 2)


def test_columns():
    documents = [{"input_ids": [1, 2], "w": [0.5, 1.0]}, {"input_ids": [3], "w": [2]}]
    batch = PackingCollator(columns={"w": 0.0}, pad_to_multiple_of=4)(documents)
    assert batch.columns["w"].tolist() == [[0.5, 1.0, 2.0, 0.0]]
    assert batch.columns["w"].dtype == torch.float32
    with pytest.raises(KeyError, match="document 1 has no column 'w'"):
        PackingCollator(columns={"w": 0.0})([documents[0], {"input_ids": [3]}])


def test_tensors_and_arrays_are_documents_too():
    expected = PackingCollator()(DOCUMENTS)
    for kind in (torch.tensor, np.array, tuple):
        batch = PackingCollator()([{"input_ids": kind(ids)} for ids in DOCUMENTS])
        assert torch.equal(batch.input_ids, expected.input_ids)
        assert torch.equal(batch.labels, expected.labels)


@given(st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=8), st.integers(1, 7), st.sampled_from([1, 2, 4]))
def test_unpack_is_the_inverse(documents, multiple, doc_multiple):
    collate = PackingCollator(pad_to_multiple_of=multiple, pad_doc_to_multiple_of=doc_multiple)
    batch = collate(documents)
    assert batch.num_tokens % multiple == 0
    assert not (batch.cu_seqlens % doc_multiple).any()  # the row's padding is a document as well
    assert [part.tolist() for part in batch.unpack(batch.input_ids)] == [d for d in documents if d]
    assert [part.shape for part in batch.unpack(torch.zeros(batch.num_tokens, 3))] == [(len(d), 3) for d in documents if d]
    assert batch.num_items == sum(max(0, len(d) - 1) for d in documents)
    assert batch.num_items == int((batch.labels != -100).sum())


def test_unpack_wants_this_rows_values():
    with pytest.raises(ValueError, match=r"values must have shape \(1, 8, ...\) or \(8, ...\), got \(1, 7\)"):
        PackingCollator()(DOCUMENTS).unpack(torch.zeros(1, 7))


# ---- other ways to come by one ---------------------------------------------------------------------------------------------


def same(a: PackedBatch, b: PackedBatch):
    for name in ("input_ids", "labels", "position_ids", "cu_seqlens", "seq_idx"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ("max_seqlen", "num_items", "num_valid", "num_sequences", "boundaries", "lengths"):
        assert getattr(a, name) == getattr(b, name), name


def test_other_constructors(device):
    expected = PackingCollator()(DOCUMENTS).to(device)
    ids = torch.tensor(list(itertools.chain(*DOCUMENTS)), device=device)
    same(PackedBatch.from_cu_seqlens(ids, torch.tensor([0, 3, 4, 8], device=device)), expected)
    same(PackedBatch.from_cu_seqlens(ids[None], torch.tensor([0, 3, 4, 8]), labels=ids[None]), expected)
    same(PackedBatch.from_position_ids(ids, expected.position_ids), expected)
    left = torch.tensor([[0, 11, 12, 13], [0, 0, 0, 21], [31, 32, 33, 34]], device=device)
    right = torch.tensor([[11, 12, 13, 0], [21, 0, 0, 0], [31, 32, 33, 34]], device=device)
    same(PackedBatch.from_padded(left, left > 0), expected)
    same(PackedBatch.from_padded(right, (right > 0).long()), expected)


def test_tokens_past_the_last_boundary_are_padding():
    padded = PackingCollator(pad_to_length=10, pad_token_id=7)(DOCUMENTS)
    same(PackedBatch.from_cu_seqlens(padded.input_ids, torch.tensor([0, 3, 4, 8])), padded)
    padded = PackingCollator(pad_to_length=10, ignore_index=-7)(DOCUMENTS)
    same(PackedBatch.from_cu_seqlens(padded.input_ids, torch.tensor([0, 3, 4, 8]), ignore_index=-7), padded)


def test_positions_that_do_not_start_at_zero():
    """[[3, 4, 5, 0, 1]]: transformers' two detectors disagree here; a document begins wherever positions do not go up by one."""
    batch = PackedBatch.from_position_ids(torch.arange(7), torch.tensor([3, 4, 5, 0, 1, 1, 2]))
    assert batch.boundaries == (0, 3, 5, 7)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1]]


def test_bad_rows():
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to at most the 4 tokens, got \[0, 5\]"):
        PackedBatch.from_cu_seqlens(torch.arange(4), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"input_ids must be one packed row, \(T,\) or \(1, T\), got \(2, 4\)"):
        PackedBatch.from_cu_seqlens(torch.zeros(2, 4), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"share one shape \(batch, length\), got \(2, 4\) and \(2, 3\)"):
        PackedBatch.from_padded(torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(TypeError, match="input_ids of document 1 must be a sequence of integers"):
        PackingCollator()([[1], [0.5]])
    with pytest.raises(ValueError, match=r"labels of document 0 must have one entry per token \(2\), got shape \(3,\)"):
        PackingCollator()([{"input_ids": [1, 2], "labels": [1, 2, 3]}])
    with pytest.raises(ValueError, match="names must be 'packops' or 'hf', got 'trl'"):
        PackingCollator(names="trl")


# ---- masks -----------------------------------------------------------------------------------------------------------------


def mask_by_hand(boundaries):
    total = boundaries[-1]
    mask = torch.zeros(total, total, dtype=torch.bool)
    for begin, end in itertools.pairwise(boundaries):
        mask[begin:end, begin:end] = torch.ones(end - begin, end - begin).tril().bool()
    return mask


def test_attention_masks(device):
    batch = PackingCollator(pad_to_multiple_of=6)(DOCUMENTS).to(device)
    expected = mask_by_hand(batch.boundaries)
    mask = batch.attention_mask("4d")
    assert mask.shape == (1, 1, 12, 12)
    assert torch.equal(mask[0, 0].cpu(), expected)
    additive = batch.attention_mask("4d", dtype=torch.bfloat16)
    assert torch.equal(additive[0, 0].cpu() == 0, expected)
    assert additive.min() == torch.finfo(torch.bfloat16).min
    blocks = batch.block_mask()
    index = torch.arange(12, device=device)
    from_blocks = blocks.mask_mod(0, 0, index[:, None], index[None, :])
    assert torch.equal(from_blocks.cpu(), expected)
    assert blocks.shape == (1, 1, 12, 12)
    with pytest.raises(ValueError, match="kind must be '4d', got '2d'"):
        batch.attention_mask("2d")


@pytest.mark.parametrize("own, options", [("labels", {}), ("parents", {"share_prefixes": True, "min_shared": 1})])
def test_moving(device, own, options):
    """All of it, to any device; to that of the CPU nothing would have to move."""
    collate = PackingCollator(shift_labels=True, pad_to_length=5, columns={"w": 0.0}, **options)
    batch = collate([{"input_ids": [1, 2], "w": [1.0, 2.0]}, {"input_ids": [1, 3], "w": [1.0, 2.0]}])
    for target in (device, torch.device("meta")):
        moved = batch.to(target, non_blocking=True)
        found = {field.name: getattr(moved, field.name) for field in dataclasses.fields(moved)} | moved.columns
        tensors = {name: x for name, x in found.items() if isinstance(x, torch.Tensor)}
        assert tensors.keys() >= {"input_ids", "cu_seqlens", "seq_idx", "shift_labels", "real_tokens", "w", own}
        assert {x.device.type for x in tensors.values()} == {target.type}
        assert moved.num_items == batch.num_items
    assert batch.input_ids.device.type == "cpu"


@pytest.mark.gpu
def test_pinning():
    batch = PackingCollator()([[1, 2]]).pin_memory()
    assert batch.input_ids.is_pinned()
    assert batch.cu_seqlens.is_pinned()


# ---- Hugging Face's names, FlashAttention's bound --------------------------------------------------------------------------


def test_names_of_hugging_face():
    batch = PackingCollator(shift_labels=True)(DOCUMENTS)
    inputs = PackingCollator(names="hf", shift_labels=True)(DOCUMENTS)
    assert torch.equal(inputs["cu_seq_lens_q"], batch.cu_seqlens)
    assert torch.equal(inputs["cu_seq_lens_k"], batch.cu_seqlens)
    assert inputs["max_length_q"] == inputs["max_length_k"] == 4
    assert inputs["use_cache"] is False
    assert "attention_mask" not in inputs
    assert torch.equal(inputs["shift_labels"], batch.shift_labels)
    assert torch.equal(batch.to_hf(seq_idx=True)["seq_idx"], batch.seq_idx)


@pytest.mark.parametrize("num_heads, head_dim, tokens", [(32, 128, 32768), (64, 128, 32768), (48, 80, 8192)])
def test_flash_attention_bound(num_heads, head_dim, tokens):
    most = max_docs_for_flash_attention(tokens, num_heads, head_dim)
    rounded = {128: 128, 80: 96}[head_dim]
    assert (tokens + 128 * most) * num_heads * rounded < 2**31 <= (tokens + 128 * (most + 1)) * num_heads * rounded
    assert max_docs_for_flash_attention(10**7, 64, 128) == 0


def test_rows_of_very_many_documents():
    documents = [[1, 2]] * 2100
    with pytest.warns(UserWarning, match="2100 documents and 4200 tokens overflows .* max_docs_per_pack=2015"):
        PackingCollator()(documents)
    with pytest.raises(ValueError, match="overflows FlashAttention-2's backward in a model with 128 heads of 128"):
        PackingCollator(attention_shape=(128, 128))(documents)
    PackingCollator(attention_shape=(16, 64))(documents)


def test_real_tokens():
    """Which tokens are padding, at the end of the row and of documents; None where none is."""
    documents = [[1, 2, 3], [4], [5, 6]]
    assert PackingCollator()(documents).real_tokens is None
    assert "real_tokens" not in PackingCollator(names="hf")(documents)
    batch = PackingCollator(pad_to_length=12, pad_doc_to_multiple_of=2, num_documents=6)(documents)
    assert batch.real_tokens.tolist() == [[True, True, True, False, True, False, True, True, False, False, False, False]]
    assert torch.equal(batch.to_hf()["real_tokens"], batch.real_tokens)
    assert not PackingCollator(pad_to_length=5)([]).real_tokens.any()


def test_images_are_refused():
    with pytest.raises(ValueError, match="document 1 holds pixel_values, image_grid_thw: PackingCollator packs text"):
        PackingCollator()([[1, 2], {"input_ids": [3], "pixel_values": torch.zeros(1), "image_grid_thw": [[1, 2, 2]]}])
    PackingCollator()([{"input_ids": [3, 4], "pixel_values": None}])


def test_a_mask_beside_labels_masks_labels():
    """Labels that differ from the ids stay what they are where the mask scores them."""
    document = {
        "input_ids": [5, 6, 7, 8],
        "labels": [50, 60, -9, 80],
        "completion_mask": [0, 1, 1, 1],
        "assistant_masks": [1, 1, 1, 0],
    }
    batch = PackingCollator(ignore_index=-9)([document])
    assert batch.labels.flatten().tolist() == [-9, 60, -9, -9]
    assert batch.num_items == 1


@pytest.mark.parametrize("share_prefixes", [False, True])
def test_labels_that_are_masked_by_another_number_are_refused(share_prefixes):
    """transformers leaves out -100, so the loss would be divided by labels that are counted here and not scored there."""
    document = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    with pytest.raises(ValueError, match="must be token ids or ignore_index = -1, got -100"):
        PackingCollator(ignore_index=-1, share_prefixes=share_prefixes)([document])
    PackingCollator(share_prefixes=share_prefixes)([document])


def test_padding_has_the_ignore_index_that_was_asked_for():
    batch = PackingCollator(ignore_index=-7, pad_to_multiple_of=4, pad_doc_to_multiple_of=2)([[1, 2, 3], [4, 5]])
    assert batch.labels.flatten().tolist() == [-7, 2, 3, -7, -7, 5, -7, -7]
    assert batch.num_items == 3


def test_the_padding_is_a_document_for_flash_attention():
    """At the limit: three documents fit, three and a row's padding do not."""
    shape = (157903, 32)
    assert max_docs_for_flash_attention(40, *shape) == 3
    collate = PackingCollator(pad_to_length=40, attention_shape=shape)
    assert len(collate([[1] * 20, [2] * 10, [3] * 10]).cu_seqlens) == 4
    with pytest.raises(ValueError, match="4 documents and 40 tokens"):
        collate([[1] * 20, [2] * 10, [3] * 9])


# ---- token ids of any integer type, padding that documents bring along, masks of every kind -----------------------------------

UNSIGNED = [np.uint8, np.uint16, np.uint32, np.uint64]


@pytest.mark.parametrize("dtype", [*UNSIGNED, np.int8, np.int16, np.int32], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("mask", ["completion_mask", "assistant_masks"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 255])
def test_any_integer_type_holds_the_ignore_index(dtype, mask, ignore_index):
    n = ignore_index
    document = {"input_ids": np.array([5, 6, 7], dtype), mask: [0, 0, 1]}
    batch = PackingCollator(ignore_index=n)([document, {**document, "labels": np.array([5, 6, 7], dtype)}])
    assert batch.labels.tolist() == [[n, n, 7, n, n, 7]]
    assert (batch.labels.dtype, batch.num_items) == (torch.int64, 2)


@pytest.mark.parametrize("name", ["labels", "position_ids", "attention_mask", "cu_seq_lens_q", "seq_idx"])
def test_a_column_takes_no_place_of_the_batch(name):
    """Labels among the columns were scored at every document's first token; an attention_mask let documents see each other."""
    document = {"input_ids": [5, 6, 7], name: [1, 1, 1]}
    with pytest.raises(ValueError, match=f"columns must not hold {name!r}: that is made from the documents"):
        PackingCollator(columns={name: 0}, names="hf")([document])
    with pytest.raises(ValueError, match=f"columns must not hold {name!r}"):
        PackedBatch.build(torch.arange(3), torch.arange(3), [0, 3], columns={name: torch.ones(3)})


@pytest.mark.parametrize("name", ["completion_mask", "assistant_masks"])
def test_a_mask_says_yes_or_no(name):
    """One that is added to the scores has 0 where a token counts: taken for a truth value, it scored the opposite."""
    for mask in ([0.0, -math.inf, 0.0], [0, -1, 1], [0, 2, 1], [0.0, 0.5, 1.0], ["", "a", "a"]):
        with pytest.raises(ValueError, match=rf"^{name} of document 1 must be 1 for tokens that are scored and 0 for others"):
            PackingCollator()([[1, 2], {"input_ids": [5, 6, 7], name: mask}])
    for mask in ([0, 0, 1], [0.0, 0.0, 1.0], [False, False, True]):
        assert PackingCollator()([{"input_ids": [5, 6, 7], name: mask}]).labels.tolist() == [[-100, -100, 7]]
    assert PackingCollator()([{"input_ids": [], name: []}]).num_items == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32])
def test_rows_of_any_integer_type(dtype):
    n = -100
    ids = torch.tensor([5, 6, 7, 8, 9]).to(dtype)
    batches = [
        PackedBatch.from_cu_seqlens(ids, torch.tensor([0, 3])),
        PackedBatch.from_cu_seqlens(ids.long(), torch.tensor([0, 3]), labels=ids),
        PackedBatch.build(ids, torch.tensor([5, 6, 7, n, n]), [0, 3, 5], lengths=[3]),
    ]
    for batch in batches:
        assert batch.labels.tolist() == [[n, 6, 7, n, n]]
        assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
        assert (batch.input_ids.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    padded = PackedBatch.from_padded(ids[None], torch.tensor([[1, 1, 1, 0, 0]]))
    assert padded.labels.tolist() == [[n, 6, 7]]


def test_ids_that_are_no_integers_are_refused():
    with pytest.raises(TypeError, match=r"input_ids must be integers, got torch.float32"):
        PackedBatch.from_cu_seqlens(torch.ones(3), torch.tensor([0, 3]), labels=torch.arange(3))
    with pytest.raises(TypeError, match=r"labels must be integers, got torch.bool"):
        PackedBatch.from_cu_seqlens(torch.arange(3), torch.tensor([0, 3]), labels=torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"position_ids must be integers, got torch.float32"):
        PackedBatch.from_position_ids(torch.arange(3), torch.arange(3.0))
    with pytest.raises(ValueError, match="input_ids of document 0 must fit int64, got 18446744073709551615"):
        PackingCollator()([np.array([2**64 - 1], np.uint64)])


PADDED = {"input_ids": [0, 0, 5, 6, 7, 0], "attention_mask": [0, 0, 1, 1, 1, 0]}


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda mask: np.array(mask, bool)])
def test_padding_that_a_document_brings_along_is_cut_off(kind):
    more = {"labels": np.array([0, 0, -100, 6, 7, 0]), "completion_mask": kind([1, 1, 1, 0, 1, 1]), "w": [9, 9, 1, 2, 3, 9]}
    documents = [
        {**PADDED, "attention_mask": kind(PADDED["attention_mask"])},
        {"input_ids": [8, 9], "attention_mask": kind([1, 1])},
        {"input_ids": [3, 4], "attention_mask": kind([0, 0])},
        {"input_ids": [3, 4], "attention_mask": None},
    ]
    batch = PackingCollator(pad_to_length=9, pad_token_id=1)(documents)
    n = -100
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 3, 4, 1, 1]]
    assert batch.labels.tolist() == [[n, 6, 7, n, 9, n, 4, n, n]]
    assert (batch.lengths, batch.num_items) == ((3, 2, 2), 4)
    documents[0] |= more
    batch = PackingCollator(columns={"w": 0})(documents[:1])
    assert batch.labels.tolist() == [[n, n, 7]]
    assert batch.columns["w"].tolist() == [[1, 2, 3]]
    assert length_of(documents[0]) == 3
    assert slice_document(documents[0], 1, 2)["w"] == [2, 3]


def test_ragged_columns_are_cut_where_they_have_an_entry_per_token():
    document = {**PADDED, "spans": [[0, 1], [2]], "ragged": [[], [1], [2, 3], [4], [], [5]]}
    assert PackingCollator()([document]).input_ids.tolist() == [[5, 6, 7]]
    assert slice_document(document, 1, 2) == {
        "input_ids": [6, 7],
        "attention_mask": [1, 1],
        "spans": [[0, 1], [2]],
        "ragged": [[4], []],
    }


@pytest.mark.parametrize(
    "mask, error, message",
    [
        ([1, 0, 1], ValueError, "attention_mask of document 1 must be 1 for its tokens, which lie together"),
        ([1, 1, 2], ValueError, "documents of a packed row one by one"),
        ([0, -1, 1], ValueError, "must be 1 for its tokens"),
        ([1, 1], ValueError, r"must have one entry per token \(3\), got shape \(2,\)"),
        ([0.0, 0.0, -1e4], TypeError, "must be bool or integers .* got float64"),
    ],
)
def test_masks_of_documents_that_say_something_else_are_refused(mask, error, message):
    with pytest.raises(error, match=message):
        PackingCollator()([[1], {"input_ids": [5, 6, 7], "attention_mask": mask}])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_masks_that_number_documents(dtype, device):
    ids = torch.arange(10, 22, device=device).view(2, 6)
    mask = torch.tensor([[1, 1, 1, 2, 2, 0], [0, 4, 0, 3, 3, 3]], dtype=dtype, device=device)
    n = -100
    batch = PackedBatch.from_padded(ids, mask)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14, 17, 19, 20, 21]]
    assert batch.labels.tolist() == [[n, 11, 12, n, 14, n, n, 20, 21]]
    assert (batch.boundaries, batch.num_items) == ((0, 3, 5, 6, 9), 5)
    # Rows end documents, although their numbers go on.
    assert PackedBatch.from_padded(ids, torch.ones_like(mask)).boundaries == (0, 6, 12)
    assert PackedBatch.from_padded(ids[:, :0], mask[:, :0]).boundaries == (0,)


@pytest.mark.parametrize(
    "mask, error, message",
    [
        ([[1, 1, 0, 1]], ValueError, r"attention_mask of row 0 interrupts a document: .* got \[1, 1, 0, 1\]"),
        ([[1, 2, 1, 0]], ValueError, "interrupts a document"),
        ([[1, -1, 1, 0]], ValueError, "must not be negative, got -1"),
        ([[0.0, 0.0, 0.0, -1e4]], TypeError, "attention_mask must be bool or integers .* got torch.float32"),
    ],
)
def test_masks_that_do_not_tell_documents_apart_are_refused(mask, error, message):
    with pytest.raises(error, match=message):
        PackedBatch.from_padded(torch.arange(4)[None], torch.tensor(mask))


def test_everything_has_one_entry_per_token():
    ids, bounds = torch.arange(4), torch.tensor([0, 4])
    for labels in (torch.arange(3), torch.arange(5)):
        with pytest.raises(ValueError, match=r"labels must have one entry per token \(4\), got shape"):
            PackedBatch.from_cu_seqlens(ids, bounds, labels=labels)
        with pytest.raises(ValueError, match=r"labels must have one entry per token \(4\), got shape"):
            PackedBatch.from_position_ids(ids, torch.arange(4), labels=labels)
        with pytest.raises(ValueError, match=r"position_ids must have one entry per token \(4\), got shape"):
            PackedBatch.from_position_ids(ids, labels)
        with pytest.raises(ValueError, match=r"labels must have the shape of input_ids, \(1, 4\), got"):
            PackedBatch.from_padded(ids[None], torch.ones(1, 4, dtype=torch.int64), labels=labels[None])
        with pytest.raises(ValueError, match=r"w must have one entry per token \(4\), got shape"):
            PackedBatch.build(ids, ids, [0, 4], columns={"w": labels})
    for boundaries in ([0, 3], [1, 4], [0, 3, 2, 4], []):
        with pytest.raises(ValueError, match="boundaries must rise from 0 to the 4 tokens"):
            PackedBatch.build(ids, ids, boundaries)
    with pytest.raises(ValueError, match=r"lengths must fit the documents between the boundaries, \[4\], got \[5\]"):
        PackedBatch.build(ids, ids, [0, 4], lengths=[5])


@pytest.mark.parametrize(
    "values, fill, expected, dtype",
    [
        ([[1, 2], [3]], 0.5, [1, 2, 3, 0.5], torch.float32),
        ([[1, 2], [3]], 0.0, [1, 2, 3, 0], torch.int64),
        ([[1, 2.5], [3]], 7, [1, 2.5, 3, 7], torch.float32),
        ([[True, False], [True]], -1, [1, 0, 1, -1], torch.int16),
        ([np.array([200, 1], np.uint8), np.array([3], np.uint8)], -1, [200, 1, 3, -1], torch.int16),
        ([np.array([200, 1], np.uint8), np.array([-3], np.int8)], 0, [200, 1, -3, 0], torch.int16),
        ([[2**40, 1], [3]], -(2**41), [2**40, 1, 3, -(2**41)], torch.int64),
        ([[1, 2], [3]], float("nan"), [1, 2, 3, float("nan")], torch.float32),
    ],
)
def test_a_columns_type_holds_values_and_padding(values, fill, expected, dtype):
    documents = [{"input_ids": list(range(len(w))), "w": w} for w in values]
    column = PackingCollator(columns={"w": fill}, pad_to_length=4)(documents).columns["w"]
    np.testing.assert_array_equal(column[0].numpy(), expected)
    assert column.dtype == dtype or (dtype == torch.int16 and column.dtype in (torch.int8, torch.int16))


def test_columns_that_no_type_holds_are_refused():
    far = {"input_ids": [1, 2], "w": [2**24 + 1, 0]}
    with pytest.raises(ValueError, match="column 'w' holds floats and integers that float32 cannot hold"):
        PackingCollator(columns={"w": 0.5})([far])
    with pytest.raises(ValueError, match="column 'w' holds floats and integers that float32 cannot hold"):
        PackingCollator(columns={"w": 0})([far, {"input_ids": [1], "w": [0.5]}])
    with pytest.raises(TypeError, match="column 'w' must hold numbers or bool"):
        PackingCollator(columns={"w": 0})([{"input_ids": [1], "w": ["a"]}])


def test_torch_load_takes_a_saved_batch(tmp_path):
    collate = PackingCollator(pad_to_length=9, shift_labels=True, columns={"w": 0.0})
    batch = collate([{"input_ids": [1, 2, 3], "w": [1.0, 2.0, 3.0]}, {"input_ids": [4, 5], "w": [4.0, 5.0]}])
    torch.save({"batch": batch, "inputs": batch.to_hf()}, tmp_path / "batch.pt")
    loaded = torch.load(tmp_path / "batch.pt", weights_only=True)["batch"]
    same(loaded, batch)
    assert torch.equal(loaded.columns["w"], batch.columns["w"])
    assert torch.equal(loaded.shift_labels, batch.shift_labels)
    assert torch.equal(loaded.real_tokens, batch.real_tokens)


def test_torch_load_takes_a_saved_forest(tmp_path):
    forest = PackingCollator(share_prefixes=True, min_shared=1)([[1, 2, 3], [1, 2, 4]])
    torch.save(forest, tmp_path / "forest.pt")
    loaded = torch.load(tmp_path / "forest.pt", weights_only=True)
    assert torch.equal(loaded.parents, forest.parents)
    assert (repr(loaded), loaded.denominator) == (repr(forest), forest.denominator)


def test_callers_tensors_and_arrays_are_not_written():
    """Nor is what a batch holds memory of theirs that they may go on to change."""
    ids, labels = torch.arange(6), torch.tensor([9, 1, 2, 3, 4, 5])
    bounds = torch.tensor([0, 2, 4])
    batch = PackedBatch.from_cu_seqlens(ids, bounds, labels=labels)
    assert labels.tolist() == [9, 1, 2, 3, 4, 5]
    assert ids.tolist() == list(range(6))
    assert batch.labels.tolist() == [[-100, 1, -100, 3, -100, -100]]
    document = {"input_ids": np.arange(3), "labels": np.arange(3), "completion_mask": np.array([0, 1, 1])}
    for array in document.values():
        array.flags.writeable = False
    batch = PackingCollator(pad_doc_to_multiple_of=2)([document, document["input_ids"]])
    batch.input_ids.fill_(7)
    batch.labels.fill_(7)
    assert document["input_ids"].tolist() == [0, 1, 2]


# ---- exact boundaries -----------------------------------------------------------------------------------------------------


def test_documents_and_padding_at_the_limit_of_cu_seqlens():
    """The padding is a document of its own: with it one document less fits."""
    full = PackingCollator(pad_to_length=6, num_documents=3)
    assert full([[1, 2]] * 3).boundaries == (0, 2, 4, 6)
    assert full([[1, 2], [3, 4], [5]][:2]).boundaries == (0, 2, 4, 6)
    with pytest.raises(ValueError, match=r"4 documents \(padding is one\) do not fit a cu_seqlens for 3"):
        full([[1, 2], [3, 4], [5]])
    assert PackingCollator(num_documents=3)([[1], [2], [3]]).cu_seqlens.tolist() == [0, 1, 2, 3]


def test_documents_and_padding_at_the_limit_of_flash_attention():
    heads, dim = 64, 128
    total = (2**31 - 1) // (heads * dim) - 3 * 128  # so that three documents overflow nothing, and four do
    assert max_docs_for_flash_attention(total, heads, dim) == 3
    assert max_docs_for_flash_attention(total + 1, heads, dim) == 2
    tokens = np.ones(total, np.int64)
    collate = PackingCollator(pad_to_length=total, attention_shape=(heads, dim))
    collate(np.array_split(tokens, 3))
    collate([tokens[:10], tokens[:20]])  # padding is the third
    with pytest.raises(ValueError, match="a packed row of 4 documents"):
        collate(np.array_split(tokens, 4))
    with pytest.raises(ValueError, match="a packed row of 4 documents"):
        collate([tokens[:10], tokens[:20], tokens[:30]])


@pytest.mark.parametrize("total, padded", [(7, 8), (8, 8), (9, 16), (0, 8)])
def test_a_row_is_padded_to_the_next_multiple(total, padded):
    batch = PackingCollator(pad_to_multiple_of=8)([[1] * total])
    assert batch.num_tokens == padded
    assert (batch.real_tokens is None) == (total == padded)


def test_pad_to_length_is_reached_and_not_passed():
    collate = PackingCollator(pad_to_length=8, pad_doc_to_multiple_of=4)
    assert collate([[1] * 4, [2]]).boundaries == (0, 4, 8)
    with pytest.raises(ValueError, match="the documents have 12 tokens, more than pad_to_length = 8"):
        collate([[1] * 5, [2]])
    with pytest.raises(ValueError, match="pad_doc_to_multiple_of must divide pad_to_length = 10, got 4"):
        PackingCollator(pad_to_length=10, pad_doc_to_multiple_of=4)


@pytest.mark.parametrize("reduction", ["mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_documents_that_weigh_nothing_are_not_counted(reduction):
    """Over micro-batches the loss is that of one batch, with and without shared prefixes."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 97, (n,), generator=generator) for n in (6, 7, 8, 9)]
    rows = [{"input_ids": d, "token_weight": [w] * len(d)} for d, w in zip(documents, (1.0, 0.0, 1.0, 0.0), strict=True)]
    rows[0]["token_weight"][-1] = 0.0  # of a row that is scored against nothing
    collate = packops.PackingCollator(columns={"token_weight": 0.0})
    logits = torch.randn(30, 97, dtype=torch.float64)

    def loss(batch, logits, num_items=None):
        given = {"cu_seqlens": batch.cu_seqlens, "shift": True, "reduction": reduction, "num_items": num_items}
        return packops.cross_entropy(logits[None], batch.labels, token_weight=batch.columns["token_weight"], **given)

    whole, first, last = collate(rows), collate(rows[:2]), collate(rows[2:])
    assert (whole.num_items, whole.num_valid, whole.num_sequences) == (5 + 7, 5 + 6 + 7 + 8, 2)
    count = packops.loss_normalizer([first, last], reduction=reduction)
    torch.testing.assert_close(loss(first, logits[:13], count) + loss(last, logits[13:], count), loss(whole, logits))
    forest = packops.PackingCollator(columns={"token_weight": 0.0}, share_prefixes=True, reduction=reduction)(rows)
    assert float(packops.loss_normalizer(forest, reduction=reduction)) == float(count)


@pytest.mark.parametrize("share_prefixes", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_weights_of_any_size_add_up_over_micro_batches(reduction, share_prefixes):
    rows = [
        {"input_ids": [1, 2, 3, 4], "token_weight": [0.5, 0.25, 2.0, 9.0]},
        {"input_ids": [1, 2, 5], "token_weight": [3.0, 0.0, 9.0], "labels": [9, 2, 5]},
        {"input_ids": [4, 2, 1], "token_weight": [7.0, 2.0, 9.0], "labels": [4, -100, 1]},
    ]
    options = {"share_prefixes": True, "min_shared": 1, "reduction": reduction} if share_prefixes else {}
    collate = PackingCollator(columns={"token_weight": 5.0}, pad_to_multiple_of=16, **options)
    logits = torch.randn(6, 6, dtype=torch.float64)

    def loss(batch, num_items):
        if share_prefixes:
            given = {"labels": batch.shift_labels, "token_weight": batch.token_weight}
        else:
            given = {"labels": batch.labels, "token_weight": batch.columns["token_weight"], "cu_seqlens": batch.cu_seqlens}
            given |= {"shift": True, "reduction": reduction}
        return packops.cross_entropy(logits[batch.input_ids], num_items=num_items, **given)

    whole, parts = collate(rows), [collate(rows[:1]), collate(rows[1:])]
    count = packops.loss_normalizer(parts, reduction=reduction)
    assert float(count) == {"mean": 2.75 + 3.0 + 2.0}.get(reduction, 3)
    expected = loss(whole, whole.denominator if share_prefixes else None)
    torch.testing.assert_close(sum(loss(part, count) for part in parts), expected)


def test_the_weights_of_a_forest_are_of_one_reduction():
    forest = PackingCollator(share_prefixes=True, reduction="seq-mean-token-mean")(DOCUMENTS)
    with pytest.raises(ValueError, match="are those of reduction 'seq-mean-token-mean', not of 'mean'"):
        packops.loss_normalizer(forest)
    for batch in (forest, PackingCollator()(DOCUMENTS)):
        with pytest.raises(ValueError, match="reduction"):
            batch.denominator_of("none")


@pytest.mark.parametrize("kind", [dict, collections.UserDict])
def test_columns_in_place_of_documents_are_refused(kind):
    """What a tokenizer returns for several texts, and ``dataset[:2]``. The way that the error names is one."""
    batch = kind({"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1]]})
    with pytest.raises(TypeError, match="must be a list of documents, got a mapping of columns") as error:
        PackingCollator()(batch)
    way = re.search(r"(\[dict.*\]) makes", str(error.value))[1]
    assert PackingCollator()(eval(way, {"batch": batch})).lengths == (2, 1)


def test_columns_of_any_tensor():
    """numpy has no bfloat16, and takes nothing that has a gradient."""
    ids, weight = torch.arange(4), torch.tensor([0.5, 0.25, 1.0, 0.0])
    for values in (weight, weight.bfloat16(), weight.double(), weight.clone().requires_grad_()):
        batch = PackingCollator(columns={"weight": 0.0})([{"input_ids": ids, "weight": values}])
        assert torch.equal(batch.columns["weight"][0], weight)


def test_what_a_collator_cannot_make_is_named_at_once():
    with pytest.raises(ValueError, match=r"reduction must be one of 'mean', .*, got 'nope'"):
        PackingCollator(share_prefixes=True, reduction="nope")
    with pytest.raises(ValueError, match="column 'x' holds numbers that float32 cannot hold"):
        PackingCollator(columns={"x": 0.0})([{"input_ids": [1, 2], "x": np.array([1e40, 2.0])}])
    infinite = PackingCollator(columns={"x": 0.0})([{"input_ids": [1, 2], "x": np.array([np.inf, 2.0])}])
    assert infinite.columns["x"].tolist() == [[math.inf, 2.0]]


def test_a_row_has_one_dimension():
    """Two dimensions would be read as a longer row."""
    ids, two = torch.arange(4), torch.zeros(4, 2, dtype=torch.int64)
    for name, arguments in (("input_ids", (two, ids)), ("labels", (ids, two))):
        with pytest.raises(ValueError, match=rf"{name} must have shape \(tokens,\), got \(4, 2\)"):
            PackedBatch.build(*arguments, [0, 4])
    with pytest.raises(ValueError, match=r"lengths must fit the documents .*, \[4\], got \[-1\]"):
        PackedBatch.build(ids, ids, [0, 4], lengths=[-1])
    for column in ([1, 2, 3, 4], np.ones(4)):
        with pytest.raises(TypeError, match="w must be a tensor, got a"):
            PackedBatch.build(ids, ids, [0, 4], columns={"w": column})


@pytest.mark.parametrize("share_prefixes", [False, True])
def test_sums_of_documents_want_one_number_per_token(share_prefixes):
    batch = PackingCollator(share_prefixes=share_prefixes)(DOCUMENTS)
    for shape in ((8, 2), (1, 8, 2)):
        with pytest.raises(ValueError, match=r"values must have one number per token \(8\), got shape"):
            batch.document_sums(torch.ones(shape))
    with pytest.raises(TypeError, match="values must be a tensor, got a list"):
        batch.unpack([0.0] * 8)


def test_rows_of_the_last_document_are_not_those_of_the_padding():
    batch = PackingCollator(pad_to_length=12)(DOCUMENTS)
    assert batch.own_rows(-1).tolist() == batch.own_rows(2).tolist() == [4, 5, 6, 7]
    with pytest.raises(IndexError):
        batch.own_rows(3)


def test_an_attention_mask_is_bool_or_floating_point():
    with pytest.raises(TypeError, match=r"dtype must be floating point, or None for a mask of bools, got torch.int64"):
        PackingCollator()(DOCUMENTS).attention_mask(dtype=torch.int64)


@pytest.mark.parametrize("fill", [None, "x", 2**70, [0.0], 1e300])
def test_what_cannot_pad_a_column_is_refused_before_there_are_documents(fill):
    with pytest.raises((TypeError, ValueError), match="column 'w'"):
        PackingCollator(columns={"w": fill})


def test_a_document_has_no_dimension_for_a_batch():
    """As a tokenizer returns one text with ``return_tensors``."""
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="got shape \\(1, 3\\): documents are handed over one by one"):
        PackingCollator()([{"input_ids": ids, "attention_mask": ids}])


@pytest.mark.parametrize(
    "column, message",
    [
        ({"position_ids": [0, 1, 2, 0, 1]}, "its position_ids do not go up by one"),
        ({"position_ids": torch.tensor([0, 1, 2, 3, 0])}, "its position_ids do not go up by one"),
        ({"seq_lengths": [3, 2]}, "its seq_lengths are of several documents"),
        ({"seq_lengths": torch.tensor([3, 2])}, "its seq_lengths are of several documents"),
        ({"cu_seqlens": [0, 3, 5]}, "its cu_seqlens are of several documents"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 5])}, "its cu_seq_lens_q are of several documents"),
    ],
)
def test_a_packed_row_is_no_document(column, message):
    """Its documents would see each other."""
    with pytest.raises(ValueError, match=f"document 1 is a packed row: {message}"):
        PackingCollator()([[1], {"input_ids": [1, 2, 3, 4, 5], **column}])
    for alone in (
        {"position_ids": [0, 1, 2, 3, 4]},
        {"position_ids": [7, 8, 9, 10, 11]},
        {"seq_lengths": [5]},
        {"seq_lengths": torch.tensor([5])},
        {"cu_seqlens": [0, 5]},
    ):
        assert PackingCollator()([{"input_ids": [1, 2, 3, 4, 5], **alone}]).boundaries == (0, 5)
    padded = {"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1], "position_ids": [1, 1, 0, 1]}
    assert PackingCollator()([padded]).boundaries == (0, 2)


MASKED = np.ma.array([1, 1, 1], mask=[False, True, False])


@pytest.mark.parametrize("share_prefixes", [False, True])
@pytest.mark.parametrize("name", ["input_ids", "labels", "attention_mask", "completion_mask", "token_weight"])
def test_the_mask_of_a_masked_array_is_not_lost(name, share_prefixes):
    """What it masks would be trained on as any other value."""
    collate = PackingCollator(columns={"token_weight": 0.0}, share_prefixes=share_prefixes)
    document = {"input_ids": [1, 1, 1], "token_weight": [1, 1, 1]}
    with pytest.raises(ValueError, match=f"{name} of document 0: a numpy masked array masks some of its values"):
        collate([{**document, name: MASKED}])
    collate([{**document, name: np.ma.array([1, 1, 1])}])  # it masks nothing


def test_the_mask_of_a_masked_array_is_not_lost_elsewhere():
    for call in (
        lambda: packops.pack(MASKED, 10),
        lambda: packops.pack([1, 1, 1], 10).per_pack(MASKED),
        lambda: packops.PackedForest.from_documents([np.ones(3, int)], columns={"token_weight": [MASKED]}),
        lambda: packops.PackedForest.from_documents([MASKED]),
        lambda: packops.StreamPacker(8).add({"input_ids": [1, 1, 1], "attention_mask": MASKED}),
    ):
        with pytest.raises(ValueError, match="a numpy masked array masks some of its values"):
            call()


def test_an_error_of_numpy_names_what_it_is_about():
    with pytest.raises(ValueError, match=r"input_ids of document 1: .*inhomogeneous"):
        PackingCollator()([[1], [[1, 2], [3]]])
    with pytest.raises(RuntimeError, match=r"labels of document 0: .*requires grad"):
        PackingCollator()([{"input_ids": [1], "labels": torch.ones(1, requires_grad=True)}])
    with pytest.raises(TypeError, match=r"input_ids of document 0: .*meta device"):
        PackingCollator()([torch.ones(3, dtype=torch.int64, device="meta")])
