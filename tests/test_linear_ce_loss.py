"""Linear cross entropy against the fp64 specification and ``cross_entropy(hidden @ weight.T + bias)``, and its promises: memory,
products that are not made, the precision of what is accumulated, torch's own machinery."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import packops
from cuda_streams import capture, no_host_sync
from device_memory import peak_memory
from packops import reference
from packops.ops import linear_ce_chunks, linear_ce_loss
from packops.ops.lm_head import CPU_BLOCKS, MAX_ROWS, MIN_ROWS, Wanted, choose_chunk_tokens
from ranks import fabrics, run_ranks, this_device

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss+softcap+scale": {"z_loss": 1e-3, "softcap": 5.0, "logit_scale": 0.7},
    "class_weight+smoothing": {"class_weight": "random", "label_smoothing": 0.2},
    "class_weight": {"class_weight": "random"},
}
CHUNKS = [1, 7, 1000]  # one row each, an odd number that leaves a rest, all rows at once


def options_on(name, vocab, device):
    options = dict(OPTIONS[name])
    if options.get("class_weight") == "random":
        options["class_weight"] = torch.rand(vocab, device=device) * 3 + 0.1
    return options


def problem(device, dtype=torch.float32, shape=(26,), hidden_size=24, vocab=67, bias=True, ignored=()):
    """hidden, weight, bias as leaves, and labels. Logits have a standard deviation of about 2."""
    hidden = torch.randn(*shape, hidden_size, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, hidden_size, device=device) * 2 / hidden_size**0.5).to(dtype).requires_grad_()
    bias = torch.randn(vocab, device=device).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(0, vocab, shape, device=device)
    labels.view(-1)[list(ignored)] = -100
    return hidden, weight, bias, labels


def gradients(loss, grad_output, *leaves):
    return torch.autograd.grad(loss, [x for x in leaves if x is not None], grad_output)


def unchunked(hidden, weight, labels, *, bias=None, **options):
    options = {k: v for k, v in options.items() if k not in ("num_valid", "chunk_tokens", "accum_dtype")}
    return packops.cross_entropy(F.linear(hidden, weight, bias), labels, **options)


def rms(x):
    return x.double().square().mean().sqrt().item()


def assert_matches(hidden, weight, bias, labels, grad_output=None, **options):
    """The loss and every gradient: close to fp64, and no further from it than logits, loss and products by torch."""
    dtype = hidden.dtype
    chunked_only = ("num_valid", "chunk_tokens", "accum_dtype")
    loss = packops.linear_cross_entropy(hidden, weight, labels, bias=bias, **options)
    plain = unchunked(hidden, weight, labels, bias=bias, **options)
    exact_leaves = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    exact = reference.linear_cross_entropy(
        *exact_leaves[:2], labels, bias=exact_leaves[2], **{k: v for k, v in options.items() if k not in chunked_only}
    )
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == exact.shape
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5 + 0.2 * EPS[dtype] * (dtype != torch.float32))
    grad_output = torch.ones_like(loss) if grad_output is None else grad_output
    ours = gradients(loss, grad_output, hidden, weight, bias)
    torchs = gradients(plain, grad_output, hidden, weight, bias)
    exacts = gradients(exact, grad_output.double(), *exact_leaves)
    for name, a, b, c in zip(("hidden", "weight", "bias"), ours, torchs, exacts, strict=False):
        assert a.dtype == dtype
        assert a.shape == c.shape
        assert a.isfinite().all()
        error, torchs_error, size = rms(a.double() - c), rms(b.double() - c), rms(c)
        # Logits of a chunk are not rounded as all logits at once are, and of so few numbers, 67 in a bias, a few decide.
        noise = {torch.float32: 4 * EPS[dtype], torch.float64: 1e-12}.get(dtype, (0.25 if name == "bias" else 0.15) * EPS[dtype])
        allowed = 1.3 * torchs_error + noise * size + (2.0**-25 if dtype == torch.float16 else 0)
        assert error <= allowed, f"{name}: off by {error:.2e} of {size:.2e}, torch by {torchs_error:.2e}"
        assert (a[c == 0] == 0).all()
    return loss, ours


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_specification(device, dtype, options, reduction):
    """Documents (an empty one, one of a single token, padding), shift, weights, several chunks and every option at once."""
    hidden, weight, bias, labels = problem(device, dtype, shape=(2, 13), ignored=(3, 14))
    arguments = {
        "cu_seqlens": torch.tensor([0, 4, 4, 5, 12, 21], dtype=torch.int32, device=device),
        "shift": True,
        "reduction": reduction,
        "token_weight": torch.rand(2, 13, device=device) + (0.1 if reduction.startswith(("mean", "seq")) else -0.2),
        "chunk_tokens": 7,
        **options_on(options, 67, device),
    }
    grad_output = torch.randn((2, 13) if reduction == "none" else (), device=device)
    assert_matches(hidden, weight, bias, labels, grad_output, **arguments)
    # 24 rows less boundaries, padding and what is ignored: rows 3, 4, 11 and 20 end documents, 21 and on are padding.
    counted = int((unchunked(hidden, weight, labels, bias=bias, **{**arguments, "reduction": "none"}) != 0).sum())
    assert_matches(hidden, weight, bias, labels, grad_output, num_valid=counted, **arguments)


@pytest.mark.parametrize("chunk_tokens", [*CHUNKS, None])
@pytest.mark.parametrize("ignored", [(), (0,), (25,), range(7, 14), range(0, 25), range(1, 26, 2), range(26)])
def test_chunks_and_ignored_patterns(device, chunk_tokens, ignored):
    """Whole chunks, first and last rows, every second row and all rows ignored; compacted or not, exactly or up to a bound."""
    hidden, weight, bias, labels = problem(device, ignored=ignored)
    counted = 26 - len(ignored)
    for num_valid in {None, counted, min(counted + 3, 26), 26}:
        loss, grads = assert_matches(hidden, weight, bias, labels, chunk_tokens=chunk_tokens, num_valid=num_valid)
        assert (grads[0][list(ignored)] == 0).all()
        if counted == 0:
            assert loss == 0
            assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("reduction", ["mean", "none", "seq-mean-token-mean"])
def test_fp64(reduction):
    hidden, weight, bias, labels = problem(torch.device("cpu"), torch.float64, shape=(2, 3), hidden_size=3, vocab=4, ignored=(1,))
    arguments = {"shift": True, "reduction": reduction, "token_weight": torch.rand(2, 3), "chunk_tokens": 2, "softcap": 4.0}
    assert_matches(hidden, weight, bias, labels, **arguments)
    torch.autograd.gradcheck(
        lambda h, w, b: packops.linear_cross_entropy(h, w, labels, bias=b, **arguments), (hidden, weight, bias), atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.37, -3.0, 512.0])
def test_any_grad_output(device, dtype, value):
    hidden, weight, bias, labels = problem(device, dtype, ignored=(4,))
    assert_matches(hidden, weight, bias, labels, torch.tensor(value, device=device), chunk_tokens=7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_is_rounded_once(device, dtype):
    """With a grad_output that is no power of two: gradients of the 16-bit inputs in fp32, times it, rounded."""
    hidden, weight, bias, labels = problem(device, dtype, shape=(300,), hidden_size=64)
    g = torch.tensor(0.7, device=device)
    ours = gradients(packops.linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_tokens=100), g, hidden, weight, bias)
    rounded = [x.detach().float().requires_grad_() for x in (hidden, weight, bias)]
    logits = F.linear(hidden, weight, bias).detach().float().requires_grad_()  # what both start from
    grad_logits = torch.autograd.grad(F.cross_entropy(logits, labels), logits)[0].to(dtype).double()
    if dtype == torch.float16:
        grad_logits = torch.autograd.grad(F.cross_entropy(logits, labels), logits)[0].double()
    exact = (grad_logits @ rounded[1].double() * 0.7, grad_logits.t() @ rounded[0].double() * 0.7, grad_logits.sum(0) * 0.7)
    for a, b in zip(ours, exact, strict=True):
        best = rms(b.to(dtype).double() - b)  # the error of one rounding
        slack = 1.1 if dtype == torch.bfloat16 else 1.6  # fp16's logits were rounded in other units; fp32: the products'
        assert rms(a.double() - b) <= slack * best + 8 * EPS[torch.float32] * rms(b), (rms(a.double() - b), best)


@pytest.mark.parametrize("dtype", DTYPES)
def test_per_token_gradients_of_every_kind(device, dtype):
    hidden, weight, bias, labels = problem(device, dtype, shape=(4, 6), ignored=(8,))
    for grad_output in (
        torch.randn(4, 6, device=device),
        torch.randn(6, 8, device=device).t()[:4],
        torch.randn(1, device=device).expand(4, 6),
        torch.randn(4, 12, device=device)[:, ::2],
    ):
        assert_matches(hidden, weight, bias, labels, grad_output, reduction="none", chunk_tokens=5, num_valid=23)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("hidden",), ("hidden", "weight"), ("bias",)])
def test_backward_twice(device, dtype, reduction, frozen):
    leaves = dict(zip(("hidden", "weight", "bias"), problem(device, dtype)[:3], strict=True))
    labels = problem(device, ignored=(2,))[3]
    for name in frozen:
        leaves[name].requires_grad_(False)
    wanted = [x for x in leaves.values() if x.requires_grad]
    loss = packops.linear_cross_entropy(
        leaves["hidden"], leaves["weight"], labels, bias=leaves["bias"], reduction=reduction, chunk_tokens=9
    )
    weights = torch.randn_like(loss)
    first = torch.autograd.grad(loss, wanted, weights, retain_graph=True)
    kept = [x.clone() for x in first]
    scaled = torch.autograd.grad(loss, wanted, 4 * weights, retain_graph=True)
    last = torch.autograd.grad(loss, wanted, weights)
    for a, b, c, d in zip(first, kept, scaled, last, strict=True):
        assert torch.equal(a, b)  # the second backward left the first one's result alone
        assert torch.equal(a, d)
        torch.testing.assert_close(c, 4 * a, rtol=2 * EPS[dtype], atol=1e-6)
        assert a.abs().sum() > 0
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, wanted, weights)
    if "hidden" in leaves and leaves["hidden"].requires_grad:  # the same as without anything frozen
        all_leaves = [x.detach().requires_grad_() for x in leaves.values()]
        whole = packops.linear_cross_entropy(*all_leaves[:2], labels, bias=all_leaves[2], reduction=reduction, chunk_tokens=9)
        expected = torch.autograd.grad(whole, all_leaves[0], weights)[0]
        difference = rms(first[0].double() - expected)  # grad_output comes in after the gradient was rounded, or before
        assert difference <= 2 * EPS[dtype] * rms(expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(device, reduction):
    hidden, weight, _, labels = problem(device, bias=False)
    loss = packops.linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fp16_under_a_loss_scale(device, reduction):
    """Gradients far below fp16's smallest number, were they formed before the loss scale is known."""
    hidden, weight, _, labels = problem(device, torch.float16, shape=(40,), vocab=3000, bias=False)
    items, scale = 1_000_000, 2.0**16
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    (F.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="sum") * (scale / items)).backward()
    loss = packops.linear_cross_entropy(
        hidden, weight, labels, reduction=reduction, chunk_tokens=16, num_items=items if reduction == "mean" else None
    )
    (loss.sum() * (scale if reduction == "mean" else scale / items)).backward()
    assert loss.sum().item() * (1 if reduction == "mean" else 1 / items) * scale > 0
    for x, e in zip((hidden, weight), exact, strict=True):
        assert rms(x.grad.double() - e.grad) <= 1.5e-3 * rms(e.grad) + 2.0**-25
    heavy = {"token_weight": torch.full((40,), 1e4, device=device), "class_weight": torch.full((3000,), 1e3, device=device)}
    hidden.grad = None
    (packops.linear_cross_entropy(hidden, weight, labels, reduction="sum", **heavy) * 1e-6).backward()
    assert hidden.grad.isfinite().all()
    assert rms(hidden.grad) > 0


