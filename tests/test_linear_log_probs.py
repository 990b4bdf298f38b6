"""Log-probabilities and entropies without logits, against the fp64 specification; and torch's own machinery."""

import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import packops
from cuda_streams import no_host_sync
from packops import reference
from packops.ops import linear_log_probs as module
from ranks import fabrics, run_ranks, this_device
from test_linear_ce_loss import DTYPES, EPS, allocated_peak, problem, rms

pytestmark = pytest.mark.usefixtures("one_thread")

MATHS = {
    "plain": {},
    "temperature": {"logit_scale": 1 / 0.7},
    "softcap": {"softcap": 3.0},
    "softcap+temperature": {"softcap": 2.0, "logit_scale": 1.6},
}
EVERYTHING = ("log_probs", "entropy", "lse")


def upstream(shape, device, names=EVERYTHING):
    """A gradient of each result, of both signs, that differs per token."""
    return {name: torch.randn(shape, device=device, dtype=torch.float64) for name in names}


def weighted(results, weights):
    """A scalar whose gradient in each result is ``weights``."""
    return sum((getattr(results, name) * w.to(getattr(results, name).dtype)).sum() for name, w in weights.items())


def specified(hidden, weight, bias, labels, weights, **options):
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    chunked_only = ("num_valid", "chunk_tokens")
    options = {k: v for k, v in options.items() if k not in chunked_only}
    results = packops.LinearLogProbs(*reference.linear_log_probs(*leaves[:2], labels, bias=leaves[2], **options))
    grads = torch.autograd.grad(weighted(results, weights), [x for x in leaves if x is not None])
    return results, grads


def assert_matches(hidden, weight, bias, labels, weights=None, **options):
    weights = upstream(labels.shape, hidden.device) if weights is None else weights
    ours = packops.linear_log_probs(hidden, weight, labels, bias=bias, **options)
    exact, exact_grads = specified(hidden, weight, bias, labels, weights, **options)
    state = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    for name in EVERYTHING:
        found, expected = getattr(ours, name), getattr(exact, name)
        assert found.dtype == state
        assert found.shape == labels.shape
        assert found.requires_grad
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    grads = torch.autograd.grad(weighted(ours, weights), [x for x in (hidden, weight, bias) if x is not None])
    for name, found, expected in zip(("hidden", "weight", "bias"), grads, exact_grads, strict=False):
        assert found.dtype == hidden.dtype
        # One rounding to the parameters' dtype; on CUDA the gradient of the logits is rounded too.
        allowed = {torch.float64: 1e-12, torch.float32: 1e-6}.get(hidden.dtype, 0.6 * EPS[hidden.dtype]) * rms(expected)
        error = rms(found.double() - expected)
        assert error <= allowed + (2.0**-25 if hidden.dtype == torch.float16 else 0), f"{name}: off by {error} of {rms(expected)}"
        assert (found[expected == 0] == 0).all()
    return ours, grads


