"""Cross entropy against the fp64 specification, torch, and its own promises (determinism, no waiting, bad data)."""

import ctypes
import functools
import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import packops
from cuda_streams import capture, no_host_sync
from device_memory import peak_memory
from packops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float64: 2e-16, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss+softcap+scale": {"z_loss": 1e-3, "softcap": 5.0, "logit_scale": 0.7},
    "softcap": {"softcap": 30.0},
    "class_weight+smoothing": {"class_weight": "random", "label_smoothing": 0.2},
    "class_weight": {"class_weight": "random"},
    "z_loss+class_weight+smoothing": {"z_loss": 1e-2, "class_weight": "random", "label_smoothing": 0.2},
}


def options_on(name, vocab, device):
    options = dict(OPTIONS[name])
    if options.get("class_weight") == "random":
        options["class_weight"] = torch.rand(vocab, device=device) + 0.1
    return options


def both(logits, labels, grad_output=None, **options):
    """loss and gradient of packops and of the specification, in fp64."""
    ours, theirs = logits.detach().clone().requires_grad_(), logits.detach().double().requires_grad_()
    if not logits.is_contiguous():
        ours = logits.detach().requires_grad_()
    loss, expected = packops.cross_entropy(ours, labels, **options), reference.cross_entropy(theirs, labels, **options)
    if grad_output is None:
        grad_output = torch.ones_like(loss)
    loss.backward(grad_output)
    expected.backward(grad_output.double())
    return loss, expected, ours.grad, theirs.grad


def assert_close(loss, expected, grad, expected_grad, dtype):
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    bound = 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(loss.double(), expected, rtol=bound, atol=bound)
    # One rounding to the gradient's dtype, plus fp32 noise of its terms: a confident row's are larger than their difference.
    size = expected_grad.abs()
    noise = 3e-6 * size.amax(-1, keepdim=True) + 1e-6 * size.max() + (2.0**-24 if dtype == torch.float16 else 0)
    noise = noise + 2.0**-44  # of one class: p - 1 in one fused multiply-add leaves the last bits of the product, not 0
    allowed = EPS[dtype] * expected_grad.abs() + noise
    excess = (grad.double() - expected_grad).abs() - allowed
    assert excess.max() <= 0, f"gradient off by {excess.max():.2e} beyond what rounding allows"


def problem(device, dtype, vocab, reduction="mean"):
    """Logits, labels and arguments: documents (an empty one, one of a single token, padding), shift and weights at once."""
    logits = (torch.randn(2, 13, vocab, device=device) * 3).to(dtype)
    labels = torch.randint(0, vocab, (2, 13), device=device)
    labels[0, 3] = labels[1, 1] = -100
    arguments = {
        "cu_seqlens": torch.tensor([0, 4, 4, 5, 12, 21], dtype=torch.int32, device=device),
        "shift": True,
        "reduction": reduction,
        "token_weight": torch.rand(2, 13, device=device) + (0.1 if reduction.startswith(("mean", "seq")) else -0.2),
    }
    return logits, labels, arguments


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_specification(device, dtype, options, reduction):
    logits, labels, arguments = problem(device, dtype, 517, reduction)
    grad_output = torch.randn((2, 13) if reduction == "none" else (), device=device)
    assert_close(*both(logits, labels, grad_output, **arguments, **options_on(options, 517, device)), dtype)