@pytest.mark.parametrize("num_valid", [None, 6, 7])  # exact, and with a row that does not count
def test_rows_that_do_not_count_may_hold_anything(device, num_valid):
    hidden, weight, bias, labels = problem(device, shape=(9,), ignored=(1, 6))
    cu_seqlens = torch.tensor([0, 4, 8], device=device)  # row 8 is padding
    expected = packops.linear_cross_entropy(hidden, weight, labels, bias=bias, cu_seqlens=cu_seqlens)
    expected_grads = gradients(expected, None, hidden, weight, bias)
    with torch.no_grad():
        hidden[1], hidden[6], hidden[8] = math.nan, math.inf, -math.inf
    loss = packops.linear_cross_entropy(
        hidden, weight, labels, bias=bias, cu_seqlens=cu_seqlens, chunk_tokens=4, num_valid=num_valid
    )
    torch.testing.assert_close(loss, expected)
    for a, b in zip(gradients(loss, None, hidden, weight, bias), expected_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_grad_output_of_rows_that_do_not_count_may_be_anything(device, dtype, frozen):
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("float64 is for the CPU")
    hidden, weight, _, labels = problem(device, dtype, shape=(9,), ignored=(1, 6))
    wanted = (hidden,) if frozen else (hidden, weight)
    loss = packops.linear_cross_entropy(hidden, weight.detach() if frozen else weight, labels, reduction="none", chunk_tokens=4)
    grad_output = torch.randn_like(loss).masked_fill(labels == -100, 0)
    expected = torch.autograd.grad(loss, wanted, grad_output, retain_graph=True)
    found = torch.autograd.grad(loss, wanted, grad_output.masked_fill(labels == -100, math.nan))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_inputs_are_left_alone(device):
    hidden, weight, bias, labels = problem(device, ignored=(3,))
    before = [x.detach().clone() for x in (hidden, weight, bias, labels)]
    packops.linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_tokens=7).backward(torch.tensor(2.0, device=device))
    for a, b in zip((hidden, weight, bias, labels), before, strict=True):
        assert torch.equal(a, b)


def test_strided_hidden_weight_and_labels(device):
    hidden = torch.randn(6, 4, 48, device=device)[..., ::2].transpose(0, 1).requires_grad_()
    weight = torch.randn(24, 67, device=device).t().requires_grad_()
    labels = torch.randint(0, 67, (6, 4), device=device, dtype=torch.int32).t()
    assert_matches(hidden, weight, None, labels, chunk_tokens=5)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (1,), ()])
