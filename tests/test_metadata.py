"""packed_metadata and packed_labels against the reference, on hand-worked rows, and on what no caller should pass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import packops
from cuda_streams import capture, no_host_sync
from packops import reference

INDEX_DTYPES = [torch.int32, torch.int64]


def boundaries(lengths, device="cpu", dtype=torch.int32):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", INDEX_DTYPES)
def test_metadata_by_hand(device, dtype):
    position_ids, seq_idx = packops.packed_metadata(boundaries([3, 0, 2], device, dtype), 7)
    assert position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert seq_idx.tolist() == [0, 0, 0, 2, 2, -1, -1]
    assert (position_ids.dtype, seq_idx.dtype) == (torch.int64, torch.int32)
    assert position_ids.device.type == seq_idx.device.type == device.type


def test_labels_by_hand(device):
    labels = torch.tensor([10, 11, 12, 20, -100, 22, 9, 9], device=device)
    cu_seqlens = boundaries([3, 0, 3], device)
    target, counts = packops.packed_labels(labels, cu_seqlens)
    assert target.tolist() == [11, 12, -100, -100, 22, -100, -100, -100]
    assert counts.tolist() == [2, 0, 1]
    target, counts = packops.packed_labels(labels, cu_seqlens, shift=False)
    assert target.tolist() == [-100, 11, 12, -100, -100, 22, -100, -100]
    assert counts.tolist() == [2, 0, 1]


LAYOUTS = {
    "one token": ([1], 1),
    "no document, no token": ([], 0),
    "no document, padding only": ([], 5),
    "empty documents only": ([0, 0], 3),
    "leading and trailing empty": ([0, 4, 0, 0], 4),
    "fixed-size cu_seqlens": ([5, 9] + [0] * 61, 20),
    "one long": ([100_003], 100_003),
    "many tiny": ([1] * 3000 + [2] * 1000, 5001),
    "warp borders": ([31, 1, 32, 33, 64, 255, 257], 700),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shift", [True, False])
def test_against_reference(device, name, shift):
    lengths, total = LAYOUTS[name]
    cu_seqlens = boundaries(lengths, device)
    for mine, expected in zip(
        packops.packed_metadata(cu_seqlens, total), reference.packed_metadata(cu_seqlens, total), strict=True
    ):
        assert torch.equal(mine, expected)
    labels = torch.randint(0, 50, (total,), device=device)
    labels[torch.rand(total, device=device) < 0.3] = -7
    mine = packops.packed_labels(labels, cu_seqlens, shift=shift, ignore_index=-7)
    expected = reference.packed_labels(labels, cu_seqlens, shift=shift, ignore_index=-7)
    assert torch.equal(mine[0], expected[0])
    assert torch.equal(mine[1], expected[1])


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(0, 20), st.booleans())
def test_any_layout(lengths, padding, shift):
    total = sum(lengths) + padding
    cu_seqlens = boundaries(lengths, dtype=torch.int64)
    for mine, expected in zip(
        packops.packed_metadata(cu_seqlens, total), reference.packed_metadata(cu_seqlens, total), strict=True
    ):
        assert torch.equal(mine, expected)
    labels = torch.arange(total) % 5 - 1
    mine = packops.packed_labels(labels, cu_seqlens, shift=shift, ignore_index=-1)
    expected = reference.packed_labels(labels, cu_seqlens, shift=shift, ignore_index=-1)
    assert torch.equal(mine[0], expected[0])
    assert torch.equal(mine[1], expected[1])


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
@pytest.mark.parametrize("label_dtype", INDEX_DTYPES)
def test_strided_inputs(device, index_dtype, label_dtype):
    cu_seqlens = boundaries([4, 3, 6], device, index_dtype)
    spaced = cu_seqlens.repeat_interleave(2)[::2]
    labels = torch.arange(30, device=device, dtype=label_dtype).view(15, 2).t()[1]
    assert not spaced.is_contiguous()
    assert not labels.is_contiguous()
    target, counts = packops.packed_labels(labels, spaced)
    expected = reference.packed_labels(labels.clone(), cu_seqlens)
    assert target.dtype == label_dtype
    assert torch.equal(target, expected[0])
    assert torch.equal(counts, expected[1])
    assert torch.equal(packops.packed_metadata(spaced, 15)[0], packops.packed_metadata(cu_seqlens, 15)[0])


def test_labels_keep_the_batch_shape(device):
    labels = torch.arange(12, device=device).view(1, 12)
    target, _ = packops.packed_labels(labels, boundaries([5, 7], device))
    assert target.shape == (1, 12)
    assert target[0, 4] == -100
    assert target[0, 11] == -100
    expanded = torch.tensor([3], device=device).expand(2, 4)  # stride 0
    assert packops.packed_labels(expanded, boundaries([8], device))[0].tolist() == [[3, 3, 3, 3], [3, 3, 3, -100]]


MALFORMED = {
    "does not start at 0": ([1, 4, 8], r"got cu_seqlens\[0\] = 1"),
    "negative": ([-3, 4, 8], r"got cu_seqlens\[0\] = -3"),
    "decreasing": ([0, 6, 4, 8], r"got cu_seqlens\[2\] = 4"),
    "past the end": ([0, 4, 9], r"number of rows \(8\), got cu_seqlens\[2\] = 9"),
    "far outside": ([0, 2**40, -(2**40)], r"got cu_seqlens\[1\] = 1099511627776"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_boundaries(device, name):
    values, message = MALFORMED[name]
    cu_seqlens = torch.tensor(values, dtype=torch.int64, device=device)
    labels = torch.arange(8, device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="packed_metadata: cu_seqlens must .*" + message):
            packops.packed_metadata(cu_seqlens, 8)
        with pytest.raises(ValueError, match="packed_labels: cu_seqlens must .*" + message):
            packops.packed_labels(labels, cu_seqlens)
        return
    position_ids, seq_idx = packops.packed_metadata(cu_seqlens, 8)
    assert ((position_ids >= 0) & (position_ids < 8)).all()
    assert ((seq_idx >= -1) & (seq_idx < len(values) - 1)).all()
    target, counts = packops.packed_labels(labels, cu_seqlens)
    assert ((target == -100) | ((target >= 0) & (target < 8))).all()
    assert ((counts >= 0) & (counts <= 8)).all()
    packops.checks(True)
    try:
        with pytest.raises(ValueError, match="packed_metadata: cu_seqlens must"):
            packops.packed_metadata(cu_seqlens, 8)
        with pytest.raises(ValueError, match="packed_labels: cu_seqlens must"):
            packops.packed_labels(labels, cu_seqlens)
    finally:
        packops.checks(False)


def test_bad_arguments(device):
    cu_seqlens = boundaries([4], device)
    labels = torch.arange(4, device=device)
    with pytest.raises(TypeError, match="cu_seqlens must be int32 or int64, got Float"):
        packops.packed_metadata(cu_seqlens.float(), 4)
    with pytest.raises(TypeError, match="labels must be int32 or int64, got Double"):
        packops.packed_labels(labels.double(), cu_seqlens)
    with pytest.raises(ValueError, match=r"shape \(documents \+ 1,\), got \(1, 2\)"):
        packops.packed_metadata(cu_seqlens[None], 4)
    with pytest.raises(ValueError, match=r"got \(0,\)"):
        packops.packed_metadata(cu_seqlens[:0], 4)
    with pytest.raises(ValueError, match="total_tokens must not be negative, got -1"):
        packops.packed_metadata(cu_seqlens, -1)
    with pytest.raises(ValueError, match="ignore_index must fit the int32 labels"):
        packops.packed_labels(labels.int(), cu_seqlens, ignore_index=2**40)


@pytest.mark.gpu
def test_two_devices_are_refused():
    with pytest.raises((ValueError, RuntimeError), match="device"):
        packops.packed_labels(torch.arange(4, device="cuda"), boundaries([4]))


def test_opcheck(device):
    cu_seqlens = boundaries([3, 0, 4], device)
    torch.library.opcheck(torch.ops.packops.packed_metadata.default, (cu_seqlens, 9))
    labels = torch.arange(18, device=device)[::2]
    torch.library.opcheck(torch.ops.packops.packed_labels.default, (labels, cu_seqlens), {"shift": False, "ignore_index": 4})


def test_compiled_with_dynamic_shapes(device):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def compiled(labels, cu_seqlens):
        position_ids, seq_idx = packops.packed_metadata(cu_seqlens, labels.shape[0])
        target, counts = packops.packed_labels(labels, cu_seqlens)
        return position_ids + 1, seq_idx, target, counts

    for lengths in ([3, 4], [9, 2, 8, 5], [7, 0, 6, 1, 1, 20]):
        cu_seqlens = boundaries(lengths, device)
        labels = torch.arange(sum(lengths) + 3, device=device)
        position_ids, seq_idx, target, counts = compiled(labels, cu_seqlens)
        expected = reference.packed_metadata(cu_seqlens, labels.shape[0])
        assert torch.equal(position_ids - 1, expected[0])
        assert torch.equal(seq_idx, expected[1])
        assert torch.equal(target, reference.packed_labels(labels, cu_seqlens)[0])
        assert torch.equal(counts, reference.packed_labels(labels, cu_seqlens)[1])
    assert len(graphs) <= 2


@pytest.mark.gpu
def test_graph_capture_reads_new_boundaries():
    """One captured graph serves every batch: boundaries are data, their number and the token count are the capacity."""
    total, capacity = 257, 12
    cu_seqlens = torch.zeros(capacity + 1, dtype=torch.int32, device="cuda")
    labels = torch.arange(total, device="cuda")
    graph, (metadata, targets) = capture(
        lambda: (packops.packed_metadata(cu_seqlens, total), packops.packed_labels(labels, cu_seqlens))
    )
    for lengths in ([257], [100, 100, 50], [1] * 12, []):
        cu_seqlens.copy_(boundaries(lengths + [0] * (capacity - len(lengths)), "cuda"))
        labels.copy_(torch.randint(-100, 100, (total,)))
        graph.replay()
        for mine, expected in zip(metadata, reference.packed_metadata(cu_seqlens, total), strict=True):
            assert torch.equal(mine, expected)
        for mine, expected in zip(targets, reference.packed_labels(labels, cu_seqlens), strict=True):
            assert torch.equal(mine, expected)


@pytest.mark.gpu
def test_no_host_sync():
    cu_seqlens = boundaries([100, 0, 28], "cuda")
    labels = torch.arange(128, device="cuda")
    with no_host_sync():
        packops.packed_metadata(cu_seqlens, 128)
        packops.packed_labels(labels, cu_seqlens)


@pytest.mark.gpu
def test_counts_do_not_depend_on_the_run():
    cu_seqlens = boundaries([70_001, 3, 0, 130_000, 999], "cuda")
    labels = torch.randint(-1, 3, (201_100,), device="cuda")
    first = packops.packed_labels(labels, cu_seqlens, ignore_index=-1)
    assert torch.equal(first[1], reference.packed_labels(labels, cu_seqlens, ignore_index=-1)[1])
    for _ in range(20):
        again = packops.packed_labels(labels, cu_seqlens, ignore_index=-1)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
