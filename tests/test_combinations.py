"""What is right alone may be wrong together: options in combination, exact boundaries, in place with a kept graph."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings

import packops
from packops import reference

T, V = 11, 19


@pytest.fixture(scope="module")
def _group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


REDUCTIONS_TRIED = ["none", "sum", "mean", "seq-mean-token-mean"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("reduction", REDUCTIONS_TRIED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_with_a_kept_graph(dtype, reduction, device):
    check_kept_graph(packops.cross_entropy, DTYPES[dtype], reduction, device)


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("reduction", REDUCTIONS_TRIED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_with_a_kept_graph_over_ranks(dtype, reduction):
    check_kept_graph(packops.vocab_parallel_cross_entropy, DTYPES[dtype], reduction, torch.device("cpu"))


def check_kept_graph(function, dtype, reduction, device):
    """Two backward passes with other gradients, then the last, each right; and what had saved the logits before them raises."""
    leaf = torch.randn(T, V, device=device).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (T,), device=device)
    labels[3] = -100
    bounds = torch.tensor([0, 4, 9], device=device)
    options = {"cu_seqlens": bounds, "shift": True, "reduction": reduction}

    exact = leaf.detach().double().requires_grad_()
    truth = reference.cross_entropy(exact, labels, **options)
    logits = leaf * 1
    before = logits.square()  # saves the logits
    loss = function(logits, labels, inplace=True, **options)
    last = [False] * 2 + [True]
    for number, is_last in enumerate(last):
        incoming = torch.rand(loss.shape, device=device) * 3 + number
        (grad,) = torch.autograd.grad(loss, leaf, incoming, retain_graph=not is_last)
        (want,) = torch.autograd.grad(truth, exact, incoming.double(), retain_graph=True)
        units = {torch.float32: 2**-20, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
        torch.testing.assert_close(grad.double(), want, rtol=units, atol=units * float(want.abs().max()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.sum().backward()


BOUNDARIES = {
    "window of all but one": (7, {"window": 6}),
    "window of all": (7, {"window": 7}),
    "window of more": (7, {"window": 8}),
    "a tile": (64, {"window": 63}),
    "a tile, window of it": (64, {"window": 64}),
    "a tile and one": (65, {"window": 64}),
    "two tiles": (128, {"window": 65}),
    "two tiles and one": (129, {"window": 128}),
    "window of one": (66, {"window": 1}),
}


@pytest.mark.parametrize("case", BOUNDARIES)
def test_windows_at_their_boundaries(case, device):
    """As long as the document, one less, one more; beside tiles of 64 tokens."""
    length, options = BOUNDARIES[case]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float64
    bounds = torch.tensor([0, 3, 3 + length, 3 + length], dtype=torch.int32, device=device)
    q = torch.randn(length + 5, 2, 64, device=device, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(length + 5, 1, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    incoming = torch.randn(length + 5, 2, 64, device=device, dtype=dtype)
    out = packops.attention(q, k, v, bounds, **options)
    got = [out, *torch.autograd.grad(out, (q, k, v), incoming)]
    exact = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    truth = reference.attention(*exact, bounds.cpu(), **options)
    want = [truth, *torch.autograd.grad(truth, exact, incoming.double().cpu())]
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 4e-2, "atol": 4e-2}
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double().cpu(), y, **tolerance)


@st.composite
def loss_calls(draw):
    """Any options of the loss together, in a packed row or a batch."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    batch = draw(st.sampled_from([(T,), (2, 5), (3, 1)]))
    count = torch.Size(batch).numel()
    ignore = draw(st.sampled_from([-100, 0, 7, V + 3]))
    labels = torch.randint(0, V, batch, generator=random)
    labels[torch.rand(batch, generator=random) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = ignore
    options = {"ignore_index": ignore, "shift": draw(st.booleans())}
    if draw(st.booleans()):
        cuts = sorted(draw(st.lists(st.integers(0, count), max_size=5)))
        options["cu_seqlens"] = torch.tensor([0, *cuts], dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    options["reduction"] = draw(st.sampled_from(reference.REDUCTIONS))
    if options["reduction"] not in ("none", "sum") and draw(st.booleans()):
        options["num_items"] = draw(st.sampled_from([3, 2.5, 1e6]))
    if draw(st.booleans()):
        weight = torch.rand(batch, generator=random)
        options["token_weight"] = weight.masked_fill(torch.rand(batch, generator=random) < 0.3, 0)
    if draw(st.booleans()):
        options["class_weight"] = torch.rand(V, generator=random)
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([0.5, 30.0]))
    for name, value in {"label_smoothing": 0.3, "z_loss": 0.2, "logit_scale": 0.7}.items():
        if draw(st.booleans()):
            options[name] = value
    return torch.randn(*batch, V, generator=random), labels, options


@settings(max_examples=150)
@given(call=loss_calls())
def test_options_of_the_loss_together(call, one_thread):
    logits, labels, options = call
    got = logits.clone().requires_grad_()
    loss = packops.cross_entropy(got, labels, **options)
    exact = logits.double().requires_grad_()
    truth = reference.cross_entropy(exact, labels, **options)
    incoming = torch.rand(loss.shape, dtype=torch.float64) + 0.5
    torch.testing.assert_close(loss.double(), truth.double(), rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(loss, got, incoming.float())
    (want,) = torch.autograd.grad(truth, exact, incoming)
    torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-6 * max(1.0, float(want.abs().max())))


SMALL = 1e-3


@pytest.mark.parametrize("op", ["rms_norm", "qk_norm_rope"])
def test_epsilon_where_it_decides(op, device):
    """Rows so small that another epsilon is another result, by far more than the result is off."""
    x = SMALL * torch.randn(6, 3, 64, device=device)
    weight = torch.randn(64, device=device)
    tables = packops.rope_table(64, 6, device=device)

    def norm(module, eps):
        if op == "rms_norm":
            return module.rms_norm(x, weight, eps=eps)
        call = packops.apply_qk_norm_rope if module is packops else reference.qk_norm_rope
        return call(x, None, weight, None, *tables, eps=eps)[0]

    got, want, other = norm(packops, 1e-5).double(), norm(reference, 1e-5), norm(reference, 1.01e-5)
    assert (got - want).norm() < 1e-6 * want.norm()
    assert (other - want).norm() > 1e-3 * want.norm()