@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_empty_and_tiny(device, shape, reduction):
    hidden, weight, bias, labels = problem(device, shape=shape)
    loss = packops.linear_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction)
    loss.sum().backward()
    assert loss.shape == (shape if reduction == "none" else ())
    assert hidden.grad.shape == hidden.shape
    expected = F.linear(hidden, weight, bias).reshape(-1, 67)
    torch.testing.assert_close(loss.sum(), F.cross_entropy(expected, labels.reshape(-1), reduction="sum"))
    if not math.prod(shape):
        assert (weight.grad == 0).all()


def test_one_class(device):
    hidden, weight, bias, _ = problem(device, vocab=1)
    loss = packops.linear_cross_entropy(hidden, weight, torch.zeros(26, dtype=torch.int64, device=device), bias=bias)
    assert loss == 0


@pytest.mark.parametrize("kind", ["number", "host", "device"])
def test_micro_batches_add_up(device, kind):
    hidden, weight, bias, labels = problem(device, ignored=range(9))
    whole = packops.linear_cross_entropy(hidden, weight, labels, bias=bias)
    num_items = {"number": 17, "host": torch.tensor(17), "device": torch.tensor(17.0, device=device)}[kind]
    parts = [
        packops.linear_cross_entropy(hidden[a:b], weight, labels[a:b], bias=bias, num_items=num_items)
        for a, b in ((0, 10), (10, 13), (13, 26))
    ]
    torch.testing.assert_close(sum(parts), whole)
    for a, b in zip(gradients(sum(parts), None, weight, bias), gradients(whole, None, weight, bias), strict=True):
        torch.testing.assert_close(a, b)