@pytest.mark.parametrize("reduction", ["mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("shift", [False, True])
def test_batch_rows_are_documents_without_cu_seqlens(device, reduction, shift):
    logits, labels = torch.randn(3, 5, 11, device=device), torch.randint(0, 11, (3, 5), device=device)
    labels[1] = -100  # a document that does not count
    labels[2, 2:] = -100
    assert_close(*both(logits, labels, shift=shift, reduction=reduction), torch.float32)


def test_worked_example(device):
    """[a..g] and [x,y] packed: the sequence mean weighs the documents alike, the token mean does not."""
    logits, labels = torch.randn(9, 17, device=device), torch.randint(0, 17, (9,), device=device)
    cu_seqlens = torch.tensor([0, 7, 9], device=device)
    token = packops.cross_entropy(logits, labels, reduction="none")
    sequence_mean = packops.cross_entropy(logits, labels, cu_seqlens=cu_seqlens, reduction="seq-mean-token-mean")
    torch.testing.assert_close(sequence_mean, (token[:7].mean() + token[7:].mean()) / 2)
    torch.testing.assert_close(packops.cross_entropy(logits, labels, cu_seqlens=cu_seqlens), token.sum() / 9)


def test_shift_equals_masked_labels(device):
    logits, ids = torch.randn(12, 7, device=device), torch.randint(0, 7, (12,), device=device)
    cu_seqlens = torch.tensor([0, 5, 6, 12], device=device)
    targets = ids.roll(-1)
    targets[[4, 5, 11]] = -100
    shifted = packops.cross_entropy(logits, ids, cu_seqlens=cu_seqlens, shift=True)
    torch.testing.assert_close(shifted, packops.cross_entropy(logits, targets), rtol=0, atol=0)
    first_masked = ids.clone()
    first_masked[[0, 5, 6]] = -100  # a collator's boundary mask changes nothing
    torch.testing.assert_close(
        packops.cross_entropy(logits, first_masked, cu_seqlens=cu_seqlens, shift=True), shifted, rtol=0, atol=0
    )


@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 257, 1000, 4097, 32777, 50257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vocabularies(device, vocab, dtype):
    logits = (torch.randn(5, vocab, device=device) * 2).to(dtype)
    labels = torch.randint(0, vocab, (5,), device=device)
    labels[0], labels[1] = vocab - 1, 0
    labels[3] = -100
    assert_close(*both(logits, labels), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [32000, 50257, 128256, 129920, 151936, 262144, 400000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_cluster_size(vocab, dtype):
    """More rows than clusters, so that the ring wraps and rows follow each other; ignored rows in between."""
    device = torch.device("cuda")
    rows = 700 if vocab < 200000 else 300
    logits = (torch.randn(rows, vocab, device=device) * 2).to(dtype)
    labels = torch.randint(0, vocab, (rows,), device=device)
    labels[::3] = -100
    ours = logits.clone().requires_grad_()
    loss = packops.cross_entropy(ours, labels)
    loss.backward()
    sample = torch.tensor([0, 1, 2, rows // 2, rows - 2, rows - 1], device=device)
    theirs = logits[sample].double().requires_grad_()
    F.cross_entropy(theirs, labels[sample], reduction="sum").backward()
    count = (labels != -100).sum()
    total = F.cross_entropy(logits.float(), labels)
    torch.testing.assert_close(loss, total, rtol=2e-6, atol=2e-6)
    assert_close(total, total.double(), ours.grad[sample], theirs.grad / count, dtype)
    with torch.no_grad():  # the forward alone, which keeps no row
        torch.testing.assert_close(packops.cross_entropy(logits, labels), total, rtol=2e-6, atol=2e-6)


STRIDED = {
    "slice of a padded vocabulary": lambda base: base[..., :33],
    "slice that begins off a 16-byte boundary": lambda base: base[..., 3:36],
    "transposed (S, B, V)": lambda base: base.transpose(0, 1),
    "every second row": lambda base: base[:, ::2],
    "strided last dimension": lambda base: base[..., ::2],
    "three strides": lambda base: base.view(2, 4, 3, 40)[:, :3, ::2],
    "expanded rows": lambda base: base[:, :1].expand(4, 5, 40),
}


@pytest.mark.parametrize("view", STRIDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_logits(device, view, dtype):
    logits = STRIDED[view](torch.randn(4, 6, 40, device=device).to(dtype))
    labels = torch.randint(0, logits.shape[-1], logits.shape[:-1], device=device)
    assert_close(*both(logits, labels, reduction="sum"), dtype)


def test_strided_labels_and_int32(device):
    logits = torch.randn(6, 4, 9, device=device)
    labels = torch.randint(0, 9, (4, 6), device=device).t()
    expected = F.cross_entropy(logits.reshape(-1, 9), labels.reshape(-1))
    torch.testing.assert_close(packops.cross_entropy(logits, labels), expected)
    torch.testing.assert_close(packops.cross_entropy(logits, labels.int()), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("confidence", [0.9, 0.99, 0.999, 0.9999])
def test_confident_rows_keep_their_gradient(device, dtype, confidence):
    """p - 1 of the true class must be one fp32 expression, rounded once: random logits never show this."""
    vocab = 1000
    logits = torch.zeros(4, vocab, device=device)
    labels = torch.tensor([0, 1, 500, 999], device=device)
    gap = math.log(confidence / (1 - confidence) * (vocab - 1))
    logits[torch.arange(4), labels] = gap
    logits = (logits + torch.randn(4, 1, device=device)).to(dtype)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    packops.cross_entropy(ours, labels, reduction="sum").backward()
    F.cross_entropy(theirs, labels, reduction="sum").backward()
    at = torch.arange(4), labels
    error = ((ours.grad[at].double() - theirs.grad[at]) / theirs.grad[at]).abs().max()
    assert error <= EPS[dtype] + 16 * 2.0**-23 / (1 - confidence)  # one ulp, and 16 fp32 ulps of its terms, 1 and p


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_less_accurate_than_torch(device, dtype):
    """Root mean square error against fp64 next to F.cross_entropy(x.float()), with some rows confident."""
    vocab = 5000
    logits = torch.randn(64, vocab, device=device) * 4
    labels = torch.randint(0, vocab, (64,), device=device)
    logits[torch.arange(32), labels[:32]] += 25
    logits = logits.to(dtype)
    g = 0.37 if dtype != torch.float16 else 1024.0
    ours, torchs, exact = (logits.clone().requires_grad_(), logits.clone().requires_grad_(), logits.double().requires_grad_())
    packops.cross_entropy(ours, labels).backward(torch.tensor(g, device=device))
    F.cross_entropy(torchs.float(), labels).backward(torch.tensor(g, device=device))
    F.cross_entropy(exact, labels).backward(torch.tensor(g, device=device, dtype=torch.float64))
    rms = [(x.grad.double() - exact.grad).square().mean().sqrt().item() for x in (ours, torchs)]
    assert rms[0] <= (1.05 if dtype != torch.float32 else 2) * rms[1], rms


def test_infinite_and_huge_logits(device):
    vocab = 70000  # longer than any block of the kernels
    lowest = torch.finfo(torch.float32).min
    rows = []
    for begin, end, value in [(0, 40000, -math.inf), (30000, 69990, -math.inf), (0, 69000, lowest), (0, 0, 0.0)]:
        row = torch.randn(vocab)
        row[begin:end] = value
        rows.append(row)
    rows.append(torch.full((vocab,), lowest))
    rows.append(torch.randn(vocab) * 1e4 + 6.5e4)
    rows.append(torch.randn(vocab) * 1e37)
    labels = torch.tensor([69999, 69995, 69999, 5, 7, 11, 13], device=device)
    logits = torch.stack(rows).to(device)
    assert_close(*both(logits, labels, reduction="none"), torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        given = logits.to(dtype)
        given[4] = torch.finfo(dtype).min  # bf16 would round fp32's to -inf
        loss, stats = packops.cross_entropy(given, labels, reduction="none", return_stats=True)
        torch.testing.assert_close(
            loss.double(), reference.cross_entropy(given.double(), labels, reduction="none"), rtol=1e-5, atol=1e-5
        )
        log_p = given.double().log_softmax(-1)
        entropy = -torch.where(log_p.isneginf(), 0.0, log_p.exp() * log_p).sum(-1)
        torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    logits[0, 69999] = -math.inf  # an impossible target: infinite loss, finite gradient
    loss, expected, grad, expected_grad = both(logits[:1], labels[:1], reduction="none")
    assert loss.item() == expected.item() == math.inf
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-7)
    for value in (math.nan, math.inf):  # bad numbers in a counted row must show
        logits[3, 60000] = value
        assert not packops.cross_entropy(logits[3:4], labels[3:4]).isfinite()
    assert packops.cross_entropy(torch.full((1, 9), -math.inf, device=device), torch.tensor([3], device=device)).isnan()


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_nothing_counted(device, reduction):
    logits = torch.randn(4, 9, device=device, requires_grad=True)
    loss = packops.cross_entropy(logits, torch.full((4,), -100, device=device), reduction=reduction)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 9), (0, 4, 9), (3, 0, 9), (1, 1), (9,)])
@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_empty_and_tiny(device, shape, reduction):
    logits = torch.randn(shape, device=device, requires_grad=True)
    labels = torch.zeros(shape[:-1], dtype=torch.int64, device=device)
    loss = packops.cross_entropy(logits, labels, reduction=reduction)
    loss.sum().backward()
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    assert logits.grad.shape == shape
    if math.prod(shape[:-1]):
        torch.testing.assert_close(
            loss.sum(), F.cross_entropy(logits.reshape(-1, shape[-1]), labels.reshape(-1), reduction="sum")
        )


def test_no_documents(device):
    logits, labels = torch.randn(3, 5, device=device, requires_grad=True), torch.zeros(3, dtype=torch.int64, device=device)
    loss = packops.cross_entropy(logits, labels, cu_seqlens=torch.zeros(1, dtype=torch.int32, device=device))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_ignored_rows_may_hold_anything(device):
    logits = torch.randn(6, 300, device=device)
    labels = torch.tensor([1, -100, 2, 3, 4, 5], device=device)
    cu_seqlens = torch.tensor([0, 3, 5], device=device)  # row 5 is padding, row 2 and 4 end documents
    logits[[0, 2, 4, 5]] = math.nan
    logits[0, 7] = math.inf
    logits.requires_grad_()
    loss = packops.cross_entropy(logits, labels, cu_seqlens=cu_seqlens, shift=True)
    loss.backward()
    assert loss.isfinite()
    assert (logits.grad[[0, 2, 4, 5]] == 0).all()  # row 0 predicts the ignored label of row 1
    assert logits.grad[[1, 3]].isfinite().all()
    assert (logits.grad[[1, 3]] != 0).any()


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "shift": True}])
@pytest.mark.parametrize("form", ["plain", "in place", "linear", "linear, num_valid", "shards"])
def test_a_row_of_weight_zero_is_not_counted(device, reduction, options, form):
    """It is not read, whatever it holds, and counts in no denominator: as if its label were ignored."""
    from test_vocab_parallel import sharded

    rows, vocab = 24, 300
    weight = torch.rand(rows, device=device) + 0.5
    weight[[0, 2, 3, 9, 10, 11, 12, 20]] = torch.tensor([0.0, -0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], device=device)
    hidden, classes = torch.randn(rows, 16, device=device), torch.randn(vocab, 16, device=device)
    labels = torch.randint(0, vocab, (rows,), device=device)
    cu_seqlens = torch.tensor([0, 5, 9, 13, 23], device=device)  # nothing counts in [9, 13)
    options = {**options, "reduction": reduction, "cu_seqlens": cu_seqlens}
    shift = int(options.pop("shift", False))
    masked = labels.roll(-shift).masked_fill(weight == 0, -100)
    if shift:
        masked[cu_seqlens[1:].long() - 1] = -100
    options["class_weight"] = torch.rand(vocab, device=device) + 0.5

    def run(poison, labels, **more):
        h, w = hidden.clone(), classes.clone().requires_grad_()
        if poison and form.startswith("linear"):
            h[weight == 0] = torch.tensor([math.nan, math.inf], device=device).repeat(8)
        h.requires_grad_()
        if form.startswith("linear"):
            extra = {"num_valid": 20} if "num_valid" in form else {}
            loss = packops.linear_cross_entropy(h, w, labels, **options, **more, **extra)
            loss.sum().backward()
            return loss.detach(), h.grad, w.grad
        logits = (hidden @ classes.t()).detach()
        if poison:
            logits[[0, 3]], logits[2, 5], logits[[9, 10, 11, 12]], logits[20] = math.nan, math.inf, -math.inf, math.nan
        if form == "shards":
            return sharded(logits, labels, (100, 0, 200), **options, **more)
        logits.requires_grad_()
        loss, stats = packops.cross_entropy(logits * 1, labels, **options, **more, return_stats=True, inplace=form == "in place")
        loss.sum().backward()
        return loss.detach(), logits.grad, *stats

    got = run(True, labels, token_weight=weight, shift=bool(shift))
    want = run(False, masked, token_weight=weight)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert got[0].isfinite().all()
    if form != "linear":
        assert (got[1][weight == 0] == 0).all()


def test_a_class_of_weight_zero_contributes_nothing_as_in_torch(device):
    weight = torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0], device=device)
    logits, labels = torch.randn(6, 5, device=device), torch.tensor([0, 1, 3, 2, 4, 0], device=device)
    for options in ({}, {"label_smoothing": 0.2}):
        ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
        loss = packops.cross_entropy(ours, labels, class_weight=weight, **options)
        expected = F.cross_entropy(theirs, labels, weight=weight, **options)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_output_of_every_kind(device, dtype):
    logits, labels = (torch.randn(4, 6, 33, device=device)).to(dtype), torch.randint(0, 33, (4, 6), device=device)
    labels[1, 2] = -100
    pool = torch.randn(6, 8, device=device)
    for grad_output in (
        torch.randn(4, 6, device=device),
        pool.t()[:4],  # transposed
        pool[:4, :6][:, ::1],
        torch.randn(1, device=device).expand(4, 6),
        torch.randn(4, 1, device=device).expand(4, 6),
        torch.randn(4, 12, device=device)[:, ::2],
    ):
        assert_close(*both(logits, labels, grad_output, reduction="none"), dtype)
    for value in (0.0, 1.0, 0.37, -2.0, 65536.0 if dtype != torch.float16 else 512.0):
        assert_close(*both(logits, labels, torch.tensor(value, device=device)), dtype)


