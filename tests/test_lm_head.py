"""The products of the lm_head (csrc/lm_head.cu) against fp64, on the Hopper GPUs that have them."""

import itertools
import math

import pytest
import torch

import packops
from packops import reference
from packops.ops import linear_log_probs
from packops.ops.lm_head import Product, Wanted, logits_buffer
from packops.ops.vocab_shard import Shard

PRODUCT = Product("packops")
SHAPES = [(300, 136, 1000), (129, 1024, 777), (520, 896, 50257), (1, 64, 8), (5, 8, 7), (257, 72, 193)]


@pytest.fixture
def hopper():
    device = torch.device("cuda")
    if not PRODUCT.fits(*torch.zeros(2, 8, 64, device=device, dtype=torch.bfloat16)):
        pytest.skip("neither this GPU nor the loaded code has wgmma, so nothing is shown about the product")
    return device


def problem(device, shape, dtype=torch.bfloat16, spread=1.3):
    """hidden and weight, and labels of which some do not count and whose rows hold NaN. Some rows are sure, some very wrong."""
    rows, width, vocab = shape
    hidden = torch.randn(rows, width, device=device)
    weight = (torch.randn(vocab, width, device=device) * spread / width**0.5).to(dtype)
    labels = torch.randint(0, vocab, (rows,), device=device)
    if rows > 60 and width >= 64:
        for row, factor in ((0, 6), (1, 12), (2, 25), (20, -20), (21, -60), (40, 120), (41, -200)):
            hidden[row] = weight[labels[row]].float() * factor  # logits of the label up to 200 and down to -340
    hidden = hidden.to(dtype)
    ignored = list(range(5, rows, 13))
    labels[ignored] = -100
    hidden[ignored] = math.nan
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def exact(function, hidden, weight, labels, **options):
    leaves = [x.detach().double().nan_to_num().requires_grad_() for x in (hidden, weight)]
    return function(*leaves, labels, **options), leaves


def assert_close(found, expected, eps, what):
    """Root mean squares: a rounding of the gradient of the logits, and one of its product."""
    error, size = ((found.double() - expected).square().mean().sqrt(), expected.square().mean().sqrt())
    assert found.isfinite().all(), what
    assert error <= eps * size + 1e-12, f"{what}: off by {error / size:.1e} of it"


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"logit_scale": 1.6}, {"softcap": 20.0, "logit_scale": 0.7}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_probs(hopper, shape, dtype, options):
    hidden, weight, labels = problem(hopper, shape, dtype)
    assert PRODUCT.fits(hidden, weight)
    ours = packops.linear_log_probs(hidden, weight, labels, **options)
    theirs, leaves = exact(reference.linear_log_probs, hidden, weight, labels, **options)
    largest = 1 + theirs[2].abs() + theirs[0].abs()
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        # Sums of 64 k products in the matrix units lose about 2^-24 of the largest term each.
        assert ((a.double() - b).abs() <= 1e-5 * largest).all(), name
        assert (a[labels < 0] == 0).all()
    weights = [torch.randn(len(labels), device=hopper) for _ in ours]
    grads = torch.autograd.grad([(a * w).sum() for a, w in zip(ours, weights, strict=True)], (hidden, weight))
    expected = torch.autograd.grad([(a * w).sum() for a, w in zip(theirs, weights, strict=True)], leaves)
    eps = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-10
    for name, a, b in zip(("hidden", "weight"), grads, expected, strict=True):
        assert_close(a, b, eps, name)
    assert (grads[0][labels < 0] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"logit_scale": 1.6, "reduction": "sum"}, {"reduction": "none", "softcap": 20.0}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_without_gradients(hopper, shape, dtype, options):
    """A loss of 700 nats among others; class and token weights, some of them 0."""
    hidden, weight, labels = problem(hopper, shape, dtype)
    weights = {
        "token_weight": torch.rand(len(labels), device=hopper).round(decimals=1),
        "class_weight": torch.rand(len(weight), device=hopper),
    }
    fp32 = {"logits_dtype": torch.float32}
    with torch.no_grad():
        loss = packops.linear_cross_entropy(hidden, weight, labels, **fp32, **weights, **options)
    theirs, _ = exact(reference.linear_cross_entropy, hidden, weight, labels, **weights, **options)
    assert ((loss.double() - theirs).abs() <= 1e-5 * (1 + theirs.abs())).all()
    labels[0] = len(weight)
    with torch.no_grad():
        assert packops.linear_cross_entropy(hidden, weight, labels, **fp32).isnan()


