"""Shards of a vocabulary, combined by hand in one process: what the kernels behind ``vocab_parallel_cross_entropy`` compute.

The same over real process groups is in test_distributed.py; this file needs no group, and at most one GPU.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

import packops
from packops import reference
from packops.ops import vocab_shard as raw
from packops.ops.ce_loss import PARTIAL_STATES
from test_ce_loss import DTYPES, EPS, OPTIONS, assert_close, options_on, problem

OPS = raw.raw_ops("packops")
MATHS = ("class_weight", "label_smoothing", "z_loss", "softcap", "logit_scale")


def shards_of(logits, sizes):
    """Views of ``logits``, none contiguous, and where each belongs."""
    begins = [0, *itertools.accumulate(sizes)][:-1]
    shards = [logits[..., begin : begin + size] for begin, size in zip(begins, sizes, strict=True)]
    return shards, [{"first_class": begin, "vocab_size": sum(sizes)} for begin in begins]


def sharded(logits, labels, sizes, grad_output=None, inplace=False, **options):
    """The loss, equal to the bit on every rank, and the gradient put together again."""
    shards, places = shards_of(logits.clone() if inplace else logits, sizes)  # alike in memory: alignment may decide the last bit
    state = [OPS.partial(x, labels, **options, **place) for x, place in zip(shards, places, strict=True)]
    partials = torch.stack([partial for partial, *_ in state])
    maths = {name: options[name] for name in MATHS if name in options}
    reduction = options.get("reduction", "mean")
    losses, grads = [], []
    for x, place, (_, floats, ints) in zip(shards, places, state, strict=True):
        losses.append(OPS.combine(partials, x, floats, ints, reduction=reduction, **maths, **place))
        incoming = torch.ones_like(losses[-1]) if grad_output is None else grad_output
        if inplace:
            OPS.backward_(x, incoming, None, floats, ints, holds_gradient=False, **maths, **place)
            grads.append(x)
        else:
            grads.append(OPS.backward(incoming, x, floats, ints, **maths, **place))
    for loss in losses[1:]:
        assert torch.equal(loss.view(torch.int32), losses[0].view(torch.int32))  # NaN has bits too
    return losses[0], torch.cat(grads, -1)


def specified(logits, labels, grad_output=None, **options):
    exact = logits.detach().double().requires_grad_()
    loss = reference.cross_entropy(exact, labels, **options)
    loss.backward(torch.ones_like(loss) if grad_output is None else grad_output.double())
    return loss.detach(), exact.grad


def check(logits, labels, sizes, grad_output=None, **options):
    loss, grad = sharded(logits, labels, sizes, grad_output, **options)
    expected, expected_grad = specified(logits, labels, grad_output, **options)
    assert_close(loss, expected, grad, expected_grad, logits.dtype)


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
@pytest.mark.parametrize("options", [*OPTIONS, "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_specification(device, dtype, options, reduction):
    sizes = [200, 0, 301, 16]
    vocab = sum(sizes)
    logits, labels, arguments = problem(device, dtype, vocab, reduction)
    labels[0, 1], labels[0, 6], labels[0, 7], labels[0, 8] = 0, 199, 200, vocab - 1  # the shards' edges
    if options == "everything":
        maths = {"class_weight": torch.rand(vocab, device=device) + 0.1, "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 9.0}
    else:
        maths = options_on(options, vocab, device)
    shape = (2, 13) if reduction == "none" else ()
    check(logits, labels, sizes, torch.randn(shape, device=device), **arguments, **maths)


def test_one_shard_is_the_plain_loss(device):
    """Bit for bit where the kernel is the same: a row too short for the resident one on CUDA."""
    logits, labels = torch.randn(9, 97, device=device), torch.randint(0, 97, (9,), device=device)
    labels[4] = -100
    loss, grad = sharded(logits, labels, [97], reduction="sum", z_loss=1e-3)
    plain = logits.clone().requires_grad_()
    expected = packops.cross_entropy(plain, labels, reduction="sum", z_loss=1e-3)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, plain.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("vocab", [1, 3, 1000, 4097, 50257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vocabularies(device, vocab, dtype):
    sizes = [vocab // 3, vocab // 2, vocab - vocab // 3 - vocab // 2]
    logits = (torch.randn(5, vocab, device=device) * 2).to(dtype)
    labels = torch.randint(0, vocab, (5,), device=device)
    labels[0], labels[1], labels[3] = vocab - 1, 0, -100
    check(logits, labels, sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab, shards", [(128256, 2), (128256, 8), (151936, 4), (262144, 2), (50257, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ["plain", "class_weight+smoothing", "softcap"])
def test_large_shards(dtype, vocab, shards, options):
    """More rows than the device has blocks, so that the resident kernel's ring wraps; ignored rows in between."""
    device = torch.device("cuda")
    rows = 600
    logits = torch.randn(rows, vocab, device=device, dtype=dtype) * 2
    labels = torch.randint(0, vocab, (rows,), device=device)
    labels[::3] = -100
    width = -(-vocab // shards)
    sizes = [width] * (shards - 1) + [vocab - width * (shards - 1)]
    maths = options_on(options, vocab, device)
    loss, grad = sharded(logits, labels, sizes, **maths)
    plain = logits.clone().requires_grad_()
    expected = packops.cross_entropy(plain, labels, **maths)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=3e-6, atol=0)
    sample = torch.tensor([0, 1, 2, rows // 2, rows - 2, rows - 1], device=device)
    exact, exact_grad = specified(logits[sample], labels[sample], reduction="sum", **maths)
    weight = maths.get("class_weight", torch.ones(vocab, device=device))
    total = weight[labels[labels != -100]].double().sum()
    assert_close(exact.float(), exact, grad[sample], exact_grad / total, dtype)
    again, grad_again = sharded(logits, labels, sizes, **maths)
    assert torch.equal(loss, again)
    assert torch.equal(grad, grad_again)


def test_minus_infinity(device):
    """A shard of nothing but -inf, a row of -inf but for one class, a target at -inf."""
    sizes = [40, 24, 36]
    logits = torch.randn(6, 100, device=device)
    logits[:, :40] = -torch.inf
    logits[1, :99] = -torch.inf
    labels = torch.tensor([50, 99, 70, 63, 64, 99], device=device)
    check(logits, labels, sizes)
    check(logits, labels, sizes, z_loss=0.1)
    labels[2] = 7
    loss, grad = sharded(logits, labels, sizes, reduction="none")
    plain = logits.clone().requires_grad_()
    expected = F.cross_entropy(plain, labels, reduction="none")
    expected.sum().backward()
    assert loss[2] == torch.inf
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, plain.grad)
    logits[3] = -torch.inf
    assert sharded(logits, labels, sizes, reduction="none")[0].isnan().tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(device, dtype):
    """Confident rows keep the small difference p - 1, and magnitudes at the end of the dtype's range do not overflow."""
    sizes = [30, 33]
    logits = torch.randn(8, 63, device=device).to(dtype)
    labels = torch.arange(8, device=device) * 8
    for row, above in enumerate([4, 8, 10, 12, 14]):
        logits[row, labels[row]] = above
    finite = torch.finfo(dtype).max
    logits[5], logits[5, 3], logits[5, 40] = -finite, 0.0, finite
    logits[6, :31] = finite
    ones = torch.ones(8, device=device)
    loss, grad = sharded(logits, labels, sizes, ones, reduction="none")
    expected, expected_grad = specified(logits, labels, ones, reduction="none")
    # fp32 on every device and CPU: 16 ulps of the terms, as in test_confident_rows_keep_their_gradient. Those of a loss
    # are 1 (its sum of exponentials), x_y - max and lse - max; those of a gradient 1 and p, and it is rounded once more.
    noise, exact = 16 * 2.0**-23, logits.double()
    top, of_target = exact.amax(-1), exact[torch.arange(8, device=device), labels]
    terms = 1 + (of_target - top).abs() + (exact.logsumexp(-1) - top).abs()
    excess = (loss.double() - expected).abs() - noise * terms
    assert excess.max() <= 0, f"loss off by {excess.max():.2e} beyond what rounding allows"
    excess = (grad.double() - expected_grad).abs() - EPS[dtype] * expected_grad.abs() - noise
    assert excess.max() <= 0, f"gradient off by {excess.max():.2e} beyond what rounding allows"


def test_rows_that_do_not_count(device):
    """Whatever their logits hold, their gradient is 0; a batch of nothing else has loss 0."""
    logits, labels = torch.randn(5, 30, device=device), torch.tensor([-100, 3, -100, 29, -100], device=device)
    logits[0], logits[2, 3] = torch.nan, torch.inf
    loss, grad = sharded(logits, labels, [12, 18])
    partial, *_ = OPS.partial(logits, labels, first_class=0, vocab_size=30)
    assert (partial[:-2].view(PARTIAL_STATES, 5)[:, [0, 2, 4]] == 0).all()  # nothing undefined travels
    assert loss.isfinite()
    assert (grad[[0, 2, 4]] == 0).all()
    assert (grad[[1, 3]] != 0).all()
    loss, grad = sharded(logits, torch.full_like(labels, -100), [12, 18], label_smoothing=0.1)
    assert loss == 0
    assert (grad == 0).all()
    loss, grad = sharded(logits[:0], labels[:0], [12, 18])
    assert loss == 0
    assert grad.shape == (0, 30)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inplace(device, reduction):
    logits, labels = torch.randn(4, 9, 50, device=device), torch.randint(0, 50, (4, 9), device=device)
    grad_output = torch.randn((4, 9) if reduction == "none" else (), device=device)
    expected = sharded(logits, labels, [20, 30], grad_output, reduction=reduction)
    result = sharded(logits, labels, [20, 30], grad_output, inplace=True, reduction=reduction)
    assert torch.equal(expected[0], result[0])
    assert torch.equal(expected[1], result[1])


def test_bad_labels(device):
    logits, labels = torch.randn(3, 30, device=device), torch.tensor([3, 30, 4], device=device)
    if device.type == "cpu":
        with pytest.raises(IndexError, match=r"label 30 at position 1 is outside \[0, 30\)"):
            sharded(logits, labels, [12, 18])
        return
    loss, grad = sharded(logits, labels, [12, 18], reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    assert (grad[1] == 0).all()
    assert sharded(logits, labels, [12, 18])[0].isnan()


@pytest.mark.parametrize("widths, begins", [([17, 18], [0, 16]), ([17, 18], [18, 0]), ([12, 17], [0, 12]), ([12], [0])])
def test_shards_that_do_not_line_up(device, widths, begins):
    """Overlapping, in another order, or not the whole vocabulary: an error, on CUDA a NaN, and never a plausible loss."""
    labels = torch.tensor([3, 20, 4], device=device)
    shards = [torch.randn(3, width, device=device) for width in widths]
    places = [{"first_class": begin, "vocab_size": 35} for begin in begins]
    state = [OPS.partial(x, labels, **place) for x, place in zip(shards, places, strict=True)]
    partials = torch.stack([partial for partial, *_ in state])
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"do not line up.*in a vocabulary of 35.*need shard_sizes"):
            OPS.combine(partials, shards[0], *state[0][1:], **places[0])
    else:
        assert OPS.combine(partials, shards[0], *state[0][1:], **places[0]).isnan()
        assert OPS.backward(torch.ones((), device=device), shards[0], *state[0][1:], **places[0]).isnan().any()


def test_raw_ops_are_what_their_schemas_say(device):
    logits, labels = torch.randn(2, 6, 20, device=device), torch.randint(0, 40, (2, 6), device=device)
    place = {"first_class": 20, "vocab_size": 40}
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.partial, (logits, labels), place, test_utils=utils)
    partial, floats, ints = OPS.partial(logits, labels, **place)
    other, *_ = OPS.partial(logits, labels, first_class=0, vocab_size=40)
    partials = torch.stack([other, partial])
    for reduction in ("mean", "none"):
        torch.library.opcheck(OPS.combine, (partials, logits, floats, ints), {**place, "reduction": reduction}, test_utils=utils)
    torch.library.opcheck(OPS.backward, (torch.ones((), device=device), logits, floats, ints), place, test_utils=utils)
    torch.library.opcheck(
        OPS.backward_,
        (logits.clone(), torch.ones((), device=device), None, floats, ints),
        {**place, "holds_gradient": False},
        test_utils=utils,
    )