@pytest.mark.parametrize(
    "loss", [packops.cross_entropy, functools.partial(packops.linear_cross_entropy, weight=torch.ones(9, 9))]
)
def test_num_items_that_no_float_can_hold(loss):
    with pytest.raises(ValueError, match="num_items must be positive and finite"):
        loss(torch.randn(4, 9), labels=torch.arange(4), num_items=10**400)


@pytest.mark.parametrize("reduction, inplace, roundings", [("sum", False, 1), ("sum", True, 2), ("none", True, 1)])
def test_in_place_rounds_bf16_twice_at_most(device, reduction, inplace, roundings):
    logits, labels = torch.randn(40, 33, device=device).bfloat16(), torch.randint(0, 33, (40,), device=device)
    leaf, exact = logits.clone().requires_grad_(), logits.double().cpu().requires_grad_()
    (packops.cross_entropy(leaf * 1, labels, reduction=reduction, inplace=inplace) * 1.7).sum().backward()
    (1.7 * F.cross_entropy(exact, labels.cpu(), reduction="sum")).backward()
    error = ((leaf.grad.double().cpu() - exact.grad) / exact.grad).abs().max()
    assert error <= roundings * 2**-8 * (1 + 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_and_two_losses(device, dtype, reduction):
    logits, labels = torch.randn(7, 65, device=device).to(dtype).requires_grad_(), torch.randint(0, 65, (7,), device=device)
    loss = packops.cross_entropy(logits, labels, reduction=reduction).sum()
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    kept = first.clone()
    scaled = torch.autograd.grad(loss * 3, logits, retain_graph=True)[0]
    torch.testing.assert_close(first, kept, rtol=0, atol=0)  # the second backward left the first one's result alone
    last = torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(last, first, rtol=0, atol=0)
    torch.testing.assert_close(scaled.float(), 3 * first.float(), rtol=2 * EPS[dtype], atol=2.0**-24)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    logits.grad = None
    (packops.cross_entropy(logits, labels) + 0.5 * packops.cross_entropy(logits, labels.flip(0))).backward()
    exact = logits.detach().double().requires_grad_()
    (F.cross_entropy(exact, labels) + 0.5 * F.cross_entropy(exact, labels.flip(0))).backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2 * EPS[dtype], atol=2 * EPS[dtype] * 0.2)


ODD = {  # nothing that fp32 holds exactly
    "label_smoothing": 0.1,
    "z_loss": 0.1,
    "softcap": 3.3,
    "logit_scale": 0.7,
    "num_items": 2.7,
    "token_weight": torch.linspace(0.1, 0.9, 5, dtype=torch.float64),
    "class_weight": torch.linspace(0.1, 0.9, 33, dtype=torch.float64),
}


@pytest.mark.parametrize("option", ODD)
@pytest.mark.parametrize("function", ["cross_entropy", "linear_cross_entropy"])
def test_options_are_double_where_the_logits_are(function, option):
    options = {option: ODD[option], "reduction": "seq-mean-token-mean"}
    labels, hidden, weight = torch.tensor([3, 32, 0, -100, 7]), torch.randn(5, 6).double(), torch.randn(33, 6).double()
    inputs = [hidden @ weight.t()] if function == "cross_entropy" else [hidden, weight]
    ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    loss = getattr(packops, function)(*ours, labels, **options)
    expected = getattr(reference, function)(*theirs, labels, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    loss.backward()
    expected.backward()
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [7, 33, 5000])
@pytest.mark.parametrize("sign", [1, -1])
def test_smoothing_of_huge_logits_overflows_upwards(device, dtype, vocab, sign):
    """The sum of a row overflows, to either side. The loss was -inf where torch's is +inf."""
    logits = torch.zeros(2, vocab, dtype=dtype, device=device)
    logits[:, 1::2] = sign * 3e38
    labels = torch.tensor([0, 1], device=device)
    loss = packops.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), labels, label_smoothing=0.1, reduction="none"))