@pytest.mark.gpu
def test_sure_rows_keep_their_digits(hopper):
    """log(1 + e^-x) for x up to 60, where 1 + e^-x is 1 in fp32, and its gradient."""
    below = torch.arange(2, 62, 2.0, device=hopper)
    hidden = torch.zeros(len(below), 64, device=hopper, dtype=torch.bfloat16)
    hidden[:, 0] = below
    weight = torch.zeros(2, 64, device=hopper, dtype=torch.bfloat16)
    weight[0, 0] = 1
    hidden.requires_grad_()
    labels = torch.zeros(len(below), dtype=torch.int64, device=hopper)
    expected = torch.exp(-below.double()).log1p()
    values = -packops.linear_log_probs(hidden, weight, labels).log_probs
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(values.sum(), hidden)
    torch.testing.assert_close(grad[:, 0].double(), -1 / (1 + below.double().exp()), rtol=2.0**-7, atol=0)


@pytest.mark.gpu
def test_same_bits_and_any_chunks(hopper):
    hidden, weight, labels = problem(hopper, (700, 896, 5003))
    runs = []
    for chunk_tokens in (None, None, 256):
        ours = packops.linear_log_probs(hidden, weight, labels, chunk_tokens=chunk_tokens)
        with torch.no_grad():
            loss = packops.linear_cross_entropy(
                hidden, weight, labels, chunk_tokens=chunk_tokens, reduction="none", logits_dtype=torch.float32
            )
        both = ours.log_probs.sum() + ours.entropy.sum()
        runs.append([*ours, loss, *torch.autograd.grad(both, (hidden, weight))])
    for a, b in zip(*runs[:2], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(runs[0][:4], runs[2][:4], strict=True):  # a row does not depend on its neighbours
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_strided_and_shifted_operands(hopper):
    """Rows that are no operands as they lie take the loop over chunks; a weight that begins anywhere, too."""
    hidden, weight, labels = problem(hopper, (300, 64, 501))
    storage = torch.zeros(1 + weight.numel(), device=hopper, dtype=weight.dtype)
    shifted = storage[1:].view_as(weight).copy_(weight.detach())
    assert not PRODUCT.fits(hidden, shifted)
    wide = torch.zeros(300, 128, device=hopper, dtype=hidden.dtype)
    wide[:, ::2] = hidden.detach()
    assert not PRODUCT.fits(wide[:, ::2], weight)
    expected = packops.linear_log_probs(hidden, weight, labels)
    for a, b in zip(packops.linear_log_probs(wide[:, ::2], shifted, labels), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (5000, 264, 3001), (2, 4096, 400)], ids=str)