@pytest.mark.parametrize(
    "place, message",
    [
        ({"first_class": -1, "vocab_size": 40}, "logits of 20 classes from -1 on do not fit into a vocabulary of 40"),
        ({"first_class": 21, "vocab_size": 40}, "logits of 20 classes from 21 on do not fit into a vocabulary of 40"),
        ({"first_class": 0, "vocab_size": 2**24 + 1}, "at most 2\\^24 classes, got 16777217"),
    ],
)
def test_bad_places(device, place, message):
    logits, labels = torch.randn(6, 20, device=device), torch.randint(0, 20, (6,), device=device)
    with pytest.raises((ValueError, TypeError), match=message):
        OPS.partial(logits, labels, **place)


def test_class_weights_are_those_of_all_classes(device):
    logits, labels = torch.randn(6, 20, device=device), torch.randint(0, 20, (6,), device=device)
    with pytest.raises(ValueError, match=r"class_weight must have shape \(40,\) or be one row of 40, got shape \(20,\)"):
        OPS.partial(logits, labels, class_weight=torch.ones(20, device=device), first_class=0, vocab_size=40)


@pytest.mark.gpu
def test_cuda_graph_without_host_sync():
    """Partial states, their combination and the gradient, captured and replayed on other data."""
    device = torch.device("cuda")
    sizes = [3000, 5000]
    logits, labels = torch.randn(64, 8000, device=device), torch.randint(0, 8000, (64,), device=device)
    sharded(logits, labels, sizes)  # what is done once per process
    graph = torch.cuda.CUDAGraph()
    shards, places = shards_of(logits, sizes)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            state = [OPS.partial(x, labels, **place) for x, place in zip(shards, places, strict=True)]
            partials = torch.stack([partial for partial, *_ in state])
            grads = []
            for x, place, (_, floats, ints) in zip(shards, places, state, strict=True):
                loss = OPS.combine(partials, x, floats, ints, **place)
                grads.append(OPS.backward(torch.ones_like(loss), x, floats, ints, **place))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    logits.copy_(torch.randn_like(logits))
    labels[::2] = -100
    graph.replay()
    expected, expected_grad = sharded(logits, labels, sizes)
    assert torch.equal(loss, expected)
    assert torch.equal(torch.cat(grads, -1), expected_grad)
