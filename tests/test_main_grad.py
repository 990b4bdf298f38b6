"""``main_grad``: the weight's gradient added to memory that is given, in fp32, in every form of the lm_head's ops."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import packops
from packops import reference
from ranks import fabrics, run_ranks, this_device
from test_linear_ce_loss import EPS, problem, rms

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def of_loss(hidden, weight, labels, *, which=packops, **options):
    """A scalar with a gradient that is not 1."""
    loss = which.linear_cross_entropy(hidden, weight, labels, **options)
    return 0.37 * (loss if loss.dim() == 0 else (loss * token_factors(labels).to(loss.dtype)).sum())


def of_log_probs(hidden, weight, labels, *, which=packops, **options):
    log_probs, entropy, _ = which.linear_log_probs(hidden, weight, labels, **options)
    return (log_probs * token_factors(labels).to(log_probs.dtype)).sum() + 0.1 * entropy.sum()


def token_factors(labels):
    return torch.linspace(-1, 2, labels.numel(), device=labels.device).view(labels.shape)


#: name -> (function, options); a chunk, several, rows left out, each token's own gradient, accumulators in bf16, fp32 logits
FORMS = {
    "loss": (of_loss, {}),
    "loss in chunks": (of_loss, {"chunk_tokens": 7}),
    "loss of rows that count": (of_loss, {"num_valid": 24, "reduction": "sum"}),
    "loss in chunks of rows that count": (of_loss, {"num_valid": 24, "chunk_tokens": 7}),
    "losses": (of_loss, {"reduction": "none", "chunk_tokens": 7}),
    "loss of fp32 logits": (of_loss, {"logits_dtype": torch.float32}),
    "log-probabilities": (of_log_probs, {}),
    "log-probabilities in blocks": (of_log_probs, {"chunk_tokens": 3, "logit_scale": 1.4}),
    "log-probabilities of rows that count": (of_log_probs, {"num_valid": 24}),
}
CHUNKS = ("num_valid", "chunk_tokens", "logits_dtype")


def held(weight, value=0.75):
    """Memory in which something is already, no sum of bf16 numbers."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.full(weight.shape, value, dtype=dtype, device=weight.device) + torch.rand(weight.shape, device=weight.device) / 3


def exact_gradients(function, hidden, weight, labels, options):
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    options = {name: value for name, value in options.items() if name not in CHUNKS}
    return torch.autograd.grad(function(*leaves, labels, which=reference, **options), leaves)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_is_added_and_not_rounded(device, form, dtype):
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("float64 is for the CPU")
    function, options = FORMS[form]
    if dtype.itemsize != 2 and "logits_dtype" in options:
        options = {}
    hidden, weight, _, labels = problem(device, dtype, bias=False, ignored=(1, 9))
    before = held(weight)
    main_grad = before.clone()
    function(hidden, weight, labels, main_grad=main_grad, **options).backward()
    assert weight.grad is None
    of_hidden, of_weight = exact_gradients(function, hidden, weight, labels, options)
    added = main_grad.double() - before.double()
    # What rounding the gradient of the logits costs, on the CPU of a 16-bit loss and on CUDA; a gradient rounded to the
    # parameter's dtype would be off by 0.3 of its epsilon more.
    plain = torch.autograd.grad(function(hidden, weight, labels, **options), (hidden, weight))
    assert torch.equal(hidden.grad, plain[0])
    assert rms(hidden.grad.double() - of_hidden) <= max(EPS[dtype], 1e-6) * rms(of_hidden)
    error, rounded = rms(added - of_weight), rms(plain[1].double() - of_weight)
    assert error <= rounded + 2e-7, (error, rounded)
    if dtype.itemsize == 2:
        assert (added.float() != plain[1].float()).float().mean() > 0.5
        assert rms(added - plain[1].double()) <= EPS[dtype] * rms(of_weight)


@pytest.mark.parametrize("form", ["loss", "loss in chunks", "losses", "log-probabilities"])
def test_micro_batches_and_backward_twice(device, form):
    """Both forwards come before the first backward, so the memory has changed since the second forward."""
    function, options = FORMS[form]
    hidden, weight, _, labels = problem(device, torch.bfloat16, bias=False)
    main_grad = torch.zeros(weight.shape, device=device)
    call = functools.partial(function, main_grad=main_grad, **options)
    first, second = call(hidden, weight, labels), call(hidden * 0.5, weight, labels.flip(0))
    version = main_grad._version
    first.backward()
    assert main_grad._version > version
    once = main_grad.clone()
    second.backward(retain_graph=True)
    both = main_grad.clone()
    second.backward()
    alone = torch.zeros_like(main_grad)
    function(hidden * 0.5, weight, labels.flip(0), main_grad=alone, **options).backward()
    torch.testing.assert_close(both - once, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(main_grad - both, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["loss", "loss in chunks", "log-probabilities"])
@pytest.mark.parametrize("zero_out", [False, True])
def test_what_megatron_wants(device, form, zero_out):
    """Its hooks look at ``param.grad``, drop it if ``grad_added_to_main_grad`` is set, and set that to False at every step."""
    function, options = FORMS[form]
    hidden, weight, _, labels = problem(device, torch.bfloat16, bias=False)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape, device=device), False
    if zero_out:
        weight.zero_out_wgrad = True
    seen = []

    def hook(parameter):
        seen.append(parameter.grad_added_to_main_grad)
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        if zero_out:
            assert not parameter.grad.any()
        parameter.grad = None

    weight.register_post_accumulate_grad_hook(hook)
    function(hidden, weight, labels, main_grad=weight.main_grad, **options).backward()
    assert seen == [True]
    assert weight.main_grad.any()