def test_weight_gradient(hopper, shape, dtype):
    """Stored in 16 bits and in fp32, and added to; rows of logits that begin anywhere, and memory beside the result."""
    tokens, width, vocab = shape
    grad_logits = logits_buffer(torch.empty(0, device=hopper, dtype=dtype), tokens, vocab, dtype).normal_()
    hidden = torch.randn(tokens, width, device=hopper, dtype=dtype)
    factor = torch.tensor(0.37, device=hopper)
    exact = grad_logits.double().t() @ hidden.double()
    size = grad_logits.double().abs().t() @ hidden.double().abs()
    for wide, add, times in itertools.product((False, True), (False, True), (None, factor)):
        if add and not wide:
            continue
        memory = torch.full((vocab + 1, width), 3.0, device=hopper, dtype=torch.float32 if wide else dtype)
        assert PRODUCT.weight_gradient_(memory[:vocab], grad_logits, hidden, times, add)
        assert (memory[vocab] == 3).all()
        expected = exact * (1 if times is None else times.double()) + 3 * add
        rounding = 2.0**-23 if wide else torch.finfo(dtype).eps
        assert ((memory[:vocab].double() - expected).abs() <= rounding * expected.abs() + 2.0**-20 * (size + 3)).all()


@pytest.mark.gpu
def test_weight_gradients_that_the_product_leaves_to_torch(hopper):
    """main_grad that begins anywhere, and 16 bits that are added to."""
    hidden, weight, labels = problem(hopper, (300, 64, 501))
    operands = (torch.randn(8, 504, device=hopper).to(hidden)[:, :501], torch.randn(8, 64, device=hopper).to(hidden))
    places = []
    for begin in (0, 1):
        main_grad = torch.zeros(begin + weight.numel(), device=hopper)[begin:].view(weight.shape)
        assert PRODUCT.weight_gradient_(main_grad, *operands, None, True) == (begin == 0)
        packops.linear_cross_entropy(hidden, weight, labels, main_grad=main_grad.zero_()).backward()
        places.append(main_grad)
    torch.testing.assert_close(*places, rtol=1e-4, atol=1e-7)
    assert not PRODUCT.weight_gradient_(torch.zeros_like(weight), *operands, None, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shards_of_a_vocabulary(device, dtype):
    """Two shards by hand, no process group: each hears of the other by a message that was made before."""
    hidden, weight, labels = problem(device, (70, 64, 1000), dtype)
    labels[10:13] = torch.tensor([0, 391, 392], device=device)
    g = torch.randn(70, device=device)
    whole = packops.linear_log_probs(hidden, weight, labels)
    expected = torch.autograd.grad([(x * g).sum() for x in whole], (hidden, weight))
    messages = {}
    options = {**linear_log_probs.DEFAULTS, "chunk_tokens": 70}
    rows, parts = {}, {}
    for rank in (0, 1, 0):
        begin, end = ((0, 392), (392, 1000))[rank]

        def gather(mine, rank=rank):
            messages[rank] = mine
            return torch.cat([messages.get(0, mine), messages.get(1, mine)])

        shard = Shard(begin, 1000, gather, lambda x: None)
        work = linear_log_probs.forward_and_backward(linear_log_probs.raw_ops("packops"), "test", shard)
        local = weight.detach()[begin:end]
        with torch.no_grad():
            log_probs, state, target = work.forward(hidden, local, labels, bias=None, **options)
            rows[rank] = (log_probs, state.entropy, state.row_max + state.log_sum)
            wanted = Wanted(True, True, False)
            parts[rank] = work.backward((g, g, g), hidden, local, None, target, state, wanted, **options)
    for a, b, c in zip(rows[0], rows[1], whole, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c.detach(), rtol=1e-5, atol=1e-5)
    eps = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    assert_close(parts[0][0].double() + parts[1][0], expected[0].double(), 2 * eps, "hidden")
    assert_close(torch.cat([parts[0][1], parts[1][1]]), expected[1].double(), eps, "weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_cpu_has_none(dtype):
    hidden, weight = torch.randn(2, 8, 64).to(dtype)
    assert not PRODUCT.fits(hidden, weight)
    assert not PRODUCT.weight_gradient_(torch.zeros(64, 64), hidden, hidden, None, False)
    with pytest.raises(NotImplementedError, match="_lm_head_statistics"):
        PRODUCT.statistics(hidden, weight, None, torch.zeros(8, dtype=torch.int32), 1.0, None, True)
