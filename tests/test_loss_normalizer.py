"""loss_normalizer: accumulation and data parallel give the gradient of one big batch."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

import packops
from cuda_streams import no_host_sync
from packops import PackedBatch, PackedBatchSampler, PackingCollator, reference
from ranks import run_ranks

REDUCTIONS = ["mean", "seq-mean-token-mean", "seq-mean-token-sum"]


def test_by_hand():
    documents = [[1, 2, 3, 4], [5], [6, 7, 8]]
    first, second = PackingCollator()(documents), PackingCollator()([[1, 2], []])
    assert packops.loss_normalizer(first) == 5
    assert packops.loss_normalizer([first, second]) == 6
    for reduction in REDUCTIONS[1:]:
        assert packops.loss_normalizer([first, second], reduction=reduction) == 3  # [5] has nothing to predict
    assert packops.loss_normalizer([3, 2.5, torch.tensor(4)]) == 9.5
    assert packops.loss_normalizer(7) == 7
    assert packops.loss_normalizer([]) == 0
    assert packops.loss_normalizer(batch for batch in [first, second]) == 6


def test_labels_of_every_form(device):
    n = -100
    labels = torch.tensor([[1, 2, n, 4], [n, n, n, 4], [7, n, n, n]], device=device)
    count = packops.loss_normalizer
    assert count(labels) == 5
    assert count(labels, shift=True) == 3
    assert count(labels, reduction="seq-mean-token-mean") == 3
    assert count(labels, reduction="seq-mean-token-mean", shift=True) == 2
    flat, cu_seqlens = labels.view(-1), torch.tensor([0, 4, 4, 8, 11], device=device)  # the last label is padding
    for shift, tokens, documents in ((False, 5, 3), (True, 3, 2)):
        assert count(flat, cu_seqlens=cu_seqlens, shift=shift) == tokens
        assert count(flat, cu_seqlens=cu_seqlens, shift=shift, reduction="seq-mean-token-sum") == documents
    flat = torch.tensor([1, 2, 3, 4, 5], device=device)
    assert count(flat, cu_seqlens=torch.tensor([0, 2, 3], device=device)) == 3
    assert count(torch.full((2, 3), -1, device=device), ignore_index=-1) == 0
    result = count(labels)
    assert (result.dtype, result.shape, result.device.type) == (torch.float64, (), device.type)


def test_agrees_with_the_loss_itself(device):
    """Given as num_items, the count of the batch itself changes nothing."""
    labels = torch.randint(0, 9, (5, 6), device=device)
    labels[torch.rand(5, 6, device=device) < 0.6] = -100
    labels[2] = -100
    logits = torch.randn(5, 6, 9, device=device)
    for reduction, shift in itertools.product(REDUCTIONS, [False, True]):
        expected = packops.cross_entropy(logits, labels, reduction=reduction, shift=shift)
        num_items = packops.loss_normalizer(labels, reduction=reduction, shift=shift)
        loss = packops.cross_entropy(logits, labels, reduction=reduction, shift=shift, num_items=num_items)
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_agrees_with_the_loss_of_documents(device, ignore_index, shift, reduction):
    """ignore_index, cu_seqlens and shift together: labels ignored at and beside the ends of documents, and in the padding."""
    labels = torch.randint(0, 9, (24,), device=device)
    labels[torch.rand(24, device=device) < 0.4] = ignore_index
    cu_seqlens = torch.tensor([0, 5, 5, 6, 13, 20], device=device)
    labels[[0, 4, 5, 6, 7]] = torch.tensor([2, 1, 2, ignore_index, 4], device=device)
    labels[13:20] = ignore_index  # a document without a scored token
    labels[20:] = 5  # padding
    logits = torch.randn(24, 9, device=device)
    options = {"cu_seqlens": cu_seqlens, "shift": shift, "reduction": reduction, "ignore_index": ignore_index}
    num_items = packops.loss_normalizer(labels, **options)
    expected = packops.cross_entropy(logits, labels, **options)
    assert 0 < num_items < 13
    torch.testing.assert_close(packops.cross_entropy(logits, labels, **options, num_items=num_items), expected)
    exact = reference.cross_entropy(logits.double(), labels, **options)
    torch.testing.assert_close(expected.double(), exact, rtol=1e-5, atol=0)


def test_bad_arguments():
    for reduction in ("sum", "none"):
        with pytest.raises(ValueError, match=f"reduction must be one of 'mean', .* got '{reduction}'"):
            packops.loss_normalizer(3, reduction=reduction)
    for count in (-1, math.nan, math.inf):
        for given in (float(count), torch.tensor(float(count))):
            with pytest.raises(ValueError, match=f"a count must be finite and at least 0, got {float(count)}"):
                packops.loss_normalizer([3, given])
    for given in (torch.tensor(True), torch.tensor(1j)):
        with pytest.raises(TypeError, match=r"a count a tensor of no dimension, got torch\.\w+ of shape \(\)"):
            packops.loss_normalizer(given)
    with pytest.raises(ValueError, match="gradients must be 'mean' or 'sum', got 'avg'"):
        packops.loss_normalizer(3, gradients="avg")
    with pytest.raises(ValueError, match=r"labels of shape \(4,\) need cu_seqlens"):
        packops.loss_normalizer(torch.arange(4), reduction="seq-mean-token-mean")


@pytest.mark.gpu
def test_no_host_sync():
    labels = torch.randint(0, 9, (5, 6), device="cuda")
    cu_seqlens = torch.tensor([0, 10, 30], device="cuda")
    with no_host_sync():
        for reduction in REDUCTIONS:
            packops.loss_normalizer([labels, labels], reduction=reduction, shift=True)
            packops.loss_normalizer(labels.view(-1), reduction=reduction, cu_seqlens=cu_seqlens)


# ---- several processes -----------------------------------------------------------------------------------------------------

LENGTHS = [3, 17, 1, 9, 30, 2, 2, 25, 11, 6, 1, 14, 8, 5, 21]
VOCABULARY = 13


def make_documents():
    rng = np.random.default_rng(0)
    documents = [{"input_ids": rng.integers(0, VOCABULARY, n).tolist()} for n in LENGTHS]
    documents[4]["labels"] = [-100] * 25 + documents[4]["input_ids"][25:]
    return documents


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, 8), torch.nn.Tanh(), torch.nn.Linear(8, VOCABULARY)).double()


def loss_of(model, batch: PackedBatch, reduction, num_items=None):
    return packops.cross_entropy(
        model(batch.input_ids), batch.labels, cu_seqlens=batch.cu_seqlens, shift=True, reduction=reduction, num_items=num_items
    )


def train_one_step(rank, world_size, reduction_grads):
    """Every pack of the epoch is one micro-batch of one step, on ranks whose token counts differ."""
    documents = make_documents()
    sampler = PackedBatchSampler(LENGTHS, 32, balance="none")
    assert (sampler.rank, sampler.world_size) == (rank, world_size)
    batches = [PackingCollator(pad_to_multiple_of=8)([documents[i] for i in batch]) for batch in sampler]
    for gradients, reduction in itertools.product(["mean", "sum"], REDUCTIONS):
        model = make_model()
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        num_items = packops.loss_normalizer(batches, reduction=reduction, gradients=gradients)
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            parallel.require_backward_grad_sync = is_last
            loss_of(parallel, batch, reduction, num_items).backward()
        for parameter, expected in zip(model.parameters(), reduction_grads[reduction], strict=True):
            grad = parameter.grad if gradients == "mean" else parameter.grad * world_size  # DDP took the mean
            torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)
    counts = [None] * world_size
    dist.all_gather_object(counts, sum(batch.num_items for batch in batches))
    assert len(set(counts)) > 1, "the ranks must differ for this test to mean something"
    alone = dist.new_group([0])
    if rank == 0:
        assert packops.loss_normalizer(batches, group=alone) == counts[0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_data_parallel_gives_the_gradient_of_one_process(world_size, tmp_path):
    grads = {}
    everything = PackingCollator()(make_documents())
    for reduction in REDUCTIONS:
        model = make_model()
        loss_of(model, everything, reduction).backward()
        grads[reduction] = [parameter.grad for parameter in model.parameters()]
    run_ranks(world_size, tmp_path, train_one_step, world_size, grads)


@pytest.mark.parametrize("item", [torch.randn(3, 4), torch.tensor([120.0, 80.0]), torch.ones(2, 3, dtype=torch.bool)], ids=str)
def test_floats_are_no_labels(item):
    with pytest.raises(TypeError, match="labels must be integers, and a count a tensor of no dimension, got torch"):
        packops.loss_normalizer(item)