def test_num_valid_of_a_packed_batch(device):
    """The count that a PackedBatch carries is exact, and the losses are those of its documents alone."""
    ids = torch.randint(0, 67, (26,), device=device)
    labels = ids.clone()
    labels[[0, 3, 9, 10, 25]] = -100  # the first token of a document is never scored, masked or not
    batch = packops.PackedBatch.build(ids, labels, (0, 9, 10, 22, 26))
    hidden, weight, bias, _ = problem(device, shape=(1, 26))
    options = {"bias": bias, "cu_seqlens": batch.cu_seqlens, "shift": True, "reduction": "none"}
    token = packops.linear_cross_entropy(hidden, weight, batch.labels, num_valid=batch.num_valid, **options)
    assert batch.num_valid == int((token != 0).sum())
    alone = [
        reference.linear_cross_entropy(hidden[0, a:b], weight, labels[a:b], bias=bias, shift=True, reduction="none")
        for a, b in itertools.pairwise((0, 9, 10, 22, 26))
    ]
    torch.testing.assert_close(token[0].double(), torch.cat(alone), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- fp32 logits, and statistics


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_fp32_logits(device, dtype, options):
    """The loss of 16-bit parameters to 2e-6, where logits in their dtype are off by a thousand times that; gradients no worse."""
    hidden, weight, bias, labels = problem(device, dtype, shape=(40,), hidden_size=64, vocab=500, ignored=(3,))
    with torch.no_grad():
        weight *= 3
    arguments = {"bias": bias, "chunk_tokens": 16, **options_on(options, 500, device)}
    exact_leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    given = {k: v for k, v in arguments.items() if k not in ("bias", "chunk_tokens")}
    exact = reference.linear_cross_entropy(*exact_leaves[:2], labels, bias=exact_leaves[2], reduction="none", **given)
    exacts = gradients(exact.sum(), None, *exact_leaves)
    errors = []
    for logits_dtype in (torch.float32, None):
        loss = packops.linear_cross_entropy(hidden, weight, labels, reduction="none", logits_dtype=logits_dtype, **arguments)
        grads = gradients(loss.sum(), None, hidden, weight, bias)
        errors.append([rms(loss - exact), *(rms(a.double() - b) for a, b in zip(grads, exacts, strict=True))])
    wide, narrow = errors
    assert wide[0] <= 2e-6 * (1 + exact.abs().max())
    if device.type == "cpu":  # the product with the loss in its epilogue rounds no logits either
        assert narrow[0] > 50 * wide[0]
    for a, b, size in zip(wide[1:], narrow[1:], map(rms, exacts), strict=True):
        assert a <= 1.02 * b
        assert a <= 0.6 * EPS[dtype] * size


def test_fp32_logits_of_what_is_wide_already(device):
    hidden, weight, _, labels = problem(device, bias=False)
    expected = packops.linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(packops.linear_cross_entropy(hidden, weight, labels, logits_dtype=torch.float32), expected)
    for bad in (torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match=r"logits_dtype must be None, torch.float32 or hidden's dtype torch.float32, got"):
            packops.linear_cross_entropy(hidden, weight, labels, logits_dtype=bad)


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
@pytest.mark.parametrize("num_valid", [None, 15, 17])
@pytest.mark.parametrize("grad", [False, True])
def test_statistics(device, reduction, num_valid, grad):
    """Those of ``cross_entropy``, from several chunks, with rows that do not count and documents without a row."""
    hidden, weight, bias, labels = problem(device, shape=(2, 13), ignored=(3, 14))
    arguments = {
        "cu_seqlens": torch.tensor([0, 4, 4, 5, 12, 21], device=device),
        "shift": True,
        "reduction": reduction,
        "token_weight": torch.rand(2, 13, device=device) + 0.1,
        "class_weight": torch.rand(67, device=device) + 0.1,
        "logit_scale": 1.3,
    }
    if not grad:
        hidden, weight, bias = (x.detach() for x in (hidden, weight, bias))
    logits = F.linear(hidden.detach(), weight.detach(), bias.detach())
    expected_loss, expected = packops.cross_entropy(logits, labels, return_stats=True, **arguments)
    loss, stats = packops.linear_cross_entropy(
        hidden, weight, labels, bias=bias, num_valid=num_valid, chunk_tokens=7, return_stats=True, **arguments
    )
    torch.testing.assert_close(loss.detach(), expected_loss)
    for name, a, b in zip(stats._fields, stats, expected, strict=True):
        assert not a.requires_grad
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    if grad:
        plain = packops.linear_cross_entropy(hidden, weight, labels, bias=bias, num_valid=num_valid, chunk_tokens=7, **arguments)
        pairs = (gradients(x.sum(), None, hidden, weight, bias) for x in (loss, plain))
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # other kernels may serve it on CUDA


@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0), (1,), (), (3, 5)])
def test_statistics_of_batches(device, shape):
    hidden, weight, bias, labels = problem(device, shape=shape)
    logits = F.linear(hidden.detach(), weight.detach(), bias.detach())
    _, expected = packops.cross_entropy(logits, labels, return_stats=True)
    _, stats = packops.linear_cross_entropy(hidden, weight, labels, bias=bias, return_stats=True)
    for a, b in zip(stats, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- accumulation, memory, work


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_chunks_lose_nothing(device, dtype):
    """The weight's gradient over 64 chunks is as near to fp64 as one product's; in bf16 it is not, so fp32 does something."""
    hidden, weight, _, labels = problem(device, dtype, shape=(2048,), hidden_size=32, bias=False)
    with torch.no_grad():
        hidden += 1  # contributions that add up, so that late ones are small beside the sum

    def error(**options):
        exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        (expected,) = torch.autograd.grad(reference.linear_cross_entropy(*exact, labels), exact[1])
        loss = packops.linear_cross_entropy(hidden, weight, labels, **options)
        return rms(torch.autograd.grad(loss, weight)[0] - expected)

    assert error(chunk_tokens=32) <= 1.02 * error(chunk_tokens=2048)
    if dtype == torch.bfloat16:
        coarse = error(chunk_tokens=32, accum_dtype=torch.bfloat16)
        assert 1.5 * error(chunk_tokens=32) < coarse < 30 * error(chunk_tokens=32)


def test_bf16_accumulation_is_scaled_in_fp32(device):
    hidden, weight, bias, labels = problem(device, torch.bfloat16)
    options = {"bias": bias, "chunk_tokens": 7, "accum_dtype": torch.bfloat16}
    one = gradients(packops.linear_cross_entropy(hidden, weight, labels, **options), None, hidden, weight, bias)
    g = torch.tensor(0.7, device=device)
    scaled = gradients(packops.linear_cross_entropy(hidden, weight, labels, **options), g, hidden, weight, bias)
    for a, b in zip(one, scaled, strict=True):
        torch.testing.assert_close(b, (a.float() * 0.7).bfloat16(), rtol=0, atol=0)


SHAPES = [(8192, 4096, 128256), (8192, 2304, 256000), (16384, 896, 151936)]


@pytest.mark.parametrize(
    "tokens, hidden_size, vocab", [*SHAPES, (4096, 2048, 32000), (4096, 4096, 128256), (1 << 20, 8192, 128256)]
)
@pytest.mark.parametrize("valid", [1.0, 0.5, 0.03])
def test_chunk_sizes(tokens, hidden_size, vocab, valid):
    num_valid = None if valid == 1 else int(tokens * valid)
    rows = tokens if num_valid is None else num_valid
    c = choose_chunk_tokens(tokens, hidden_size, vocab, num_valid=num_valid)
    assert c == rows <= MAX_ROWS or (MIN_ROWS <= c <= MAX_ROWS and c.bit_count() == 1)
    copies = 1 if num_valid is None else 3
    assert c * (vocab + copies * hidden_size) <= max(0.35 * tokens * vocab, MIN_ROWS * (vocab + copies * hidden_size))
    if c < rows:  # as large as it may be
        twice = 2 * c * (vocab + copies * hidden_size)
        assert twice > 0.35 * tokens * vocab or 2 * c > MAX_ROWS


def test_chunks_of_the_measured_shapes():
    """What docs/design.md says of them; and rows that fit into the memory of a chunk are one."""
    assert [choose_chunk_tokens(*shape) for shape in SHAPES] == [2048, 2048, 4096]
    for num_valid, rows in ((8191, 2048), (2617, 2048), (2616, 2616), (2049, 2049), (3, 3)):
        assert choose_chunk_tokens(8192, 4096, 128256, num_valid=num_valid) == rows


def test_chunk_sizes_of_the_smallest():
    for tokens, hidden_size, vocab in itertools.product((0, 1, 63, 64, 65, 1000, 1025, 3000), (0, 1, 64), (1, 100)):
        c = choose_chunk_tokens(tokens, hidden_size, vocab)
        assert 1 <= c <= MAX_ROWS
        assert c >= min(tokens, MIN_ROWS // 2)


@pytest.mark.parametrize(
    "tokens, dtype, options, keeps",
    [
        (8192, torch.bfloat16, {}, True),
        (12602, torch.bfloat16, {}, True),  # up to 4 * 4096 / (2 * 0.65)
        (12604, torch.bfloat16, {}, False),
        (16384, torch.bfloat16, {"num_valid": 8192}, True),
        (8192, torch.bfloat16, {"accum_dtype": torch.bfloat16}, False),
        (4096, torch.bfloat16, {"accum_dtype": torch.bfloat16}, True),
        (8192, torch.bfloat16, {"chunk_tokens": 4096}, False),
        (8192, torch.float16, {"chunk_tokens": 8192}, True),
        (16384, torch.bfloat16, {"chunk_tokens": 16384}, True),  # a chunk of all of them and the accumulator would take more
        (8192, torch.bfloat16, {"logits_dtype": torch.float32}, False),
        (64, torch.float32, {}, False),
    ],
    ids=str,
)
def test_logits_are_kept_where_they_take_no_more_memory(tokens, dtype, options, keeps):
    hidden = torch.empty(2, tokens // 2, 4096, dtype=dtype, device="meta")
    options = {"num_valid": None, "chunk_tokens": None, "accum_dtype": None, "logits_dtype": None, **options}
    assert linear_ce_chunks.keeps_logits(hidden, **options) is keeps
    if keeps:
        rows = options["num_valid"] or tokens
        accumulator = 2 if options["accum_dtype"] else 4
        chunk = 1 if options["chunk_tokens"] else 0.35
        assert 2 * rows <= chunk * 2 * rows + accumulator * 4096


class Recorder(TorchDispatchMode):
    """What the loop allocates, at most at once in any tensor, and which matrix products it makes."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        name = func._schema.name.split("::")[1]
        if name in ("mm", "addmm", "addmm_"):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.products.append((a.shape[0], a.shape[1], b.shape[1]))
        return out


def chunked(hidden, weight, labels, wanted, **chunks):
    """The loop itself, whose inner ops a dispatch mode can see."""
    ops = linear_ce_loss.raw_ops("packops")
    target, scale, _ = ops.prepare(weight.shape[0], labels)
    maths = {name: linear_ce_loss.DEFAULTS[name] for name in linear_ce_loss.MATHS}
    recorder = Recorder()
    with torch.no_grad(), recorder:
        result, _ = linear_ce_loss.losses_and_gradients(
            ops, hidden, weight, None, target, scale, maths, Wanted(*wanted), **chunks
        )
    return result, recorder


@pytest.mark.parametrize("wanted", [(h, w, False) for h in (False, True) for w in (False, True)])
@pytest.mark.parametrize("num_valid", [None, 50])
def test_frozen_sides_and_ignored_rows_cost_no_product(device, wanted, num_valid):
    hidden, weight, _, labels = problem(device, shape=(200,), hidden_size=8, vocab=1000, bias=False, ignored=range(50, 200))
    result, recorder = chunked(hidden, weight, labels, wanted, num_valid=num_valid, chunk_tokens=30)
    flops = sum(2 * m * k * n for m, k, n in recorder.products)
    assert flops == (1 + sum(wanted)) * 2 * (num_valid or 200) * 1000 * 8
    assert (result.grad_hidden is None, result.grad_weight is None) == (not wanted[0], not wanted[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [(False, False, False), (True, True, False)])
@pytest.mark.parametrize("num_valid", [None, 60])
def test_no_tensor_is_larger_than_a_chunk_of_logits(dtype, wanted, num_valid):
    hidden, weight, _, labels = problem(
        "cpu", dtype, shape=(128,), hidden_size=4, vocab=5000, bias=False, ignored=range(0, 128, 2)
    )
    if num_valid:
        labels[:8] = -100
    _, recorder = chunked(hidden, weight, labels, wanted, num_valid=num_valid, chunk_tokens=16)
    gradient = 4 * weight.numel() if wanted[1] else 0
    assert recorder.largest == max(16 * 5000 * dtype.itemsize, gradient)


def allocated_peak(call):
    """Bytes that the CPU's allocator handed out at most at once while `call` ran, its result included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    del result
    return max(itertools.accumulate(size for _, size in changes), default=0)


@pytest.mark.parametrize(
    "dtype, hidden_size, vocab", [(torch.float32, 16, 8192), (torch.float32, 512, 1024), (torch.bfloat16, 16, 8192)]
)
def test_peak_memory_on_the_cpu(dtype, hidden_size, vocab):
    """The documented formula, to a few bytes a token in fp32; in bf16 products take some copies, with AMX of the weight too. Far
    below the logits."""
    tokens, chunk, size = 1024, 128, dtype.itemsize
    hidden, weight, _, labels = problem("cpu", dtype, shape=(tokens,), hidden_size=hidden_size, vocab=vocab, bias=False)
    logits, parameters = tokens * vocab * size, (vocab + tokens) * hidden_size
    per_chunk, accumulators, few = chunk * (vocab + hidden_size) * size, 4 * parameters, 32 * tokens
    if dtype == torch.bfloat16:
        widened = 4 * (chunk * hidden_size + -(-vocab // CPU_BLOCKS) * (chunk + hidden_size))
        per_chunk, few = per_chunk + widened, few + per_chunk // 20 + vocab * hidden_size * size
        # What torch itself takes beside a product's operands and result: on some CPUs all of it in fp32.
        rows, grads = hidden[:chunk].detach(), torch.ones(chunk, vocab, dtype=dtype)
        products = ((rows, weight.detach().t()), (grads, weight.detach()), (grads.t(), rows))
        few += max(allocated_peak(lambda a=a, b=b: a @ b) - a.shape[0] * b.shape[1] * size for a, b in products)

    def step(loss):
        return lambda: torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))

    ours = allocated_peak(step(lambda *args: packops.linear_cross_entropy(*args, chunk_tokens=chunk)))
    assert per_chunk + accumulators <= ours <= per_chunk + accumulators + few
    assert allocated_peak(step(unchunked)) >= 2 * logits
    with torch.no_grad():
        forward = allocated_peak(lambda: packops.linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk))
    assert chunk * (vocab + hidden_size) * size <= forward <= per_chunk + few


# ------------------------------------------------------------------------------------------------------------------- bad data


def test_too_small_num_valid_is_seen(device):
    hidden, weight, bias, labels = problem(device, ignored=(1,))
    call = lambda: packops.linear_cross_entropy(hidden, weight, labels, bias=bias, num_valid=24)  # noqa: E731
    if device.type == "cuda":
        loss = call()
        assert loss.isnan()
        loss.backward()
        assert hidden.grad.isfinite().all()
        packops.checks(True)
    try:
        with pytest.raises(ValueError, match=r"linear_cross_entropy: num_valid must be at least .* \(25\), got 24"):
            call()
    finally:
        packops.checks(False)


def test_bad_label(device):
    hidden, weight, bias, labels = problem(device)
    for bad in (67, -1, 2**32 + 3):
        labels[4] = bad
        if device.type == "cuda":
            loss = packops.linear_cross_entropy(hidden, weight, labels, bias=bias, reduction="none", chunk_tokens=3)
            assert loss[4].isnan()
            assert loss[[*range(4), *range(5, 26)]].isfinite().all()
            grads = gradients(loss, torch.ones_like(loss), hidden, weight, bias)
            assert all(g.isfinite().all() for g in grads)
            assert (grads[0][4] == 0).all()
            assert packops.linear_cross_entropy(hidden, weight, labels, bias=bias, num_valid=26).isnan()
            packops.checks(True)
        try:
            for call in (packops.linear_cross_entropy, torch.ops.packops.linear_cross_entropy):
                with pytest.raises(IndexError, match=rf"linear_cross_entropy: label {bad} at position 4 is outside \[0, 67\)"):
                    call(hidden, weight, labels, bias=bias)
        finally:
            packops.checks(False)


def test_bad_cu_seqlens(device):
    hidden, weight, bias, labels = problem(device)
    for bad in ([1, 26], [0, 14, 13, 26], [0, 27], [-3, 6], [0, 2**31 - 1], [5, 4, 3, 2, 1]):
        cu_seqlens = torch.tensor(bad, device=device)
        arguments = {"bias": bias, "cu_seqlens": cu_seqlens, "shift": True}
        if device.type == "cuda":
            for reduction in reference.REDUCTIONS:  # any value, but no access outside and no broken context
                packops.linear_cross_entropy(hidden, weight, labels, reduction=reduction, num_valid=7, **arguments).sum().item()
            packops.checks(True)
        try:
            with pytest.raises(ValueError, match="linear_cross_entropy: cu_seqlens must start at 0"):
                packops.linear_cross_entropy(hidden, weight, labels, **arguments)
        finally:
            packops.checks(False)


def bad_arguments(device):
    h, w, y = torch.randn(4, 9, device=device), torch.randn(5, 9, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    return {
        "labels of floats": ((h, w, y.float()), {}, TypeError, "labels must be int32 or int64, got"),
        "hidden of integers": ((h.long(), w, y), {}, TypeError, "hidden must be bfloat16, float16 or float32, got"),
        "weight of another dtype": ((h, w.bfloat16(), y), {}, TypeError, "weight must have hidden's dtype"),
        "weight of another width": ((h, w[:, :8], y), {}, ValueError, r"weight must have shape \(vocab, 9\) .* got \(5, 8\)"),
        "weight in one dimension": ((h, w[0], y), {}, ValueError, r"weight must have shape \(vocab, hidden_size\), got \(9,\)"),
        "no features": ((h[:, :0], w[:, :0], y), {}, ValueError, r"hidden must have at least one feature, got \(4, 0\)"),
        "labels too few": ((h, w, y[:3]), {}, ValueError, r"labels must have hidden's leading shape \(4,\), got \(3,\)"),
        "no leading dimension": ((h[0, 0], w, y[0]), {}, ValueError, "hidden must have shape"),
        "no class": ((h, w[:0], y), {}, ValueError, "at least one class"),
        "bias of another length": (
            (h, w, y),
            {"bias": torch.randn(6, device=device)},
            ValueError,
            r"bias must have shape \(5,\), got \(6,\)",
        ),
        "bias of another dtype": (
            (h, w, y),
            {"bias": torch.randn(5, device=device).half()},
            TypeError,
            "bias must have hidden's dtype",
        ),
        "unknown reduction": (
            (h, w, y),
            {"reduction": "average"},
            ValueError,
            "reduction must be none, sum, mean, .* got 'average'",
        ),
        "label_smoothing above 1": ((h, w, y), {"label_smoothing": 1.5}, ValueError, "label_smoothing must be in"),
        "softcap 0": ((h, w, y), {"softcap": 0.0}, ValueError, "softcap must be positive"),
        "logit_scale negative": ((h, w, y), {"logit_scale": -1.0}, ValueError, "logit_scale must be positive"),
        "class_weight too short": (
            (h, w, y),
            {"class_weight": torch.ones(8, device=device)},
            ValueError,
            r"class_weight must have shape \(5,\) or be one row of 5, got shape",
        ),
        "token_weight too short": (
            (h, w, y),
            {"token_weight": torch.ones(3, device=device)},
            ValueError,
            r"token_weight must have shape \(4,\) or be one row of 4, got shape",
        ),
        "cu_seqlens of floats": (
            (h, w, y),
            {"cu_seqlens": torch.zeros(2, device=device)},
            TypeError,
            "cu_seqlens must be int32 or int64",
        ),
        "num_items of two": ((h, w, y), {"num_items": torch.tensor([1, 2])}, ValueError, "num_items must hold one number"),
        "num_items of a sum": (
            (h, w, y),
            {"reduction": "sum", "num_items": torch.tensor(3)},
            ValueError,
            "num_items replaces the denominator",
        ),
        "num_valid above the rows": (
            (h, w, y),
            {"num_valid": 5},
            ValueError,
            "num_valid must be between 0 and the 4 rows, got 5",
        ),
        "num_valid negative": ((h, w, y), {"num_valid": -1}, ValueError, "num_valid must be between 0"),
        "chunk_tokens 0": ((h, w, y), {"chunk_tokens": 0}, ValueError, "chunk_tokens must be at least 1, got 0"),
        "accum_dtype of other tensors": (
            (h, w, y),
            {"accum_dtype": torch.bfloat16},
            ValueError,
            "accum_dtype must be torch.float32, or",
        ),
    }


def bad_arguments_on_cuda(device):
    h, w, y = torch.randn(4, 9, device=device), torch.randn(5, 9, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    return {
        "weight on the host": ((h, w.cpu(), y), {}, ValueError, "weight must be on hidden's device"),
        "labels on the host": ((h, w, y.cpu()), {}, ValueError, "labels must be on hidden's device"),
        "fp64": ((h.double(), w.double(), y), {}, TypeError, "float64"),
    }


def assert_refused(case, entry, grad):
    (hidden, *others), kwargs, error, message = case
    call = packops.linear_cross_entropy if entry == "function" else torch.ops.packops.linear_cross_entropy
    if grad and hidden.is_floating_point():
        hidden = hidden.clone().requires_grad_()
    with pytest.raises(error, match="packops.linear_cross_entropy: .*" + message):
        call(hidden, *others, **kwargs)


@pytest.mark.parametrize("case", bad_arguments("cpu"))
@pytest.mark.parametrize("entry", ["function", "op"])
@pytest.mark.parametrize("grad", [False, True])
def test_bad_arguments_are_named(device, case, entry, grad):
    assert_refused(bad_arguments(device)[case], entry, grad)


@pytest.mark.gpu
@pytest.mark.parametrize("case", bad_arguments_on_cuda("cpu"))
@pytest.mark.parametrize("entry", ["function", "op"])
@pytest.mark.parametrize("grad", [False, True])
def test_bad_arguments_on_cuda_are_named(case, entry, grad):
    assert_refused(bad_arguments_on_cuda("cuda")[case], entry, grad)


def test_what_must_be_plain_and_on_the_host(device):
    hidden, weight, _, labels = problem(device, bias=False)
    with pytest.raises(TypeError, match="num_valid must be an int on the host"):
        packops.linear_cross_entropy(hidden, weight, labels, num_valid=torch.tensor(3, device=device))
    with pytest.raises(TypeError, match=r"weight must be a plain tensor, got a DTensor"):
        packops.linear_cross_entropy(hidden, type("Sharded", (type("DTensor", (), {}),), {})(), labels)


# ------------------------------------------------------------------------------------------------------ torch's own machinery


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shift": True, "reduction": "none", "label_smoothing": 0.1, "chunk_tokens": 3},
        {"reduction": "seq-mean-token-mean", "softcap": 3.0, "z_loss": 0.01, "num_valid": 9},
    ],
)
def test_opcheck(device, options):
    dtype = torch.float16 if "num_valid" in options else torch.float32  # fp16 returns one tensor more
    hidden, weight, bias, labels = problem(device, dtype, shape=(2, 5), hidden_size=4, vocab=9)
    arguments = {
        "cu_seqlens": torch.tensor([0, 3, 8], device=device),
        "class_weight": torch.rand(9, device=device),
        "bias": bias,
        **options,
    }
    ops = torch.ops.packops
    exact = {"atol": 1e-2, "rtol": 1e-2} if dtype != torch.float32 else {}
    torch.library.opcheck(ops.linear_cross_entropy.default, (hidden, weight, labels), arguments, **exact)
    torch.library.opcheck(ops.linear_cross_entropy_stats.default, (hidden, weight, labels), arguments, **exact)
    plain = [x.detach() for x in (hidden, weight)]
    arguments["bias"] = bias.detach()
    wants = {"grad_hidden": True, "grad_weight": True, "grad_bias": False}
    torch.library.opcheck(ops._linear_cross_entropy_forward.default, (*plain, labels), {**arguments, **wants})
    loss, *_, target, scale, _, _, _, _ = ops._linear_cross_entropy_forward(*plain, labels, **arguments)
    names = (*linear_ce_loss.MATHS, "bias", "num_valid", "chunk_tokens")
    if loss.dim():
        torch.library.opcheck(
            ops._linear_cross_entropy_backward.default,
            (torch.randn_like(loss), *plain, target, scale),
            {**{k: v for k, v in arguments.items() if k in names}, **wants},
        )


def test_prepared_rows(device):
    """What the loss is made of before there are logits: the specification of targets and scales is the gradient of the loss."""
    labels = torch.randint(0, 7, (2, 13), device=device)
    labels[0, 3] = -100
    arguments = {
        "cu_seqlens": torch.tensor([0, 4, 4, 5, 12, 21], device=device),
        "shift": True,
        "token_weight": torch.rand(2, 13, device=device) + 0.1,
        "class_weight": torch.rand(7, device=device) + 0.1,
    }
    torch.library.opcheck(torch.ops.packops._cross_entropy_prepare.default, (7, labels), arguments)
    for reduction in reference.REDUCTIONS:
        target, scale, counts = torch.ops.packops._cross_entropy_prepare(7, labels, reduction=reduction, **arguments)
        logits = torch.zeros(2, 13, 7, dtype=torch.float64, device=device, requires_grad=True)
        reference.cross_entropy(logits, labels, reduction=reduction, **arguments).sum().backward()
        expected = logits.grad.view(26, 7)
        counted = target >= 0
        made = F.one_hot(target.clamp(min=0).long(), 7) - 1 / 7
        made = made * torch.where(counted, scale * arguments["class_weight"][target.clamp(min=0).long()], 0.0)[:, None]
        torch.testing.assert_close(-made.double(), expected, rtol=1e-5, atol=1e-7)
        assert counts.tolist() == [int(counted.sum()), 3]


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_whole_with_dynamic_shapes(device, reduction):
    def model(hidden, weight, bias, labels, cu_seqlens, num_valid):
        loss = packops.linear_cross_entropy(
            hidden.tanh(), weight, labels, bias=bias, cu_seqlens=cu_seqlens, shift=True, reduction=reduction, chunk_tokens=4
        )
        return (packops.linear_cross_entropy(hidden, weight, labels, num_items=7, num_valid=num_valid) * 0.5 + loss).sum()

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="inductor" if reduction == "mean" else "aot_eager")
    for tokens in (6, 11):
        hidden, weight, bias, labels = problem(device, shape=(tokens,), ignored=(2,))
        arguments = hidden, weight, bias, labels, torch.tensor([0, 4, tokens], device=device), tokens - 1
        results = []
        for f in (compiled, model):
            loss = f(*arguments)
            results.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_make_fx_sees_an_op_not_a_loop(device):
    from torch.fx.experimental.proxy_tensor import make_fx

    hidden, weight, _, labels = problem(device, bias=False)

    def step(hidden, weight, labels):
        return torch.autograd.grad(packops.linear_cross_entropy(hidden, weight, labels, chunk_tokens=3), (hidden, weight))

    graph = make_fx(step, tracing_mode="fake")(hidden, weight, labels)
    names = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    assert names.count("packops._linear_cross_entropy_forward.default") == 1
    assert not any("mm" in n for n in names)
    with torch.no_grad():
        grads = graph(hidden, weight, labels)
    for a, b in zip(grads, step(hidden, weight, labels), strict=True):
        torch.testing.assert_close(a, b)


def test_export(device):
    class Loss(torch.nn.Module):
        def forward(self, hidden, weight, labels):
            return packops.linear_cross_entropy(hidden, weight, labels, shift=True, num_valid=20)

    hidden, weight, _, labels = problem(device, bias=False, ignored=range(6))
    arguments = hidden.detach(), weight.detach(), labels
    exported = torch.export.export(Loss(), arguments)
    torch.testing.assert_close(exported.module()(*arguments), Loss()(*arguments))


@pytest.mark.skipif(torch.__version__ < "2.13", reason="AOTInductor of torch 2.11 passes other dtypes than it was given")
@pytest.mark.parametrize("options", [{}, {"accum_dtype": torch.bfloat16, "logits_dtype": torch.float32}], ids=str)
def test_export_compiled_ahead_of_time(options, tmp_path):
    """AOTInductor, in a process that has imported packops: the op itself is Python."""

    class Loss(torch.nn.Module):
        def forward(self, hidden, weight, labels):
            return packops.linear_cross_entropy(hidden * 2, weight, labels, shift=True, **options)

    hidden, weight, _, labels = problem(torch.device("cpu"), bias=False)
    dtype = torch.bfloat16 if options else hidden.dtype
    arguments = hidden.detach().to(dtype), weight.detach().to(dtype), labels
    program = torch.export.export(Loss(), arguments)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "loss.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(*arguments), Loss()(*arguments))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(device, reduction):
    """fp32 parameters under bf16 autocast: the loss of their bf16 casts, gradients in fp32; weights of tokens stay fp32."""
    hidden, weight, bias, labels = problem(device)
    token_weight = torch.rand(26, device=device) + 0.1
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = packops.linear_cross_entropy(hidden, weight, labels, bias=bias, token_weight=token_weight, reduction=reduction)
    grads = gradients(loss.sum(), None, hidden, weight, bias)
    cast = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight, bias)]
    expected = packops.linear_cross_entropy(*cast[:2], labels, bias=cast[2], token_weight=token_weight, reduction=reduction)
    assert torch.equal(loss, expected)
    for a, b in zip(grads, gradients(expected.sum(), None, *cast), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


class Head(torch.nn.Linear):
    """The lm_head as a module whose forward is the loss: where FSDP has its weight gathered."""

    def forward(self, hidden, labels, num_items):
        return packops.linear_cross_entropy(hidden, self.weight, labels, bias=self.bias, num_items=num_items, chunk_tokens=3)


def train_sharded(rank, expected, *tensors):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, init_device_mesh

    hidden, labels, weight, bias = (x.to(this_device()) for x in tensors)
    head = Head(8, 11, device=this_device())
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    fully_shard(head, mesh=init_device_mesh(this_device().type, (2,)))
    counted = 17 / 2  # FSDP averages gradients over the ranks
    loss = head(hidden[rank * 10 : rank * 10 + 10], labels[rank * 10 : rank * 10 + 10], num_items=counted)
    loss.backward()
    assert isinstance(head.weight, DTensor)
    for parameter, grad in zip((head.weight, head.bias), expected, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor().cpu(), grad)
    with pytest.raises(TypeError, match="weight must be a plain tensor"):
        packops.linear_cross_entropy(hidden, head.weight, labels)


@pytest.mark.slow
@fabrics(2)
def test_fully_sharded_weight(backend, world_size, tmp_path):
    """FSDP2 over two ranks with different token counts: the gradients of the whole batch."""
    hidden, weight, bias, labels = problem("cpu", shape=(20,), hidden_size=8, vocab=11, ignored=(1, 2, 15))
    loss = packops.linear_cross_entropy(hidden, weight, labels, bias=bias)
    expected = gradients(loss, None, weight, bias)
    tensors = (x.detach() for x in (hidden, labels, weight, bias))
    run_ranks(world_size, tmp_path, train_sharded, expected, *tensors, backend=backend)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(device, use_reentrant):
    hidden, weight, bias, labels = problem(device)

    def loss(hidden):
        return packops.linear_cross_entropy(hidden * 2, weight, labels, bias=bias, chunk_tokens=7)

    expected = gradients(loss(hidden), None, hidden, weight, bias)
    for x in (hidden, weight, bias):
        x.grad = None
    checkpoint(loss, hidden, use_reentrant=use_reentrant).backward()
    for x, b in zip((hidden, weight, bias), expected, strict=True):
        assert torch.equal(x.grad, b)


def test_determinism(device):
    hidden, weight, bias, labels = problem(device, torch.bfloat16, shape=(700,), ignored=range(0, 700, 3))
    for num_valid in (None, 466):
        first, *others = (
            gradients(
                packops.linear_cross_entropy(hidden, weight, labels, bias=bias, num_valid=num_valid, chunk_tokens=100),
                None,
                hidden,
                weight,
                bias,
            )
            for _ in range(4)
        )
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


# ---------------------------------------------------------------------------------------------------------------- CUDA only


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none", "seq-mean-token-mean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_synchronisation(reduction, dtype):
    hidden, weight, bias, labels = problem("cuda", dtype, shape=(200,), vocab=1000, ignored=range(50))
    arguments = {
        "bias": bias,
        "cu_seqlens": torch.tensor([0, 90, 200], device="cuda"),
        "shift": True,
        "reduction": reduction,
        "num_valid": 149,
        "chunk_tokens": 64,
        "class_weight": torch.rand(1000, device="cuda"),
    }
    packops.linear_cross_entropy(hidden, weight, labels, **arguments).sum().backward()
    with no_host_sync():
        (packops.linear_cross_entropy(hidden, weight, labels, **arguments).sum() * 3).backward()
        arguments["num_valid"] = None
        (packops.linear_cross_entropy(hidden, weight, labels, **arguments).sum() * 3).backward()


def test_kept_logits_compile(device, monkeypatch):
    """With Inductor, which lowers every op of the backward; main_grad is added to by another one."""
    monkeypatch.setattr(linear_ce_loss, "keeps_logits", lambda *arguments, **options: True)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    hidden, weight = (torch.randn(n, 16, device=device, dtype=dtype, requires_grad=True) for n in (6, 32))
    labels = torch.randint(0, 32, (6,), device=device)
    expected = torch.autograd.grad(packops.linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    torch.compiler.reset()
    compiled = torch.compile(lambda **more: packops.linear_cross_entropy(hidden, weight, labels, **more), fullgraph=True)
    found = torch.autograd.grad(compiled(), (hidden, weight))
    main_grad = torch.zeros(32, 16, device=device)
    compiled(main_grad=main_grad).backward()
    for x, y in zip((*found, hidden.grad, main_grad.to(dtype)), (*expected, *expected), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.gpu
def test_cuda_graph_replays_with_other_data():
    """What counts is data, up to num_valid rows of it."""
    hidden, weight, _, labels = problem("cuda", torch.bfloat16, shape=(256,), hidden_size=64, vocab=1000, bias=False)
    labels[100:] = -100

    def step():
        loss = packops.linear_cross_entropy(hidden, weight, labels, num_valid=128, chunk_tokens=50)
        return (loss, *torch.autograd.grad(loss, (hidden, weight)))

    graph, captured = capture(step)
    for begin, end in ((0, 100), (128, 256), (7, 7), (0, 129)):
        labels.fill_(-100)
        labels[begin:end] = torch.randint(0, 1000, (end - begin,), device="cuda")
        with torch.no_grad():
            hidden.copy_(torch.randn_like(hidden))
        graph.replay()
        (loss, *grads), (expected, *expected_grads) = captured, step()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
        assert loss.isnan() == (end - begin > 128)
        for a, b in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=2.0**-7, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.large(gib=24)
@pytest.mark.parametrize("tokens, hidden_size, vocab", SHAPES)
@pytest.mark.parametrize("valid", [1.0, 0.5])
def test_peak_memory(tokens, hidden_size, vocab, valid):
    """Beyond the accumulators: at most 0.35 of the logits in bf16, and forward alone no accumulator either. Where the logits are
    kept in their place, a block of the weight's gradient in fp32 and the hidden states that count come to the backward."""
    device = torch.device("cuda")
    hidden = torch.randn(tokens, hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocab, hidden_size, device=device) / hidden_size**0.5).bfloat16().requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), device=device)
    num_valid = None
    if valid < 1:
        labels[torch.randperm(tokens, device=device)[: int(tokens * (1 - valid))]] = -100
        num_valid = int(tokens * valid)
    logits = tokens * vocab * 2
    accumulators = 4 * hidden_size * (tokens + vocab)
    gradients_size = 2 * hidden_size * (tokens + vocab)

    packops.linear_cross_entropy(hidden[:64], weight, labels[:64]).backward()  # the product library's workspaces
    hidden.grad = weight.grad = None
    forward = peak_memory(lambda: packops.linear_cross_entropy(hidden, weight, labels, num_valid=num_valid))
    backward = peak_memory(
        lambda: torch.autograd.grad(packops.linear_cross_entropy(hidden, weight, labels, num_valid=num_valid), (hidden, weight))
    )
    with torch.no_grad():
        alone = peak_memory(lambda: packops.linear_cross_entropy(hidden, weight, labels, num_valid=num_valid))
    slack = 40 * 2**20  # a workspace of the product library
    limits = {"num_valid": num_valid, "chunk_tokens": None, "accum_dtype": None, "logits_dtype": None}
    kept = linear_ce_chunks.BLOCK_BYTES + 2 * hidden_size * tokens if linear_ce_chunks.keeps_logits(hidden, **limits) else 0
    assert forward <= accumulators + 0.35 * logits + slack
    assert backward <= accumulators + max(0.35 * logits, gradients_size) + kept + slack
    assert alone <= 0.35 * logits + slack