def test_double_backward_is_refused(device):
    logits = torch.randn(3, 5, device=device, requires_grad=True)
    loss = packops.cross_entropy(logits, torch.zeros(3, dtype=torch.int64, device=device))
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable once"):
        grad.sum().backward()


def test_checkpointing(device):
    weight = torch.randn(65, 16, device=device, requires_grad=True)
    hidden, labels = torch.randn(10, 16, device=device), torch.randint(0, 65, (10,), device=device)

    def loss(weight):
        return packops.cross_entropy(hidden @ weight.t(), labels)

    expected = torch.autograd.grad(loss(weight), weight)[0]
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(loss, weight, use_reentrant=False), weight)[0]
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


@pytest.mark.parametrize("inplace", [False, True])
def test_fp16_under_a_loss_scale(device, inplace):
    """Gradients far below fp16's smallest number must survive, also where the logits get overwritten."""
    logits = (torch.randn(4, 3000, device=device) * 0.1).half()
    targets = torch.randint(0, 3000, (4,), device=device)
    scale = 2.0**16
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    (packops.cross_entropy(ours * 1, targets, num_items=100000, inplace=inplace) * scale).backward()
    (F.cross_entropy(exact, targets, reduction="sum") / 100000 * scale).backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=2.0**-10, atol=2.0**-24)


@pytest.mark.parametrize("reduction", ["mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_num_items_of_every_type(device, reduction):
    logits, labels = torch.randn(8, 9, device=device), torch.randint(0, 9, (8,), device=device)
    cu_seqlens = torch.tensor([0, 3, 8], device=device)
    expected = reference.cross_entropy(logits, labels, cu_seqlens=cu_seqlens, reduction=reduction, num_items=7).float()
    tensors = [
        torch.tensor(7, dtype=t, device=d)
        for t in (torch.int32, torch.int64, torch.float32, torch.float64, torch.bfloat16, torch.uint8)
        for d in {torch.device("cpu"), device}
    ]
    for num_items in (7, 7.0, *tensors, torch.tensor([7], device=device)):
        loss = packops.cross_entropy(logits, labels, cu_seqlens=cu_seqlens, reduction=reduction, num_items=num_items)
        torch.testing.assert_close(loss, expected)
    for other in ("sum", "none"):
        with pytest.raises(ValueError, match="num_items"):
            packops.cross_entropy(logits, labels, reduction=other, num_items=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_num_items_may_be_fractional(device, dtype):
    """Token weights make fractional counts; 7.5 is exact in every dtype."""
    logits, labels = torch.randn(8, 9, device=device), torch.randint(0, 9, (8,), device=device)
    expected = packops.cross_entropy(logits, labels, reduction="sum") / 7.5
    for num_items in (7.5, torch.tensor(7.5, dtype=dtype), torch.tensor(7.5, dtype=dtype, device=device)):
        torch.testing.assert_close(packops.cross_entropy(logits, labels, num_items=num_items), expected)


def test_weights_and_documents_in_any_layout_and_dtype(device):
    """Every second element of a longer tensor, in another float dtype, or expanded: as if it were contiguous fp32."""
    logits, labels = torch.randn(6, 9, device=device), torch.randint(0, 9, (6,), device=device)
    token_weight, class_weight = torch.rand(6, device=device) + 0.1, torch.rand(9, device=device) + 0.1
    cu_seqlens = torch.tensor([0, 1, 6], device=device)

    def loss(token_weight=token_weight, class_weight=class_weight, cu_seqlens=cu_seqlens):
        return packops.cross_entropy(
            logits,
            labels,
            token_weight=token_weight,
            class_weight=class_weight,
            cu_seqlens=cu_seqlens,
            reduction="seq-mean-token-mean",
        )

    def strided(x):
        return torch.stack([x, x.flip(0) + 1], dim=-1)[:, 0]

    expected = loss()
    assert torch.equal(loss(strided(token_weight), strided(class_weight), strided(cu_seqlens)), expected)
    assert torch.equal(loss(token_weight.double(), class_weight.double(), cu_seqlens.int()), expected)
    rounded = loss(token_weight.bfloat16().float(), class_weight.half().float())
    assert torch.equal(loss(token_weight.bfloat16(), class_weight.half()), rounded)
    one = torch.full((1,), 0.5, device=device)
    assert torch.equal(loss(one.expand(6), one.expand(9)), loss(one.repeat(6), one.repeat(9)))


def test_micro_batches_add_up(device):
    """Token counts differ: with the global count the micro-batches' losses and gradients are the big batch's."""
    logits, labels = torch.randn(16, 21, device=device, requires_grad=True), torch.randint(0, 21, (16,), device=device)
    labels[:5] = -100
    whole = packops.cross_entropy(logits, labels)
    expected = torch.autograd.grad(whole, logits)[0]
    parts = [packops.cross_entropy(logits[a:b], labels[a:b], num_items=11) for a, b in ((0, 6), (6, 7), (7, 16))]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), logits)[0], expected)


def test_statistics(device):
    vocab = 1500
    logits, labels = torch.randn(10, vocab, device=device) * 2, torch.randint(0, vocab, (10,), device=device)
    labels[2] = -100
    logits[4, 700] = logits[4, 30] = logits[4, 1499] = 50.0  # a tie: the first index counts
    labels[4] = 30
    cu_seqlens = torch.tensor([0, 3, 3, 9], device=device)
    logits.requires_grad_()
    for reduction in ("mean", "seq-mean-token-sum", "none"):
        arguments = {"cu_seqlens": cu_seqlens, "reduction": reduction, "softcap": 40.0}
        loss, stats = packops.cross_entropy(logits, labels, **arguments, return_stats=True)
        torch.testing.assert_close(loss, packops.cross_entropy(logits, labels, **arguments))
        counted = (labels != -100) & (torch.arange(10, device=device) < 9)
        x = 40 * torch.tanh(logits.detach().double() / 40)
        p = x.softmax(-1)
        token = F.cross_entropy(x, labels, reduction="none")
        assert stats.num_tokens == 8
        assert stats.num_sequences == 2
        torch.testing.assert_close(stats.lse.double(), torch.where(counted, x.logsumexp(-1), 0.0))
        torch.testing.assert_close(
            stats.entropy.double(), torch.where(counted, -(p * p.log()).nan_to_num().sum(-1), 0.0), rtol=1e-5, atol=1e-5
        )
        assert stats.prediction.tolist() == torch.where(counted, x.argmax(-1), -1).tolist()
        assert stats.prediction[4] == 30
        assert stats.correct.tolist() == (counted & (x.argmax(-1) == labels)).tolist()
        expected = [token[[0, 1]], token[:0], token[3:9]]
        combine = (lambda t: t.sum()) if reduction == "seq-mean-token-sum" else (lambda t: t.mean() if t.numel() else t.sum())
        torch.testing.assert_close(
            stats.sequence_loss.double(), torch.stack([combine(t) for t in expected]), rtol=1e-5, atol=1e-5
        )
        assert not any(s.requires_grad for s in stats)
    loss.sum().backward()
    assert logits.grad.isfinite().all()