@pytest.mark.parametrize("maths", MATHS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_matches_specification(device, dtype, maths):
    """Documents (an empty one, one of a single token, padding), shift, ignored labels, a bias, several chunks, every result."""
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("float64 is for the CPU")
    hidden, weight, bias, labels = problem(device, dtype, shape=(2, 13), ignored=(3, 14))
    options = {
        "cu_seqlens": torch.tensor([0, 4, 4, 5, 12, 21], dtype=torch.int32, device=device),
        "shift": True,
        "chunk_tokens": 7,
        **MATHS[maths],
    }
    ours, _ = assert_matches(hidden, weight, bias, labels, **options)
    counted = int((ours.log_probs != 0).sum())
    assert counted == 15  # 21 tokens, less four last ones, less those before 3 and 14
    for num_valid in (counted, counted + 2):
        assert_matches(hidden, weight, bias, labels, num_valid=num_valid, **options)


@pytest.mark.parametrize("names", [names for n in (1, 2) for names in itertools.combinations(EVERYTHING, n)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_through_some_results(device, dtype, names):
    hidden, weight, bias, labels = problem(device, dtype, ignored=(4,))
    assert_matches(hidden, weight, bias, labels, upstream(labels.shape, device, names), chunk_tokens=9, softcap=6.0)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 26, 1000, None])
@pytest.mark.parametrize("ignored", [(), (0,), (25,), range(7, 14), range(25), range(26)])
def test_chunks_and_ignored_patterns(device, chunk_tokens, ignored):
    hidden, weight, bias, labels = problem(device, ignored=ignored)
    for num_valid in {None, 26 - len(ignored), 26}:
        ours, grads = assert_matches(hidden, weight, bias, labels, chunk_tokens=chunk_tokens, num_valid=num_valid)
        for x in ours:
            assert (x[list(ignored)] == 0).all()
        assert (grads[0][list(ignored)] == 0).all()


@pytest.mark.parametrize("maths", MATHS)
def test_gradcheck(maths):
    hidden, weight, bias, labels = problem(torch.device("cpu"), torch.float64, shape=(2, 3), hidden_size=3, vocab=4, ignored=(1,))

    def call(*leaves):
        return tuple(packops.linear_log_probs(*leaves[:2], labels, bias=leaves[2], shift=True, chunk_tokens=2, **MATHS[maths]))

    assert torch.autograd.gradcheck(call, (hidden, weight, bias), atol=1e-7)


def test_without_entropy(device):
    hidden, weight, bias, labels = problem(device)
    whole = packops.linear_log_probs(hidden, weight, labels, bias=bias)
    ours = packops.linear_log_probs(hidden, weight, labels, bias=bias, entropy=False)
    assert ours.entropy is None
    torch.testing.assert_close(ours.log_probs, whole.log_probs, rtol=1e-6, atol=1e-6)  # other kernels may serve it on CUDA
    torch.testing.assert_close(ours.lse, whole.lse, rtol=1e-6, atol=1e-6)
    g = torch.randn(26, device=device)
    for a, b in zip(*(torch.autograd.grad(x.log_probs, (hidden, weight, bias), g) for x in (ours, whole)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_logits_are_not_rounded(device):
    """bf16 hidden states and weight, logits around 30: log-probabilities to 2e-6 of them, where bf16 logits are off by 0.1."""
    hidden, weight, _, labels = problem(device, torch.bfloat16, shape=(64,), hidden_size=256, vocab=1000, bias=False)
    with torch.no_grad():
        weight.mul_(8)
    ours = packops.linear_log_probs(hidden, weight, labels)
    exact = reference.linear_log_probs(hidden, weight, labels)
    for found, expected in zip(ours, exact, strict=True):
        assert (found.double() - expected).abs().max() <= 2e-6 * (1 + expected.abs().max())
    rounded = (hidden @ weight.t()).float().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert (rounded.double() - exact[0]).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_and_huge_rows(device, dtype):
    """Rows whose label has nearly all of the probability, or almost none of it (e^-1000), and logits of 1e4 and more."""
    vocab = 50
    weight = torch.eye(vocab, device=device).to(dtype).requires_grad_()
    hidden = (torch.randn(8, vocab, device=device) * 0.1).to(dtype)
    labels = torch.arange(8, device=device)
    for row, above in enumerate((8, 12, 16, 30)):
        hidden[row, row] = above
    hidden[4, 20], hidden[5, 21], hidden[6, 6], hidden[7] = 1000, 3e4, 3e4, 2e4
    hidden.requires_grad_()
    ours = packops.linear_log_probs(hidden, weight, labels)
    weights = {"log_probs": torch.randn(8, device=device).double()}
    exact, exact_grads = specified(hidden, weight, None, labels, weights)
    scale = 1 + exact.log_probs.abs() + 0 * exact.lse
    assert ((ours.log_probs.double() - exact.log_probs).abs() <= 1e-6 * scale).all()
    assert (ours.entropy.double() - exact.entropy).abs().max() <= 1e-4
    for found, expected in zip(torch.autograd.grad(weighted(ours, weights), (hidden, weight)), exact_grads, strict=True):
        # Row by row: the gradient of a confident row is small, and has its own digits.
        rows = expected.abs().amax(-1, keepdim=True).clamp(min=1e-7)
        assert ((found.double() - expected).abs() <= 2 * EPS[dtype] * rows + 2e-6).all()


@pytest.mark.parametrize("names", [("log_probs",), EVERYTHING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classes_of_minus_infinity(device, names, dtype):
    """A vocabulary of which some classes are switched off: their probability is 0 and 0 log 0 is 0."""
    hidden, weight, bias, labels = problem(device, dtype)
    with torch.no_grad():
        bias[40:] = -math.inf
    labels = labels % 40
    weights = upstream(labels.shape, device, names)
    ours = packops.linear_log_probs(hidden, weight, labels, bias=bias)
    exact, exact_grads = specified(hidden, weight[:40], bias[:40], labels, weights)
    for name in EVERYTHING:
        torch.testing.assert_close(getattr(ours, name).double(), getattr(exact, name), rtol=2e-6, atol=2e-6)
    for found, expected in zip(torch.autograd.grad(weighted(ours, weights), (hidden, weight, bias)), exact_grads, strict=True):
        found = found if found.shape == expected.shape else found[:40]
        assert found.isfinite().all()
        assert rms(found.double() - expected) <= (1e-6 if dtype == torch.float32 else 0.6 * EPS[dtype]) * rms(expected)
    labels[0] = 41
    log_probs = packops.linear_log_probs(hidden, weight, labels, bias=bias).log_probs
    assert log_probs[0] == -math.inf
    assert log_probs[1:].isfinite().all()


@pytest.mark.parametrize("num_valid", [None, 6, 7])
def test_rows_that_do_not_count_may_hold_anything(device, num_valid):
    hidden, weight, bias, labels = problem(device, shape=(9,), ignored=(1, 6))
    options = {"bias": bias, "cu_seqlens": torch.tensor([0, 4, 8], device=device), "chunk_tokens": 4, "num_valid": num_valid}
    weights = upstream((9,), device)
    expected = packops.linear_log_probs(hidden, weight, labels, **options)
    expected_grads = torch.autograd.grad(weighted(expected, weights), (hidden, weight, bias))
    with torch.no_grad():
        hidden[1], hidden[6], hidden[8] = math.nan, math.inf, -math.inf
    ours = packops.linear_log_probs(hidden, weight, labels, **options)
    for name in EVERYTHING:
        weights[name][[1, 6, 8]] = math.nan  # nor does it matter what comes back for them
    grads = torch.autograd.grad(sum((getattr(ours, n) * weights[n].float()).sum() for n in EVERYTHING), (hidden, weight, bias))
    for a, b in zip((*ours, *grads), (*expected, *expected_grads), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [(), (0,), (1,), (1, 2), (0, 2), (0, 1)])
def test_frozen_inputs_and_backward_twice(device, dtype, frozen):
    leaves = problem(device, dtype)[:3]
    labels = problem(device, ignored=(2,))[3]
    weights = upstream(labels.shape, device)
    whole = packops.linear_log_probs(*leaves[:2], labels, bias=leaves[2], chunk_tokens=9)
    expected = torch.autograd.grad(weighted(whole, weights), leaves)
    some = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate(leaves)]
    wanted = [x for x in some if x.requires_grad]
    total = weighted(packops.linear_log_probs(*some[:2], labels, bias=some[2], chunk_tokens=9), weights)
    first = torch.autograd.grad(total, wanted, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(total, wanted)
    for a, b, c, d in zip(first, kept, second, [e for i, e in enumerate(expected) if i not in frozen], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert torch.equal(a, d)


def test_small_gradients_of_fp16(device):
    """Gradients far below fp16's smallest number while they pass through the logits."""
    hidden, weight, _, labels = problem(device, torch.float16, shape=(40,), vocab=3000, bias=False)
    weights = {name: w * 1e-9 for name, w in upstream((40,), device).items()}
    scale = 2.0**16
    _, exact = specified(hidden, weight, None, labels, weights)
    ours = torch.autograd.grad(weighted(packops.linear_log_probs(hidden, weight, labels), weights) * scale, (hidden, weight))
    for found, expected in zip(ours, exact, strict=True):
        assert rms(found.double() - expected * scale) <= 1.5e-3 * rms(expected * scale) + 2.0**-25


def test_second_derivatives_are_refused(device):
    hidden, weight, _, labels = problem(device, bias=False)
    ours = packops.linear_log_probs(hidden, weight, labels)
    (grad,) = torch.autograd.grad(ours.log_probs.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once|does not require grad"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (1,), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_empty_and_tiny(device, shape, dtype):
    hidden, weight, bias, labels = problem(device, dtype, shape=shape)
    ours = packops.linear_log_probs(hidden, weight, labels, bias=bias)
    (ours.log_probs.sum() + ours.entropy.sum()).backward()
    assert hidden.grad.shape == hidden.shape
    assert weight.grad.shape == weight.shape
    for found, expected in zip(ours, reference.linear_log_probs(hidden, weight, labels, bias=bias), strict=True):
        assert found.shape == shape
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_one_class_and_strides(device):
    hidden, weight, bias, _ = problem(device, vocab=1)
    ours = packops.linear_log_probs(hidden, weight, torch.zeros(26, dtype=torch.int64, device=device), bias=bias)
    assert (ours.log_probs == 0).all()
    assert (ours.entropy == 0).all()
    hidden = torch.randn(6, 4, 48, device=device)[..., ::2].transpose(0, 1).requires_grad_()
    weight = torch.randn(24, 67, device=device).t().requires_grad_()
    assert_matches(hidden, weight, None, torch.randint(0, 67, (6, 4), device=device, dtype=torch.int32).t(), chunk_tokens=5)


def test_agrees_with_the_loss_and_its_statistics(device):
    hidden, weight, bias, labels = problem(device, shape=(2, 13), ignored=(3,))
    options = {"shift": True, "softcap": 4.0, "logit_scale": 1.3}
    ours = packops.linear_log_probs(hidden, weight, labels, bias=bias, **options)
    logits = hidden.detach() @ weight.detach().t() + bias.detach()
    loss, stats = packops.cross_entropy(logits, labels, reduction="none", return_stats=True, **options)
    for found, expected in zip(ours, (-loss, stats.entropy, stats.lse), strict=True):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=2e-6)


# ------------------------------------------------------------------------------------------------------------- memory, and torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_memory_grows_with_tokens_times_vocabulary(dtype):
    """Peak memory of both passes on the CPU: a chunk of logits and its like, whatever the number of tokens."""
    peaks = []
    for tokens in (256, 1024):
        hidden, weight, _, labels = problem("cpu", dtype, shape=(tokens,), hidden_size=8, vocab=4096, bias=False)

        def step(hidden=hidden, weight=weight, labels=labels):
            ours = packops.linear_log_probs(hidden, weight, labels, chunk_tokens=64)
            return torch.autograd.grad(ours.log_probs.sum() + ours.entropy.sum(), (hidden, weight))

        peaks.append(allocated_peak(step))
    chunk = 64 * 4096 * 4
    assert peaks[0] <= 3.3 * chunk
    assert peaks[1] - peaks[0] <= 768 * 200


@pytest.mark.parametrize("vocab", [1, 7, 1000, 1024, 5000, 32000, 50257, 128256, 151936, 256000, 1 << 21])
@pytest.mark.parametrize("copies", [1, 3])
def test_blocks_of_the_vocabulary(vocab, copies):
    """All columns, in blocks of even size, which are whole tiles and take no more than a share of all logits, or 1024 columns."""
    head = module.lm_head
    columns = head.choose_block_columns(vocab, copies=copies)
    blocks = list(head.column_blocks(vocab, columns))
    assert [b.start for b in blocks] == [0, *(b.stop for b in blocks[:-1])]
    assert blocks[-1].stop == vocab
    assert columns <= max(head.LOGITS_SHARE * vocab / copies, head.MIN_ROWS)
    assert columns <= head.MAX_COLUMNS
    if columns < vocab:
        assert columns % head.TILE_COLUMNS == 0
        assert vocab - blocks[-1].start > columns - len(blocks) * head.TILE_COLUMNS
    for rows, chunk_tokens in ((1, 1), (300, 7), (300, 299), (300, 1000)):
        columns = module.block_columns(rows, vocab, torch.float32, False, chunk_tokens)
        assert 1 <= columns <= vocab
        assert rows * columns < chunk_tokens * vocab + 8 * rows


def test_chunk_sizes():
    """Rows of fp32 logits take twice the memory, and their 16-bit gradient more."""
    loss = module.lm_head.choose_chunk_tokens(16384, 4096, 128256)
    assert module.choose_chunk_tokens(16384, 4096, 128256, torch.float32) == loss == 4096
    assert module.choose_chunk_tokens(16384, 4096, 128256, torch.bfloat16) == 1024
    assert module.choose_chunk_tokens(100, 64, 1000, torch.bfloat16) == 100


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    hidden, weight, bias, labels = problem(torch.device("cuda"), torch.bfloat16)
    with no_host_sync():
        ours = packops.linear_log_probs(hidden, weight, labels, bias=bias, num_valid=26, chunk_tokens=9)
        torch.autograd.grad(ours.log_probs.sum() + ours.entropy.sum(), (hidden, weight, bias))


def test_bitwise_the_same_again(device):
    hidden, weight, bias, labels = problem(device, torch.bfloat16, shape=(300,), hidden_size=64, vocab=1003)
    runs = []
    for _ in range(2):
        ours = packops.linear_log_probs(hidden, weight, labels, bias=bias, chunk_tokens=100)
        runs.append((*ours, *torch.autograd.grad(ours.log_probs.sum() + ours.entropy.sum(), (hidden, weight, bias))))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"shift": True, "softcap": 3.0, "chunk_tokens": 3}, {"entropy": False, "num_valid": 9}])
def test_opcheck(device, options):
    hidden, weight, bias, labels = problem(device, shape=(2, 5), hidden_size=4, vocab=9)
    arguments = {"cu_seqlens": torch.tensor([0, 3, 8], device=device), "bias": bias, **options}
    ops = torch.ops.packops
    torch.library.opcheck(ops.linear_log_probs.default, (hidden, weight, labels), arguments)
    plain = [x.detach() for x in (hidden, weight)]
    arguments["bias"] = bias.detach()
    torch.library.opcheck(ops._linear_log_probs_forward.default, (*plain, labels), arguments)
    _, entropy, row_max, log_sum, target = ops._linear_log_probs_forward(*plain, labels, **arguments)
    g = torch.randn(10, device=device)
    names = (*module.MATHS, *module.CHUNKS, "bias")
    torch.library.opcheck(
        ops._linear_log_probs_backward.default,
        (g, g if entropy.numel() else None, None, *plain, target, entropy, row_max, log_sum),
        {**{k: v for k, v in arguments.items() if k in names}, "grad_hidden": True, "grad_bias": True},
    )


@pytest.mark.slow
def test_compiles_whole_with_dynamic_shapes(device):
    def model(hidden, weight, bias, labels, cu_seqlens, advantages):
        ours = packops.linear_log_probs(
            hidden.tanh(), weight, labels, bias=bias, cu_seqlens=cu_seqlens, shift=True, logit_scale=1.25, chunk_tokens=4
        )
        sums = packops.document_sums(ours.log_probs * advantages, cu_seqlens)
        return -sums.mean() - 0.01 * ours.entropy.mean() + ours.lse.square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for tokens in (6, 11):
        hidden, weight, bias, labels = problem(device, shape=(tokens,), ignored=(2,))
        arguments = hidden, weight, bias, labels, torch.tensor([0, 4, tokens], device=device), torch.randn(tokens, device=device)
        results = []
        for f in (compiled, model):
            loss = f(*arguments)
            results.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(device, reentrant):
    hidden, weight, bias, labels = problem(device)

    def loss(hidden, weight, bias):
        ours = packops.linear_log_probs(hidden.tanh(), weight, labels, bias=bias, chunk_tokens=9)
        return ours.log_probs.sum() + 0.1 * ours.entropy.sum()

    expected = torch.autograd.grad(loss(hidden, weight, bias), (hidden, weight, bias))
    checkpoint(loss, hidden, weight, bias, use_reentrant=reentrant).backward()
    for leaf, grad in zip((hidden, weight, bias), expected, strict=True):
        assert torch.equal(leaf.grad, grad)


def test_autocast(device):
    hidden, weight, bias, labels = problem(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = packops.linear_log_probs(hidden, weight, labels, bias=bias)
    cast = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight, bias)]
    expected = packops.linear_log_probs(*cast[:2], labels, bias=cast[2])
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    grads = torch.autograd.grad(ours.log_probs.sum(), (hidden, weight, bias))
    for a, b in zip(grads, torch.autograd.grad(expected.log_probs.sum(), cast), strict=True):
        assert torch.equal(a, b.float())


class Head(torch.nn.Linear):
    def forward(self, hidden, labels):
        return packops.linear_log_probs(hidden, self.weight, labels, bias=self.bias, chunk_tokens=3)


def train_sharded(rank, expected, *tensors):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    hidden, labels, weight, bias = (x.to(this_device()) for x in tensors)
    head = Head(8, 11, device=this_device())
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    fully_shard(head, mesh=init_device_mesh(this_device().type, (2,)), reshard_after_forward=True)
    here = slice(rank * 10, rank * 10 + 10)
    ours = head(hidden[here], labels[here])
    (2 * (ours.log_probs.sum() - 0.3 * ours.entropy.sum())).backward()  # FSDP averages gradients over the ranks
    for parameter, grad in zip((head.weight, head.bias), expected, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor().cpu(), grad, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="weight must be a plain tensor"):
        packops.linear_log_probs(hidden, head.weight, labels)


@pytest.mark.slow
@fabrics(2)
def test_fully_sharded_weight(backend, world_size, tmp_path):
    hidden, weight, bias, labels = problem("cpu", shape=(20,), hidden_size=8, vocab=11, ignored=(1, 2, 15))
    ours = packops.linear_log_probs(hidden, weight, labels, bias=bias)
    expected = torch.autograd.grad(ours.log_probs.sum() - 0.3 * ours.entropy.sum(), (weight, bias))
    tensors = (x.detach() for x in (hidden, labels, weight, bias))
    run_ranks(world_size, tmp_path, train_sharded, expected, *tensors, backend=backend)


def _over_ranks(rank, hidden, weight, bias, labels, weights, sizes):
    begin = sum(sizes[:rank])
    for options in (
        {},
        {"shift": True, "chunk_tokens": 7, "logit_scale": 1.4},
        {"softcap": 3.0, "num_valid": 24, "chunk_tokens": 5},
    ):
        whole = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        expected = packops.linear_log_probs(*whole[:2], labels, bias=whole[2], **options)
        expected_grads = torch.autograd.grad(weighted(expected, weights), whole)
        local = [hidden.clone(), *(x[begin : begin + sizes[rank]].clone() for x in (weight, bias))]
        local = [x.requires_grad_() for x in local]
        ours = packops.vocab_parallel_linear_log_probs(*local[:2], labels, local_bias=local[2], shard_sizes=sizes, **options)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
        grads = torch.autograd.grad(weighted(ours, weights), local)
        torch.testing.assert_close(grads[0], expected_grads[0], rtol=1e-5, atol=1e-5)
        for a, b in zip(grads[1:], expected_grads[1:], strict=True):
            torch.testing.assert_close(a, b[begin : begin + sizes[rank]], rtol=1e-5, atol=1e-5)
        from torch import distributed as dist

        for x in ours:  # the same bits everywhere
            others = [torch.empty_like(x) for _ in sizes]
            dist.all_gather(others, x.detach().contiguous())
            assert all(torch.equal(x, other) for other in others)


def over_ranks(rank, sizes, weights, *tensors):
    hidden, weight, bias, labels = (x.to(this_device()) for x in tensors)
    weights = {name: x.to(this_device()) for name, x in weights.items()}
    for widths in (sizes, [0, sum(sizes)]):  # a rank may have no classes
        _over_ranks(rank, hidden, weight, bias, labels, weights, widths)
    begin = sum(sizes[:rank])
    # A shard whose classes are all switched off, with a label among them.
    off = torch.full((sizes[0],), -math.inf, device=this_device())
    masked = torch.cat([off, bias[sizes[0] :]])
    labels = labels.clone()
    labels[0] = 3
    expected = packops.linear_log_probs(hidden, weight, labels, bias=masked)
    ours = packops.vocab_parallel_linear_log_probs(
        hidden, weight[begin : begin + sizes[rank]], labels, local_bias=masked[begin : begin + sizes[rank]], shard_sizes=sizes
    )
    assert ours.log_probs[0] == -math.inf
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    uneven = hidden, weight[: 20 + rank], labels.clamp(max=9)  # widths that a rank did not tell
    if hidden.is_cuda:
        assert packops.vocab_parallel_linear_log_probs(*uneven).log_probs[labels != -100].isnan().all()
    packops.checks(True)
    with pytest.raises(ValueError, match="do not line up"):
        packops.vocab_parallel_linear_log_probs(*uneven)
    packops.checks(False)
    with pytest.raises(TypeError, match="vocab_parallel_linear_log_probs: weight must have hidden's dtype"):
        packops.vocab_parallel_linear_log_probs(hidden, weight.double(), labels)


@pytest.mark.slow
@fabrics(2)
def test_vocabulary_over_ranks(backend, world_size, tmp_path):
    hidden, weight, bias, labels = problem("cpu", ignored=(1, 6))
    labels[2], labels[3], labels[4] = 0, 29, 30  # the edges of shards
    sizes = [30, 37]
    tensors = (x.detach() for x in (hidden, weight, bias, labels))
    run_ranks(world_size, tmp_path, over_ranks, sizes, upstream(labels.shape, "cpu"), *tensors, backend=backend)


# --------------------------------------------------------------------------------------------------------------------- bad input


def bad_arguments():
    h, w, y = torch.randn(4, 9), torch.randn(5, 9), torch.zeros(4, dtype=torch.int64)
    yield "float labels", (h, w, y.float()), {}, TypeError, "labels must be int32 or int64, got"
    yield "int hidden", (h.long(), w, y), {}, TypeError, "hidden must be bfloat16, float16 or float32, got"
    yield "weight's dtype", (h, w.bfloat16(), y), {}, TypeError, "weight must have hidden's dtype"
    yield "weight's shape", (h, w[:, :8], y), {}, ValueError, r"weight must have shape \(vocab, 9\) .* got \(5, 8\)"
    yield "features", (h[:, :0], w[:, :0], y), {}, ValueError, r"hidden must have at least one feature, got \(4, 0\)"
    yield "labels' shape", (h, w, y[:3]), {}, ValueError, r"labels must have hidden's leading shape \(4,\), got \(3,\)"
    yield "no classes", (h, w[:0], y), {}, ValueError, "at least one class"
    yield "bias' shape", (h, w, y), {"bias": torch.randn(6)}, ValueError, r"bias must have shape \(5,\), got \(6,\)"
    yield "softcap", (h, w, y), {"softcap": 0.0}, ValueError, "softcap must be positive"
    yield "scale", (h, w, y), {"logit_scale": -1.0}, ValueError, "logit_scale must be positive"
    yield "cu_seqlens' dtype", (h, w, y), {"cu_seqlens": torch.zeros(2)}, TypeError, "cu_seqlens must be int32 or int64"
    yield "cu_seqlens", (h, w, y), {"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens must start at 0"
    yield "num_valid", (h, w, y), {"num_valid": 5}, ValueError, "num_valid must be between 0 and the 4 rows, got 5"
    yield "low num_valid", (h, w, y), {"num_valid": 3}, ValueError, r"num_valid must be at least .* \(4\), got 3"
    yield "chunk_tokens", (h, w, y), {"chunk_tokens": 0}, ValueError, "chunk_tokens must be at least 1, got 0"
    yield "label", (h, w, y + 5), {}, IndexError, r"label 5 at position 0 is outside \[0, 5\)"


@pytest.mark.parametrize("case", list(bad_arguments()), ids=lambda case: case[0])
@pytest.mark.parametrize("grad", [False, True])
def test_bad_arguments_are_named(case, grad):
    _, (hidden, *rest), options, error, message = case
    hidden = hidden.clone().requires_grad_() if grad and hidden.is_floating_point() else hidden
    for call in (packops.linear_log_probs, torch.ops.packops.linear_log_probs):
        with pytest.raises(error, match="packops.linear_log_probs: .*" + message):
            call(hidden, *rest, **options)


def test_what_must_be_plain_and_on_the_host():
    hidden, weight, _, labels = problem("cpu", bias=False)
    with pytest.raises(TypeError, match="num_valid must be an int on the host"):
        packops.linear_log_probs(hidden, weight, labels, num_valid=torch.tensor(3))
    with pytest.raises(TypeError, match=r"weight must be a plain tensor, got a DTensor"):
        packops.linear_log_probs(hidden, type("Sharded", (type("DTensor", (), {}),), {})(), labels)


@pytest.mark.gpu
def test_bad_rows_show_on_cuda():
    device = torch.device("cuda")
    hidden, weight, _, labels = problem(device, bias=False)
    labels[4] = 67
    ours = packops.linear_log_probs(hidden, weight, labels)
    assert ours.log_probs.isnan().nonzero().tolist() == [[4]]
    (grad,) = torch.autograd.grad(ours.log_probs.sum() + ours.entropy.sum(), hidden)
    assert grad.isfinite().all()
    assert (grad[4] == 0).all()
    assert packops.linear_log_probs(hidden, weight, labels.clamp(max=66), num_valid=20).log_probs.isnan().all()


# ------------------------------------------------------------------------------------------------------------------ document_sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bounds", [[0, 4, 4, 5, 12, 21], [0, 26], [0], [0, 0], [0, 26, 26], [0, 1, 2, 26]])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_document_sums(device, dtype, bounds, index):
    values = torch.randn(2, 13, device=device, dtype=dtype).requires_grad_()
    cu_seqlens = torch.tensor(bounds, dtype=index, device=device)
    exact = reference.document_sums(values, cu_seqlens)
    ours = packops.document_sums(values, cu_seqlens)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, rtol=4 * EPS[dtype], atol=0)
    weights = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, values, weights), torch.autograd.grad((exact * weights).sum(), values), strict=True
    ):
        assert torch.equal(a, b)