@pytest.mark.gpu
@pytest.mark.large(gib=24)
@pytest.mark.parametrize("tokens, hidden_size, vocab", SHAPES)
def test_real_shapes(tokens, hidden_size, vocab):
    """A sample of rows and classes against fp64, where each is a row of the softmax."""
    device = torch.device("cuda")
    hidden = torch.randn(tokens, hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocab, hidden_size, device=device) / hidden_size**0.5).bfloat16().requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), device=device)
    labels[::3] = -100
    count = int((labels != -100).sum())
    results = []
    for call in (
        lambda: packops.linear_cross_entropy(hidden, weight, labels),
        lambda: packops.linear_cross_entropy(hidden, weight, labels, num_valid=count),
        lambda: unchunked(hidden, weight, labels),
    ):
        loss = call()
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    sample = torch.arange(0, vocab, vocab // 37, device=device)
    exact_rows = torch.zeros(len(sample), hidden_size, dtype=torch.float64, device=device)
    for begin in range(0, tokens, 1024):
        h, y = hidden[begin : begin + 1024].detach().double(), labels[begin : begin + 1024]
        p = (h.float() @ weight.detach().float().t()).softmax(-1)[:, sample].double()
        p = (p - (y[:, None] == sample).double()) * (y != -100)[:, None] / count
        exact_rows += p.t() @ h
    errors = [rms(result[2][sample].double() - exact_rows) for result in results]
    assert max(errors[:2]) <= 1.05 * errors[2], errors
    for result in results[:2]:
        torch.testing.assert_close(result[0], results[2][0], rtol=1e-4, atol=1e-5)
        assert (result[1][labels == -100] == 0).all()
        assert rms(result[1].double() - results[2][1]) <= 0.01 * rms(results[2][1])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sequence_losses_with_weights_of_any_dtype(dtype, compiled):
    """Those of the logits' loss, in fp32; the weight of a row that does not count may be NaN."""
    hidden, weight, labels = torch.randn(6, 4), torch.randn(5, 4), torch.arange(6) % 5
    labels[1] = -100
    token_weight = torch.rand(6, dtype=dtype)
    token_weight[1] = torch.nan
    given = {"cu_seqlens": torch.tensor([0, 2, 6]), "return_stats": True}

    def loss(token_weight):
        return packops.linear_cross_entropy(hidden, weight, labels, token_weight=token_weight, **given)[1].sequence_loss * 2

    found = (torch.compile(loss, fullgraph=True) if compiled else loss)(token_weight)
    want = packops.cross_entropy(hidden @ weight.t(), labels, token_weight=token_weight, **given)[1].sequence_loss * 2
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, want)