def test_sequence_loss_is_weighted(device):
    logits, labels = torch.randn(9, 11, device=device), torch.randint(0, 11, (9,), device=device)
    weight, class_weight = torch.rand(9, device=device) + 0.1, torch.rand(11, device=device) + 0.1
    cu_seqlens = torch.tensor([0, 2, 9], device=device)
    options = {"cu_seqlens": cu_seqlens, "token_weight": weight, "class_weight": class_weight}
    token = packops.cross_entropy(logits, labels, reduction="none", **options)  # weighted already
    for reduction in ("seq-mean-token-mean", "seq-mean-token-sum"):
        _, stats = packops.cross_entropy(logits, labels, reduction=reduction, return_stats=True, **options)
        shares = weight * class_weight[labels] if reduction == "seq-mean-token-mean" else torch.ones_like(weight)
        expected = [token[a:b].sum() / (shares[a:b].sum() if "token-mean" in reduction else 1) for a, b in ((0, 2), (2, 9))]
        torch.testing.assert_close(stats.sequence_loss, torch.stack(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_place(device, dtype, reduction):
    source, labels = torch.randn(9, 129, device=device).to(dtype), torch.randint(0, 129, (9,), device=device)
    labels[4] = -100
    leaf = source.clone().requires_grad_()
    for g in (1.0, 0.5, 0.37):
        logits = leaf * 1
        upstream = logits.exp()  # saves its own output, not the logits
        address = logits.data_ptr()
        loss = packops.cross_entropy(logits, labels, reduction=reduction, inplace=True)
        grad = torch.autograd.grad(loss.sum() * g, logits, retain_graph=False)[0]
        expected = both(source, labels, torch.full_like(loss, g).detach(), reduction=reduction)[3]
        assert grad.data_ptr() == address
        torch.testing.assert_close(grad.double(), expected, rtol=2 * EPS[dtype], atol=1e-6)
        del upstream
    tanh = (leaf * 1).tanh()
    loss = packops.cross_entropy(tanh, labels, inplace=True)
    if dtype != torch.float16:  # tanh saved what was overwritten: autograd must notice
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    with pytest.raises(ValueError, match="leaf"):
        packops.cross_entropy(leaf, labels, inplace=True)
    with torch.no_grad():
        kept = source.clone()
        packops.cross_entropy(kept, labels, inplace=True)
        torch.testing.assert_close(kept, source, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_place_writes_strided_rows_where_they_are(device, dtype, reduction):
    labels = torch.randint(0, 33, (4, 5), device=device)
    leaf = torch.randn(5, 4, 40, device=device).to(dtype).requires_grad_()
    wide = leaf * 1
    logits = wide[..., 2:35].transpose(0, 1)  # a slice of a padded vocabulary, (S, B, V) seen as (B, S, V)
    beside = wide[..., 35:].detach().clone()
    loss = packops.cross_entropy(logits * 1, labels, reduction=reduction).sum()
    (expected,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    loss = packops.cross_entropy(logits, labels, reduction=reduction, inplace=True).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected, rtol=2 * EPS[dtype], atol=1e-6)
    torch.testing.assert_close(wide[..., 2:35].detach(), expected[..., 2:35], rtol=2 * EPS[dtype], atol=1e-6)
    assert torch.equal(wide[..., 35:].detach(), beside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_place_refuses_rows_it_would_have_to_copy(device, dtype, reduction):
    """The gradient would land in the copy, and the logits would pass for it."""
    leaf = torch.randn(3, 8, 4, 12, device=device).to(dtype).requires_grad_()
    logits = (leaf * 1)[:, :6:2, ::2]  # three strides, which do not collapse
    labels = torch.zeros(3, 3, 2, dtype=torch.int64, device=device)
    before = logits.detach().clone()
    with pytest.raises(ValueError, match="needs logits with a contiguous last dimension and at most two strided leading ones"):
        packops.cross_entropy(logits, labels, reduction=reduction, inplace=True)
    assert torch.equal(logits, before)


def test_rows_further_apart_than_32_bits_can_say(device):
    """Two rows 2^31 elements apart, of which nothing between is touched: on the CPU that costs addresses, not memory."""
    try:
        memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:
        if device.type == "cuda":
            raise
        pytest.skip(f"no 4 GiB of addresses: {error}")
    logits, labels = memory.as_strided((2, 40), (2**31, 1)), torch.tensor([3, 39], device=device)
    logits.copy_(torch.randn(2, 40))
    near = logits.contiguous()
    expected, expected_grad = packops.cross_entropy(near, labels), both(near, labels)[3]
    far = logits.requires_grad_()
    loss = packops.cross_entropy(far, labels)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, far)[0].double(), expected_grad, rtol=2.0**-7, atol=1e-6)
    with torch.no_grad():
        _, _, floats, ints, *_ = torch.ops.packops._cross_entropy_forward(far, labels)
        torch.ops.packops._cross_entropy_backward_(far, torch.ones((), device=device), None, floats, ints, holds_gradient=False)
    torch.testing.assert_close(far.detach().double(), expected_grad, rtol=2.0**-7, atol=1e-6)


def test_in_place_keeps_retained_graphs_right(device):
    leaf, labels = torch.randn(5, 33, device=device, requires_grad=True), torch.randint(0, 33, (5,), device=device)
    expected = torch.autograd.grad(packops.cross_entropy(leaf, labels), leaf)[0]
    loss = packops.cross_entropy(leaf * 1, labels, inplace=True)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(loss * 2, leaf, retain_graph=True)[0], 2 * expected)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected)


@pytest.mark.parametrize("form", ["linear_cross_entropy", "vocab_parallel_cross_entropy", "vocab_parallel_linear_cross_entropy"])
def test_every_form_of_the_loss_takes_the_same_options(form):
    """Every signature spells them out; a default that differed in one would be a trap."""
    plain, other = (inspect.signature(getattr(packops, name)).parameters for name in ("cross_entropy", form))
    missing = {"logits"} | ({"return_stats"} - set(other)) | ({"inplace"} if "linear" in form else set())
    shared = {name: str(option) for name, option in plain.items() if name not in missing}
    assert shared == {name: str(option) for name, option in other.items() if name in plain}