@pytest.mark.parametrize("form", ["loss", "log-probabilities"])
def test_with_a_bias_autocast_and_checkpoints(device, form):
    """fp32 parameters under autocast: operands are bf16, and the sum is that of the fp32 parameters."""
    function, options = FORMS[form]
    hidden, weight, bias, labels = problem(device)
    main_grad = torch.zeros(weight.shape, device=device)

    def step(hidden):
        with torch.autocast(device.type, torch.bfloat16):
            return function(hidden, weight, labels, bias=bias, main_grad=main_grad, **options)

    checkpoint(step, hidden, use_reentrant=False).backward()
    low = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = torch.autograd.grad(function(low[0], low[1], labels, bias=low[2], which=reference, **options), low)
    assert weight.grad is None
    for found, exact in zip((hidden.grad, main_grad, bias.grad), expected, strict=True):
        assert rms(found.double() - exact) <= 2.0**-8 * rms(exact)


@pytest.mark.parametrize("form", ["loss", "loss in chunks", "log-probabilities"])
def test_compiled(device, form):
    function, options = FORMS[form]
    hidden, weight, _, labels = problem(device, torch.bfloat16, bias=False)
    torch._dynamo.reset()
    runs = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        main_grad = torch.ones(weight.shape, device=device)
        call(hidden * 1.0, weight, labels, main_grad=main_grad, **options).backward()
        runs.append((main_grad, hidden.grad))
        hidden.grad = None
        assert weight.grad is None
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_without_gradients_nothing_is_added(device):
    hidden, weight, _, labels = problem(device, torch.bfloat16, bias=False)
    main_grad = torch.zeros(weight.shape, device=device)
    with torch.no_grad():
        of_loss(hidden, weight, labels, main_grad=main_grad)
        of_log_probs(hidden, weight, labels, main_grad=main_grad)
        packops.linear_cross_entropy(hidden, weight, labels, main_grad=main_grad, return_stats=True)
    assert not main_grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("function", [of_loss, of_log_probs])
def test_no_rows_add_nothing(device, function, dtype):
    for rows, options in ((0, {}), (26, {"num_valid": 0})):
        hidden, weight, _, labels = problem(device, dtype, shape=(rows,), bias=False, ignored=range(rows))
        main_grad = torch.ones(weight.shape, device=device)
        function(hidden, weight, labels, main_grad=main_grad, **options).backward()
        assert (main_grad == 1).all()
        assert not hidden.grad.any()
        (grad,) = torch.autograd.grad(function(hidden, weight, labels, **options), weight)
        assert not grad.any()


def bad(weight):
    zeros = torch.zeros(weight.shape, device=weight.device)
    return {
        "dtype": (zeros.bfloat16(), TypeError, "main_grad must be torch.float32 for operands of torch.bfloat16"),
        "shape": (zeros[1:], ValueError, "main_grad must be contiguous and of weight's shape"),
        "strides": (zeros.t().contiguous().t(), ValueError, "main_grad must be contiguous and of weight's shape"),
        "device": (zeros.to("meta"), ValueError, "main_grad must be on"),
        "leaf": (zeros.requires_grad_(), ValueError, "main_grad is memory that a gradient is added to"),
        "list": ([0.0], TypeError, "main_grad must be"),
    }


@pytest.mark.parametrize("function", [packops.linear_cross_entropy, packops.linear_log_probs])
@pytest.mark.parametrize("case", bad(torch.zeros(2, 2)))
def test_bad_memory_is_named(device, case, function):
    hidden, weight, _, labels = problem(device, torch.bfloat16, bias=False)
    main_grad, error, message = bad(weight)[case]
    with pytest.raises(error, match=f"packops.{function.__name__}: {message}"):
        function(hidden, weight, labels, main_grad=main_grad)


@pytest.mark.parametrize("function", [packops.linear_cross_entropy, packops.linear_log_probs])
def test_a_weight_without_a_gradient_is_named(device, function):
    hidden, weight, _, labels = problem(device, torch.bfloat16, bias=False)
    with pytest.raises(ValueError, match="main_grad is given, but weight needs no gradient"):
        function(hidden, weight.detach(), labels, main_grad=torch.zeros(weight.shape, device=device))


def over_ranks(rank, *tensors):
    hidden, weight, labels = (x.to(this_device()) for x in tensors)
    half = len(weight) // 2
    local = weight[rank * half : (rank + 1) * half].clone().requires_grad_()
    for function, ours in (
        (of_loss, packops.vocab_parallel_linear_cross_entropy),
        (of_log_probs, packops.vocab_parallel_linear_log_probs),
    ):
        main_grad = torch.ones_like(local, requires_grad=False)
        which = type("Ranks", (), {name: staticmethod(ours) for name in ("linear_cross_entropy", "linear_log_probs")})
        function(hidden.clone().requires_grad_(), local, labels, which=which, main_grad=main_grad).backward()
        whole = weight.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(hidden, whole, labels), whole)
        assert local.grad is None
        torch.testing.assert_close(main_grad - 1, expected[rank * half : (rank + 1) * half], rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=f"{ours.__name__}: main_grad must be contiguous"):
            ours(hidden, local, labels, main_grad=main_grad[1:])


@pytest.mark.slow
@fabrics(2)
def test_over_ranks(backend, world_size, tmp_path):
    hidden, weight, _, labels = problem("cpu", vocab=66, bias=False)
    run_ranks(world_size, tmp_path, over_ranks, hidden.detach(), weight.detach(), labels, backend=backend)