def test_logits_wider_and_accumulators_narrower_than_usual():
    """Together, on the CPU, whose products have one dtype."""
    hidden, weight = (torch.randn(n, 4).bfloat16().requires_grad_() for n in (6, 5))
    labels = torch.arange(6) % 5
    options = {"accum_dtype": torch.bfloat16, "logits_dtype": torch.float32}
    found = torch.autograd.grad(packops.linear_cross_entropy(hidden, weight, labels, **options), (hidden, weight))
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = torch.autograd.grad(packops.reference.linear_cross_entropy(*leaves, labels), leaves)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).abs().max() <= 2**-6 * b.abs().max()


@pytest.mark.parametrize("scale", [1e-30, 1e-41, 1e-43, 0.0])
def test_fp16_gradients_of_next_to_nothing_are_zeros(scale):
    hidden, weight = (torch.randn(n, 8).half().requires_grad_() for n in (4, 9))
    labels = torch.arange(4)
    for result in (
        packops.linear_log_probs(hidden, weight, labels).log_probs,
        packops.linear_cross_entropy(hidden, weight, labels, reduction="none"),
        packops.linear_cross_entropy(hidden, weight, labels),
    ):
        for grad in torch.autograd.grad((result * scale).sum(), (hidden, weight)):
            assert (grad == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "seq-mean-token-mean"])
def test_documents_whose_classes_weigh_nothing(device, reduction):
    """They count, as for the loss of logits: statistics are theirs, gradients are 0, and NaN shows."""
    hidden, weight = (torch.randn(n, 8, device=device, requires_grad=True) for n in (6, 5))
    labels = torch.tensor([1, 1, 1, *([1] * 3 if reduction == "mean" else [2, 3, 2])], device=device)  # a mean is of all
    given = {
        "cu_seqlens": torch.tensor([0, 3, 6], device=device),
        "class_weight": torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0], device=device),
        "reduction": reduction,
        "return_stats": True,
    }
    found, stats = packops.linear_cross_entropy(hidden, weight, labels, **given)
    want, expected = packops.cross_entropy(hidden @ weight.t(), labels, **given)
    torch.testing.assert_close(found, want)
    for a, b in zip(stats, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for a, b in zip(torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        hidden[1] = torch.nan
    for call in (hidden, hidden.detach()):
        assert packops.linear_cross_entropy(call, weight, labels, **given)[0].isnan()