def test_calls_leak_nothing():
    """torch's own conversion of a string argument leaks a heap string, 80 bytes, per call: csrc/torch/string.h does not."""

    class Mallinfo2(ctypes.Structure):
        _fields_ = [
            (name, ctypes.c_size_t) for name in ["arena", "a", "b", "c", "d", "e", "f", "uordblks", "fordblks", "keepcost"]
        ]

    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("needs glibc 2.33 to count allocated bytes")
    mallinfo2.restype = Mallinfo2
    logits, labels, ops = torch.randn(2, 3), torch.zeros(2, dtype=torch.int64), torch.ops.packops
    reduction, classes = {"reduction": "seq-mean-token-mean"}, {"first_class": 0, "vocab_size": 3}

    def allocated_after(calls):
        for _ in range(calls):
            ops.cross_entropy(logits, labels, **reduction)
            ops._cross_entropy_prepare(3, labels, **reduction)
            partial, floats, ints = ops._cross_entropy_partial(logits, labels, **reduction, **classes)
            ops._cross_entropy_combine(partial, logits, floats, ints, **reduction, **classes)
        return mallinfo2().uordblks

    before = allocated_after(200)
    assert allocated_after(2000) - before < 2000 * 8


def test_inputs_are_left_alone(device):
    logits, labels = torch.randn(6, 40, device=device), torch.randint(0, 40, (6,), device=device)
    before = logits.clone(), labels.clone()
    x = logits.requires_grad_()
    packops.cross_entropy(x, labels).backward(torch.tensor(2.0, device=device))
    assert torch.equal(x.detach(), before[0])
    assert torch.equal(labels, before[1])


# ------------------------------------------------------------------------------------------------------------ bad data


def test_bad_label(device):
    logits = torch.randn(4, 9, device=device, requires_grad=True)
    for bad in (9, -1, 2**32 + 3, -(2**40)):
        labels = torch.tensor([1, bad, -100, 3], device=device)
        if device.type == "cpu":
            with pytest.raises(IndexError, match=rf"label {bad} at position 1 is outside \[0, 9\)"):
                packops.cross_entropy(logits, labels)
            with pytest.raises(IndexError, match="outside"):
                torch.ops.packops.cross_entropy(logits, labels)
            continue
        assert packops.cross_entropy(logits, labels).isnan()
        token = packops.cross_entropy(logits, labels, reduction="none")
        assert token[1].isnan()
        assert token[[0, 2, 3]].isfinite().all()
        logits.grad = None
        packops.cross_entropy(logits, labels, reduction="sum").backward()
        assert (logits.grad[1] == 0).all()
        assert (logits.grad[0] != 0).all()
        packops.checks(True)
        try:
            with pytest.raises(IndexError, match=rf"label {bad} at position 1"):
                packops.cross_entropy(logits, labels)
        finally:
            packops.checks(False)
    ignored = torch.tensor([1, 5, 5, 3], device=device)
    torch.testing.assert_close(
        packops.cross_entropy(logits, ignored, ignore_index=5), F.cross_entropy(logits, ignored, ignore_index=5)
    )


def test_bad_cu_seqlens(device):
    logits, labels = torch.randn(6, 9, device=device), torch.randint(0, 9, (6,), device=device)
    for bad in ([1, 6], [0, 4, 3, 6], [0, 7], [-3, 6], [0, 2**31 - 1], [5, 4, 3, 2, 1]):
        cu_seqlens = torch.tensor(bad, device=device)
        if device.type == "cuda":
            for reduction in reference.REDUCTIONS:  # any value, but no access outside and no broken context
                packops.cross_entropy(logits, labels, cu_seqlens=cu_seqlens, shift=True, reduction=reduction).sum().item()
            packops.checks(True)
        try:
            with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
                packops.cross_entropy(logits, labels, cu_seqlens=cu_seqlens)
        finally:
            packops.checks(False)


def bad_arguments(device):
    x, y = torch.randn(4, 9, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    return {
        "labels of floats": ((x, y.float()), {}, TypeError, "labels must be int32 or int64, got"),
        "logits of integers": ((x.long(), y), {}, TypeError, "logits must be float32, float16 or bfloat16"),
        "labels too few": ((x, y[:3]), {}, ValueError, r"labels must have the logits' leading shape, got \(3,\)"),
        "labels flattened": ((x.view(2, 2, 9), y), {}, ValueError, "leading shape"),
        "no leading dimension": ((x[0, 0], y[0]), {}, ValueError, "logits must have shape"),
        "unknown reduction": (
            (x, y),
            {"reduction": "average"},
            ValueError,
            "reduction must be none, sum, mean, .* got 'average'",
        ),
        "label_smoothing above 1": ((x, y), {"label_smoothing": 1.5}, ValueError, "label_smoothing"),
        "label_smoothing NaN": ((x, y), {"label_smoothing": math.nan}, ValueError, "label_smoothing"),
        "softcap 0": ((x, y), {"softcap": 0.0}, ValueError, "softcap"),
        "logit_scale negative": ((x, y), {"logit_scale": -1.0}, ValueError, "logit_scale"),
        "z_loss negative": ((x, y), {"z_loss": -1.0}, ValueError, "z_loss"),
        "class_weight too short": (
            (x, y),
            {"class_weight": torch.ones(8, device=device)},
            ValueError,
            r"class_weight must have shape \(9,\) or be one row of 9, got shape",
        ),
        "token_weight too short": (
            (x, y),
            {"token_weight": torch.ones(3, device=device)},
            ValueError,
            r"token_weight must have shape \(4,\) or be one row of 4, got shape",
        ),
        "token_weight of integers": ((x, y), {"token_weight": y}, TypeError, "token_weight must be floating point"),
        "cu_seqlens of floats": (
            (x, y),
            {"cu_seqlens": torch.zeros(2, device=device)},
            TypeError,
            "cu_seqlens must be int32 or int64",
        ),
        "cu_seqlens in two dimensions": (
            (x, y),
            {"cu_seqlens": torch.zeros(2, 2, dtype=torch.int32, device=device)},
            ValueError,
            "cu_seqlens must have shape",
        ),
        "num_items of two": ((x, y), {"num_items": torch.ones(2, device=device)}, ValueError, "num_items must hold one number"),
        "no class": ((torch.empty(3, 0, device=device), y[:3]), {}, ValueError, "at least one class"),
    }


def bad_arguments_on_cuda(device):
    x, y = torch.randn(4, 9, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    return {
        "labels on the host": ((x, y.cpu()), {}, ValueError, "labels must be on the device of logits"),
        "fp64": ((x.double(), y), {}, TypeError, "float64"),
    }


def assert_refused(case, entry):
    args, kwargs, error, message = case
    call = packops.cross_entropy if entry == "function" else torch.ops.packops.cross_entropy
    with pytest.raises(error, match=message):
        call(*args, **kwargs)


@pytest.mark.parametrize("case", bad_arguments("cpu"))
@pytest.mark.parametrize("entry", ["function", "op"])
def test_bad_arguments_are_named(device, case, entry):
    assert_refused(bad_arguments(device)[case], entry)


@pytest.mark.gpu
@pytest.mark.parametrize("case", bad_arguments_on_cuda("cpu"))
@pytest.mark.parametrize("entry", ["function", "op"])
def test_bad_arguments_on_cuda_are_named(case, entry):
    assert_refused(bad_arguments_on_cuda("cuda")[case], entry)


# ------------------------------------------------------------------------------------------------- torch's own machinery


OPCHECK_OPTIONS = [
    {},
    {"shift": True, "reduction": "none", "label_smoothing": 0.1},
    {"reduction": "seq-mean-token-mean", "softcap": 3.0, "z_loss": 0.01},
]


@pytest.mark.parametrize("options", OPCHECK_OPTIONS)
def test_opcheck(device, options):
    labels = torch.randint(0, 9, (2, 5), device=device)
    logits = torch.randn(2, 5, 9, device=device)
    cu_seqlens = torch.tensor([0, 3, 8], device=device)
    weight = torch.rand(9, device=device)
    ops = torch.ops.packops
    arguments = {"cu_seqlens": cu_seqlens, "class_weight": weight, **options}
    torch.library.opcheck(ops.cross_entropy.default, (logits.clone().requires_grad_(), labels), arguments)
    torch.library.opcheck(ops.cross_entropy_stats.default, (logits.clone().requires_grad_(), labels), arguments)
    for stats in (False, True):
        torch.library.opcheck(
            ops._cross_entropy_forward.default, (logits, labels), {**arguments, "with_grad": True, "with_stats": stats}
        )
        torch.library.opcheck(ops._cross_entropy_forward_.default, (logits.clone(), labels), {**arguments, "with_stats": stats})
    loss, grad, floats, ints, *_ = ops._cross_entropy_forward(logits, labels, **arguments, with_grad=True)
    maths = {k: v for k, v in arguments.items() if k in ("class_weight", "label_smoothing", "z_loss", "softcap")}
    g = torch.randn_like(loss)
    torch.library.opcheck(ops._cross_entropy_backward.default, (g, logits, floats, ints), maths)
    torch.library.opcheck(ops._cross_entropy_backward_.default, (grad, g, logits, floats, ints), maths)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fakes_know_dtypes_strides_and_documents(device, dtype):
    """What opcheck above does not vary: fp32 losses of 16-bit logits, gradients in the order of (S, B, V), no cu_seqlens."""
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("fp64 is for the CPU")
    logits = torch.randn(4, 2, 8, device=device).to(dtype).transpose(0, 1)
    labels = torch.randint(0, 8, (2, 4), device=device)
    ops, only = torch.ops.packops, {"test_utils": "test_faketensor"}
    for options in ({"reduction": "none"}, {"reduction": "seq-mean-token-mean"}):
        torch.library.opcheck(ops.cross_entropy.default, (logits, labels), options, **only)
        torch.library.opcheck(ops.cross_entropy_stats.default, (logits, labels), options, **only)
        torch.library.opcheck(
            ops._cross_entropy_forward.default, (logits, labels), {**options, "with_grad": True, "with_stats": True}, **only
        )
        loss, _, floats, ints, *_ = ops._cross_entropy_forward(logits, labels, **options)
        torch.library.opcheck(ops._cross_entropy_backward.default, (torch.ones_like(loss), logits, floats, ints), **only)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "mean", "seq-mean-token-mean"])
