"""What torch.utils.flop_counter counts, from which people compute how busy a GPU is: the matrix products that run."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import packops

ops = torch.ops.packops
T, H, V = 20, 16, 50
PRODUCT = 2 * T * H * V


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def products_that_run(call) -> int:
    """Torch's own, by which the CPU computes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm", "aten::addmm_"))


def leaves(*shapes):
    return [torch.randn(*shape, requires_grad=True) for shape in shapes]


def subsets(count: int):
    return [[bool(number >> i & 1) for i in range(count)] for number in range(2**count)]


@pytest.mark.parametrize("wanted", subsets(3), ids=str)
@pytest.mark.parametrize("name", ["gated_linear", "gated_mlp", "torch.ops"])
def test_gated_layers(name, wanted):
    """Of x or gate and up, the first weights, and the last one."""
    rows, first, last = wanted
    if name == "gated_linear":
        inputs, flags, call = leaves((T, H), (T, H), (V, H)), (rows, first, last), packops.gated_linear
    else:
        inputs, flags = leaves((T, H), (V, H), (V, H), (H, V)), (rows, first, first, last)
        call = packops.gated_mlp if name == "gated_mlp" else ops.gated_mlp

    def step():
        for x, flag in zip(inputs, flags, strict=True):
            x.requires_grad_(flag)
        out = call(*inputs)
        if out.requires_grad:
            out.sum().backward()

    assert counted(step) == products_that_run(step) * PRODUCT > 0


@pytest.mark.parametrize("wanted", subsets(2), ids=str)
@pytest.mark.parametrize(
    ("call", "again"),
    [
        (packops.linear_cross_entropy, "never"),
        (partial(packops.linear_cross_entropy, chunk_tokens=8), "never"),
        (partial(packops.linear_cross_entropy, reduction="none"), "for the weight"),
        (lambda *x: packops.linear_cross_entropy(*x, return_stats=True)[0], "never"),
        (ops.linear_cross_entropy, "never"),
        (lambda *x: packops.linear_log_probs(*x).log_probs, "always"),
        (lambda *x: ops.linear_log_probs(*x)[0], "always"),
    ],
    ids=["loss", "in chunks", "token losses", "statistics", "torch.ops", "log-probabilities", "their torch.ops"],
)
def test_lm_heads(call, again, wanted):
    """again: when the backward makes the logits anew."""
    hidden, weight = leaves((T, H), (V, H))
    hidden.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])

    def step():
        out = call(hidden, weight, torch.randint(0, V, (T,)))
        if out.requires_grad:
            out.sum().backward()

    makes_anew = (again == "always" and any(wanted)) or (again == "for the weight" and wanted[1])
    assert counted(step) == (1 + sum(wanted) + makes_anew) * PRODUCT


def test_tokens_that_do_not_count():
    hidden, weight = leaves((T, H), (V, H))
    labels = torch.randint(0, V, (T,))
    labels[5:] = -100
    assert counted(lambda: packops.linear_cross_entropy(hidden, weight, labels, num_valid=5).backward()) == 3 * PRODUCT * 5 // T


def test_attention():
    """Scores and values, as torch counts them: without the mask; five products backward."""
    q, k, v = leaves((T, 4, 8), (T, 2, 8), (T, 2, 8))
    cu_seqlens, parents = torch.tensor([0, 5, 12, 18]), torch.tensor([-1, 0, 0])
    pair = 2 * 4 * 8
    flat, tree = 5 * 5 + 7 * 7 + 6 * 6, 5 * 5 + 7 * 12 + 6 * 11
    for given, pairs in ((cu_seqlens,), flat), ((cu_seqlens, parents), tree):
        assert counted(lambda given=given: packops.attention(q, k, v, *given).sum().backward()) == 7 * pair * pairs
        with torch.no_grad():
            assert counted(lambda given=given: ops.attention(q, k, v, *given)) == 2 * pair * pairs
    with torch.device("meta"):
        meta = [torch.empty(x.shape) for x in (q, k, v)]
    assert counted(lambda: packops.attention(*meta, cu_seqlens.to("meta"))) == 2 * pair * T * T


def test_the_products_of_a_vocabulary_over_ranks():
    """Their loops are Python, so what is counted is what they call."""
    out, hidden, weight = torch.empty(T, V, device="meta"), torch.empty(T, H, device="meta"), torch.empty(V, H, device="meta")
    formulas = torch.utils.flop_counter.flop_registry
    for name, arguments in (
        ("_lm_head_logits_", (out, hidden, weight, None)),
        ("_lm_head_statistics", (hidden, weight, None)),
        ("_lm_head_gradient_", (out, hidden, weight, None)),
        ("_lm_head_weight_gradient_", (weight, out, hidden)),
    ):
        assert formulas[getattr(ops, name)](*arguments) == PRODUCT