def test_document_sums_are_of_their_documents_alone(device):
    """Long documents lose nothing, NaN stays where it is, padding counts for nothing."""
    values = torch.rand(100_003, device=device)
    cu_seqlens = torch.tensor([0, 3, 50_000, 99_999], device=device)
    exact = reference.document_sums(values, cu_seqlens)
    values[1], values[100_001] = math.nan, math.inf
    ours = packops.document_sums(values, cu_seqlens)
    assert ours[0].isnan()
    torch.testing.assert_close(ours[1:].double(), exact[1:], rtol=EPS[torch.float32] / 2, atol=0)


def test_document_sums_twice_differentiable():
    values = torch.randn(7, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 3, 3, 6])
    assert torch.autograd.gradcheck(lambda v: packops.document_sums(v.square(), cu_seqlens), values)
    assert torch.autograd.gradgradcheck(lambda v: packops.document_sums(v.square(), cu_seqlens).exp(), values)
    torch.library.opcheck(torch.ops.packops.document_sums.default, (values, cu_seqlens))


def test_document_sums_of_bad_input(device):
    values, cu_seqlens = torch.randn(5, device=device), torch.tensor([0, 2, 5], device=device)
    sums = packops.document_sums
    for call, error, message in (
        (lambda: sums(values.half(), cu_seqlens), TypeError, "values must be float32 or float64, got torch.float16"),
        (lambda: sums(values, cu_seqlens.float()), TypeError, "cu_seqlens must be int32 or int64"),
        (lambda: sums(values, cu_seqlens[None]), ValueError, r"cu_seqlens must have shape \(documents \+ 1,\), got \(1, 3\)"),
        (lambda: sums([1.0], cu_seqlens), TypeError, "values must be a tensor, got a list"),
    ):
        with pytest.raises(error, match="packops.document_sums: " + message):
            call()
    for bad in ([1, 5], [0, 4, 3, 5], [0, 6], [-2, 5]):
        bounds = torch.tensor(bad, device=device)
        if device.type == "cuda":
            sums(values, bounds).cpu()  # any value, but no access outside
        else:
            with pytest.raises(ValueError, match="document_sums: cu_seqlens must start at 0"):
                sums(values, bounds)