def test_gradcheck(options, reduction):
    logits = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, -100, 3, 6], [0, 2, 2, 5]])
    arguments = {"shift": True, "reduction": reduction, "token_weight": torch.rand(2, 4), **options_on(options, 7, "cpu")}
    torch.autograd.gradcheck(lambda x: packops.cross_entropy(x, labels, **arguments), (logits,), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_whole_with_dynamic_shapes(device, reduction):
    def model(hidden, weight, labels, cu_seqlens):
        logits = hidden @ weight.t()
        loss, stats = packops.cross_entropy(
            logits, labels, cu_seqlens=cu_seqlens, shift=True, reduction=reduction, return_stats=True
        )
        return packops.cross_entropy(logits, labels).mul(0.5) + loss.sum(), stats.lse

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    weight = torch.randn(33, 8, device=device, requires_grad=True)
    for tokens in (6, 11):
        hidden = torch.randn(tokens, 8, device=device, requires_grad=True)
        arguments = hidden, weight, torch.randint(0, 33, (tokens,), device=device), torch.tensor([0, 4, tokens], device=device)
        results = []
        for f in (compiled, model):
            loss, lse = f(*arguments)
            results.append((loss, lse, *torch.autograd.grad(loss, (hidden, weight))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_export(device):
    class Loss(torch.nn.Module):
        def forward(self, logits, labels):
            return torch.ops.packops.cross_entropy(logits, labels, shift=True)

    arguments = torch.randn(5, 9, device=device), torch.randint(0, 9, (5,), device=device)
    exported = torch.export.export(Loss(), arguments)
    torch.testing.assert_close(exported.module()(*arguments), Loss()(*arguments))


# --------------------------------------------------------------------------------------------------------- determinism


def test_a_document_does_not_see_its_neighbours(device):
    """Its token losses, and with the same denominator its gradient bits, are those it has alone."""
    vocab = 4096  # even: every row begins at the same alignment
    documents = [torch.randn(n, vocab, device=device, dtype=torch.bfloat16) for n in (5, 1, 17)]
    labels = [torch.randint(0, vocab, (d.shape[0],), device=device) for d in documents]
    cu_seqlens = torch.tensor([0, 5, 6, 23], device=device)

    def run(logits, labels, **kwargs):
        logits = logits.clone().requires_grad_()
        token = packops.cross_entropy(logits.detach(), labels, reduction="none", shift=True, **kwargs)
        packops.cross_entropy(logits, labels, shift=True, num_items=20, **kwargs).backward()
        return token, logits.grad

    token, grad = run(torch.cat(documents), torch.cat(labels), cu_seqlens=cu_seqlens)
    for i, (document, label) in enumerate(zip(documents, labels, strict=True)):
        alone_token, alone_grad = run(document, label)
        here = slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
        assert torch.equal(token[here], alone_token)
        assert torch.equal(grad[here], alone_grad)


@pytest.mark.parametrize("reduction", ["mean", "seq-mean-token-mean", "none"])
def test_bitwise_determinism(device, reduction):
    rows = 3000 if device.type == "cuda" else 64
    logits = torch.randn(rows, 1001, device=device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(-20, 1001, (rows,), device=device).clamp(min=-1)
    weight = torch.rand(rows, device=device)
    cu_seqlens = torch.linspace(0, rows, 14, device=device).int()
    results = set()
    for _ in range(10):
        loss = packops.cross_entropy(
            logits, labels, ignore_index=-1, cu_seqlens=cu_seqlens, reduction=reduction, token_weight=weight
        )
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        results.add(
            (loss.detach().double().sum().item(), grad.double().sum().item(), hash(grad[:50].float().cpu().numpy().tobytes()))
        )
    assert len(results) == 1


# ----------------------------------------------------------------------------------------------------------- CUDA only


@pytest.mark.gpu
def test_many_rows_take_the_tiled_preparation():
    """More rows than one block prepares: counts, document sums, the order of rows and its carry over tiles."""
    device = torch.device("cuda")
    rows, vocab = 70000, 64
    logits = torch.randn(rows, vocab, device=device)
    labels = torch.randint(0, vocab, (rows,), device=device)
    labels[torch.rand(rows, device=device) < 0.6] = -100
    bounds = (
        torch.cat([torch.tensor([0]), torch.randint(1, rows - 5, (500,)).sort().values, torch.tensor([rows - 3])])
        .int()
        .to(device)
    )
    for reduction in reference.REDUCTIONS:
        arguments = {"cu_seqlens": bounds, "shift": True, "reduction": reduction, "token_weight": torch.rand(rows, device=device)}
        on_gpu = logits.clone().requires_grad_()
        loss, stats = packops.cross_entropy(on_gpu, labels, **arguments, return_stats=True)
        loss.sum().backward()
        on_cpu = logits.cpu().requires_grad_()
        expected, cpu_stats = packops.cross_entropy(
            on_cpu,
            labels.cpu(),
            **{k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()},
            return_stats=True,
        )
        expected.sum().backward()
        torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(on_gpu.grad.cpu(), on_cpu.grad, rtol=1e-4, atol=1e-8)
        assert stats.num_tokens.item() == cpu_stats.num_tokens.item()
        assert stats.num_sequences.item() == cpu_stats.num_sequences.item()
        torch.testing.assert_close(stats.sequence_loss.cpu(), cpu_stats.sequence_loss, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_no_synchronisation(reduction):
    logits = torch.randn(64, 1000, device="cuda", requires_grad=True)
    labels = torch.randint(0, 1000, (64,), device="cuda")
    arguments = {"cu_seqlens": torch.tensor([0, 30, 64], device="cuda"), "shift": True, "reduction": reduction}
    if reduction not in ("sum", "none"):
        arguments["num_items"] = 60
    packops.cross_entropy(logits, labels, **arguments).sum().backward()
    with no_host_sync():
        loss, _ = packops.cross_entropy(logits, labels, **arguments, return_stats=True)
        (loss.sum() * 3).backward()
        packops.cross_entropy(logits * 1, labels, **arguments, inplace=True).sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [1000, 128256])
def test_cuda_graph_replays_with_other_data(vocab):
    """What counts is data: labels, documents and denominators change under a captured graph, down to nothing counted."""
    logits = torch.randn(40, vocab, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocab, (40,), device="cuda")
    cu_seqlens = torch.tensor([0, 10, 40], device="cuda", dtype=torch.int32)
    num_items = torch.tensor(2.0, device="cuda")

    def step():
        loss = packops.cross_entropy(
            logits, labels, cu_seqlens=cu_seqlens, shift=True, reduction="seq-mean-token-mean", num_items=num_items
        )
        return loss, torch.autograd.grad(loss, logits)[0]

    graph, (loss, grad) = capture(step)
    for ends, ignored in (((0, 10, 40), 0), ((0, 33, 35), 3), ((0, 0, 0), 1)):
        with torch.no_grad():
            logits.copy_(torch.randn_like(logits))
        labels.copy_(torch.randint(0, vocab, (40,), device="cuda"))
        labels[:ignored] = -100
        cu_seqlens.copy_(torch.tensor(ends))
        num_items.fill_(3.0)
        graph.replay()
        expected, expected_grad = step()
        assert torch.equal(loss, expected)
        assert torch.equal(grad, expected_grad)


@pytest.mark.gpu
def test_side_stream():
    logits = torch.randn(256, 32000, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, 32000, (256,), device="cuda")
    expected = packops.cross_entropy(logits, labels)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(5):
        late = torch.zeros_like(logits)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # a kernel on the wrong stream would read the zeros
            late.copy_(logits)
            loss = packops.cross_entropy(late, labels)
        stream.synchronize()
        assert torch.equal(loss, expected)


@pytest.mark.gpu
@pytest.mark.large(gib=30)
@pytest.mark.parametrize("shape", [(70000, 32768), (20000, 151936)])
def test_more_than_two_to_the_31_elements(shape):
    rows, vocab = shape
    logits = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    loss = packops.cross_entropy(logits, labels, reduction="none")
    packops.cross_entropy(logits, labels).backward()
    for t in (0, 2**31 // vocab - 1, 2**31 // vocab, 2**31 // vocab + 1, rows - 1):
        row = logits[t].detach().double().requires_grad_()
        expected = F.cross_entropy(row[None], labels[t : t + 1])
        (expected / rows).backward()
        torch.testing.assert_close(loss[t].double(), expected.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits.grad[t].double(), row.grad, rtol=2.0**-7, atol=1e-12)


@pytest.mark.gpu
def test_peak_memory():
    """The gradient, and rows: nothing else of the logits' size. In place: rows alone."""
    rows, vocab = 1024, 32000
    logits = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    size = logits.numel() * 2

    assert peak_memory(lambda: torch.autograd.grad(packops.cross_entropy(logits, labels), logits)) < size * 1.02
    copy = logits * 1
    assert peak_memory(lambda: torch.autograd.grad(packops.cross_entropy(copy, labels, inplace=True), copy)) < size * 0.02


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)], ids=str)
def test_documents_without_tokens_have_a_loss_of_zero(device, shape, compiled):
    """Every row of a (..., L) batch is a document, of no tokens too: what the compiler was promised is there."""

    def losses(logits, labels):
        hidden, weight = logits[..., :4].contiguous(), torch.ones(5, 4, device=device)
        of_logits = packops.cross_entropy(logits, labels, return_stats=True)[1].sequence_loss
        of_hidden = packops.linear_cross_entropy(hidden, weight, labels, return_stats=True)[1].sequence_loss
        return of_logits + 1, of_hidden + 1

    logits, labels = torch.zeros(*shape, 5, device=device), torch.zeros(shape, dtype=torch.long, device=device)
    for found in (torch.compile(losses, fullgraph=True) if compiled else losses)(logits, labels):
        assert found.tolist() == [1] * math.prod(shape[:-1])


def test_weights_of_another_shape_are_refused(device):
    """Of as many numbers, too: transposed, they would be other tokens'. One row of them is none of these."""
    logits, labels = torch.randn(2, 3, 5, device=device), torch.arange(6, device=device).view(2, 3) % 5
    weight, classes = torch.rand(2, 3, device=device), torch.rand(5, device=device)
    want = packops.cross_entropy(logits, labels, token_weight=weight, class_weight=classes)
    for same in (weight.flatten(), weight.view(1, 6), weight.view(6, 1)):
        assert torch.equal(packops.cross_entropy(logits, labels, token_weight=same, class_weight=classes[None]), want)
    for call in (
        packops.cross_entropy,
        lambda x, y, **given: packops.linear_cross_entropy(x, torch.eye(5, device=device), y, **given),
    ):
        for bad in (weight.t(), weight[..., None].expand(2, 3, 2)[..., 0].reshape(3, 2), weight[:1]):
            with pytest.raises(ValueError, match=r"token_weight must have shape \(2, 3\) or be one row of 6, got shape"):
                call(logits, labels, token_weight=bad)
        with pytest.raises(ValueError, match=r"class_weight must have shape \(5,\) or be one row of 5, got shape \(4,\)"):
            call(logits, labels, class_weight=classes[:4])
    nine = torch.randn(2, 9, device=device)
    with pytest.raises(ValueError, match=r"class_weight must have shape \(9,\) or be one row of 9, got shape \(3, 3\)"):
        packops.cross_entropy(nine, labels[0, :2], class_weight=torch.rand(3, 3, device=device))
