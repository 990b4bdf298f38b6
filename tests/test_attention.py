"""Attention within documents against fp64 with a mask of tokens x tokens; who is never seen; bits that depend on nothing else."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import packops
from cuda_streams import capture, no_host_sync
from packops import reference

OPS = torch.ops.packops
LENGTHS = (1, 70, 0, 64, 129, 3)
RULES = [
    {},
    {"window": 1},
    {"window": 66},
    {"softcap": 2.0, "scale": 0.3},
    {"softcap": 2.0, "window": 20},
    {"causal": False},
]
gpu = pytest.mark.gpu


def bounds_of(lengths, device="cpu", dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=device)


def problem(lengths=LENGTHS, *, heads=(4, 2), dim=64, dtype=None, device="cpu", padding=0, size=1.0):
    """q, k and v, slices of one projection as a model has them, a gradient, and the boundaries. Padding holds NaN."""
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    total = sum(lengths) + padding
    qkv = torch.randn(total, heads[0] + 2 * heads[1], dim, device=device).to(dtype)
    qkv[:, : heads[0]] *= size
    qkv[sum(lengths) :] = torch.nan
    q, k, v = (x.detach().requires_grad_() for x in qkv.split([heads[0], heads[1], heads[1]], 1))
    return q, k, v, torch.randn(total, heads[0], dim, device=device).to(dtype), bounds_of(lengths, device)


def results(call, q, k, v, grad, bounds, **rule):
    out = call(q, k, v, bounds, **rule)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))]


UNITS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def check(*given, noise=0.0, **rule):
    got = results(packops.attention, *given, **rule)
    want = results(reference.attention, *given, **rule)
    for name, a, b in zip(("out", "grad_q", "grad_k", "grad_v"), got, want, strict=True):
        worst, most = (a.double() - b).abs().max(), b.abs().max()
        assert worst <= (2 * UNITS[a.dtype] + noise) * most + 1e-5, f"{name} is off by {worst:.2e} of {most:.2e}"


def dtypes_of(device):
    return (torch.float16, torch.bfloat16) if device.type == "cuda" else tuple(UNITS)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2)], ids=str)
def test_every_rule(rule, heads, device):
    for dtype in dtypes_of(device):
        check(*problem(heads=heads, dtype=dtype, device=device, padding=5), **rule)


@pytest.mark.parametrize("dim", [64, 128, 256, 8, 40, 80, 96, 192, 248])
def test_every_head_dim(dim, device):
    for heads, rule in itertools.product([(2, 1), (7, 7), (8, 1)], [{}, {"softcap": 30.0, "window": 100}]):
        check(*problem(heads=heads, dim=dim, device=device), **rule)


def test_weights_on_one_key(device):
    """Rows whose softmax is one key's, where a wrong maximum or a lost correction shows."""
    for dtype in dtypes_of(device):
        # scores of 100 and more have that much rounding in fp32, and weights as much
        check(*problem((200, 40), dtype=dtype, device=device, size=40.0), noise=0 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("dim", [64, 256])
def test_scores_of_every_size(dim, device):
    """Up to 2^40; from 2^31 on rounding alone would overflow an exponent. A query has the keys of its own feature."""
    tokens = 600 if device.type == "cuda" else 70
    feature = torch.arange(tokens, device=device) * 7 % dim
    for dtype, size in itertools.product(dtypes_of(device), (4.1e2, 1.37e3, 4.1e4, 3.7e5)):
        if size > torch.finfo(dtype).max:
            continue
        _, _, v, grad, bounds = problem([tokens], heads=(1, 1), dim=dim, dtype=dtype, device=device)
        q, k = ((torch.nn.functional.one_hot(feature, dim)[:, None] * size).to(dtype).requires_grad_() for _ in range(2))
        found, want = (results(call, q, k, v, grad, bounds) for call in (packops.attention, reference.attention))
        for i in (0, 3):  # the others are sums that cancel
            if i == 3 and device.type == "cuda" and size > 1e3:
                assert found[i].isnan().all()  # fp32 does not hold what gradients need of such a score
            else:
                assert (found[i].double() - want[i]).abs().max() <= 2 * UNITS[dtype] * want[i].abs().max()


@pytest.mark.parametrize(
    "lengths", [[1] * 300, [2000], [5, 700, 1, 64, 65, 63, 128], [0, 0], [0, 64, 0]], ids=lambda x: str(x[:4])
)
def test_lengths(lengths, device):
    check(*problem(lengths, heads=(2, 1), device=device, padding=0 if sum(lengths) else 3))


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_empty(lengths, device):
    q, k, v, grad, bounds = problem(lengths, device=device)
    assert [x.shape for x in results(packops.attention, q, k, v, grad, bounds)] == [q.shape, q.shape, k.shape, v.shape]
    q, k, v, grad, bounds = problem([5], heads=(0, 1), device=device)
    out, _, grad_k, grad_v = results(packops.attention, q, k, v, grad, bounds)
    assert out.shape == (5, 0, 64)
    assert not grad_k.any()
    assert not grad_v.any()


@gpu
@pytest.mark.parametrize("rule", [{}, {"window": 66, "softcap": 2.0}, {"causal": False}], ids=str)
@pytest.mark.parametrize("dim", [8, 56, 72, 104, 120, 136, 184, 200, 248])
def test_heads_have_the_bits_of_heads_filled_up_with_zeros(dim, rule):
    """Those that fill the tiles of their kernel, with the same scale; gradients where no document is long. In memory, NaN lies
    behind the features of a head."""
    full = next(most for most in (64, 96, 128, 192, 256) if dim < most)
    rule = {"scale": dim**-0.5, **rule}
    for lengths, compared in ((LENGTHS, 4), ([3100, 40], 1)):
        q, k, v, grad, bounds = problem(lengths, dim=full, device="cuda", padding=5)
        filled = [x.detach().clone() for x in (q, k, v, grad)]
        for x in filled:
            x[..., dim:] = 0
        parts = [torch.where(torch.arange(full, device="cuda") < dim, x.detach(), torch.nan)[..., :dim] for x in (q, k, v, grad)]
        found = results(packops.attention, *(x.requires_grad_() for x in parts[:3]), parts[3], bounds, **rule)
        want = results(packops.attention, *(x.requires_grad_() for x in filled[:3]), filled[3], bounds, **rule)
        for a, b in zip(found[:compared], want, strict=False):
            assert torch.equal(a, b[..., :dim])
            assert not b[..., dim:].any()


@gpu
def test_many_documents_and_long_ones():
    lengths = torch.randint(0, 5, (20000,)).tolist()
    q, k, v, grad, bounds = problem(lengths, heads=(2, 1), device="cuda", padding=70)
    got = results(packops.attention, q, k, v, grad, bounds)
    some = slice(int(bounds[9000]), int(bounds[9300]))
    part = [x[some].detach().requires_grad_() for x in (q, k, v)]
    want = results(reference.attention, *part, grad[some], bounds[9000:9301] - bounds[9000])
    for a, b in zip(got, want, strict=True):
        assert (a[some].double() - b).abs().max() <= 2**-6 * b.abs().max()
        assert not a[int(bounds[-1]) :].any()
    check(*problem([9000], heads=(2, 2), dim=128, device="cuda"))


LONG = [3100, 40, 1300, 0, 577, 70]  # each of them longer than 2048, 1280, 768 or 576 tokens, or than none
LONG_RULES = [{}, {"window": 1299}, {"window": 1500, "softcap": 20.0}, {"causal": False}]


@gpu
@pytest.mark.parametrize("rule", LONG_RULES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256, 80, 120, 192])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_long_documents(dtype, dim, rule):
    """They have kernels of their own, which do not change what short ones get, nor have rows of them. 1299: all but one token."""
    q, k, v, grad, bounds = problem(LONG, heads=(4, 2), dim=dim, dtype=dtype, device="cuda", padding=9)
    check(q, k, v, grad, bounds, **rule)
    found = results(packops.attention, q, k, v, grad, bounds, **rule)
    with torch.no_grad():
        for x in (q, k, v):
            x[3140:4440] = torch.nan
    for a, b in zip(found, results(packops.attention, q, k, v, grad, bounds, **rule), strict=True):
        assert torch.equal(a[:3140], b[:3140])
        assert torch.equal(a[4440:], b[4440:])


@gpu
@pytest.mark.parametrize("rule", LONG_RULES[1:], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256, 96, 192])
def test_bits_of_long_documents(dim, rule):
    """Those that a document has alone, on both sides of every length from which it is long, in every run, and in a graph."""
    lengths = [40, 2049, 769, 1280, 0, 576, 1281, 577, 768, 2048, 1024, 1025, 3100]
    q, k, v, grad, bounds = problem(lengths, heads=(4, 2), dim=dim, device="cuda", padding=9)
    found = results(packops.attention, q, k, v, grad, bounds, **rule)
    for a, b in zip(found, results(packops.attention, q, k, v, grad, bounds, **rule), strict=True):
        assert torch.equal(a, b)
    for begin, n in zip(itertools.accumulate([0, *lengths]), lengths, strict=False):
        there = slice(begin, begin + n)
        alone = [x[there].detach().requires_grad_() for x in (q, k, v)]
        for a, b in zip(found, results(packops.attention, *alone, grad[there], bounds_of([n], "cuda"), **rule), strict=True):
            assert torch.equal(a[there], b), n
    q, k, v, grad, bounds = problem([3500], dim=dim, device="cuda")
    graph, found = capture(lambda: results(packops.attention, q, k, v, grad, bounds, **rule))
    for total in (3500, 300, 1500):
        bounds.copy_(bounds_of([total]))
        graph.replay()
        for a, b in zip(found, results(packops.attention, q, k, v, grad, bounds, **rule), strict=True):
            assert torch.equal(a, b)


@gpu
@pytest.mark.parametrize("dim", [64, 96, 120, 128, 192, 256])
def test_bits_of_long_documents_in_a_thousand_calls(dim):
    """Copies into shared memory that come before its readers are done are rare: once in 200 calls like these, and in one row."""
    q, k, v, _, bounds = problem([800] * 20, heads=(32, 8), dim=dim, device="cuda")
    with torch.no_grad():
        want = packops.attention(q, k, v, bounds)
        others = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(1000):
            others += (packops.attention(q, k, v, bounds) != want).any()
    assert others == 0


@gpu
@pytest.mark.parametrize("dim", [64, 128, 256, 72])
def test_strides_of_long_documents(dim):
    """Heads before tokens, inputs and a gradient that are expanded, one head with any stride."""
    n = 3200
    q, k, v, grad, bounds = problem([n], heads=(4, 2), dim=dim, device="cuda")
    with torch.no_grad():
        swapped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
        expanded = [q[5:6].expand(n, 4, dim), k[:, :1].expand(n, 2, dim), v[:, :1].expand(n, 2, dim)]
        single = [x[:, :1].as_strided((n, 1, dim), (x.stride(0), 8 << 40, 1), x.storage_offset()) for x in (q, k, v)]
    for inputs, g in ((swapped, grad), (expanded, grad[:1].expand(n, 4, dim)), (single, grad[:, 1:2])):
        given = [x.detach().requires_grad_() for x in inputs]
        plain = [x.detach().contiguous().requires_grad_() for x in inputs]
        for a, b in zip(
            results(packops.attention, *given, g, bounds),
            results(packops.attention, *plain, g.contiguous(), bounds),
            strict=True,
        ):
            assert torch.equal(a, b)


@gpu
def test_long_documents_past_2_31_elements():
    """The last document begins at an element beyond 2^31, and has the bits that it has alone."""
    if torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("needs 48 GiB")
    n, heads, dim = 1300, 64, 128
    lengths = [800] * 330 + [n]
    bounds = bounds_of(lengths, "cuda")
    qkv = torch.randn(sum(lengths), heads + 2, dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = (x.requires_grad_() for x in qkv.split([heads, 1, 1], 1))
    grad = torch.randn(sum(lengths), heads, dim, device="cuda", dtype=torch.bfloat16)
    assert (sum(lengths) - n) * heads * dim > 2**31
    found = [x[-n:].clone() for x in results(packops.attention, q, k, v, grad, bounds)]
    alone = [x[-n:].detach().clone().requires_grad_() for x in (q, k, v)]
    for a, b in zip(found, results(packops.attention, *alone, grad[-n:], bounds_of([n], "cuda")), strict=True):
        assert torch.equal(a, b)


@gpu
@pytest.mark.parametrize("dim", [64, 128, 256, 96, 192])
def test_prefixes_that_are_long(dim):
    """A prompt that is long by itself and its branches, beside a long document without any."""
    segments, parents = [3100, 90, 1200, 3080], torch.tensor([-1, 0, 0, -1], dtype=torch.int32, device="cuda")
    q, k, v, grad, bounds = problem(segments, heads=(2, 1), dim=dim, device="cuda", padding=3)
    shared = results(functools.partial(packops.attention, parents=parents), q, k, v, grad, bounds)
    want = results(functools.partial(reference.attention, parents=parents), q, k, v, grad, bounds)
    for a, b in zip(shared, want, strict=True):
        assert (a.double() - b).abs().max() <= 2**-6 * b.abs().max()


@gpu
@pytest.mark.parametrize("rule", [{}, {"softcap": 20.0}, {"window": 1400}], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256, 192])
def test_branches_of_a_long_prefix(dim, rule):
    """Kernels for long documents take the prefix and its branches for one: NaN in a branch still stays there, and no other bit
    depends on it, on the run or on the place in the row."""
    segments, above = [40, 2100, 513, 70, 64, 129, 1, 600, 90], [-1, -1, 1, 2, 1, 1, 1, -1, 7]
    parents = torch.tensor(above, dtype=torch.int32, device="cuda")
    q, k, v, grad, bounds = problem(segments, heads=(4, 2), dim=dim, device="cuda", padding=9)
    shared = functools.partial(packops.attention, parents=parents)
    found = results(shared, q, k, v, grad, bounds, **rule)
    want = results(functools.partial(reference.attention, parents=parents), q, k, v, grad, bounds, **rule)
    for a, b in zip(found, want, strict=True):
        assert (a.double() - b).abs().max() <= 2**-6 * b.abs().max()
    for a, b in zip(found, results(shared, q, k, v, grad, bounds, **rule), strict=True):
        assert torch.equal(a, b)

    own = slice(40, 2723)  # the prefix, a branch, and a branch of that
    alone = [x[own].detach().requires_grad_() for x in (q, k, v)]
    few = functools.partial(packops.attention, parents=torch.tensor([-1, 0, 1], dtype=torch.int32, device="cuda"))
    for a, b, begin in zip(
        found, results(few, *alone, grad[own], bounds_of(segments[1:4], "cuda"), **rule), (0, 0, 2100, 2100), strict=True
    ):
        assert torch.equal(a[own][begin:], b[begin:])

    bad = slice(2723, 2787)
    with torch.no_grad():
        for x in (q, k, v):
            x[bad] = torch.nan
    is_seen = torch.zeros(len(q), dtype=torch.bool)
    is_seen[40:2140] = is_seen[bad] = True
    for i, (a, b) in enumerate(zip(found, results(shared, q, k, v, grad, bounds, **rule), strict=True)):
        others = ~is_seen if i >= 2 else torch.arange(len(q)).lt(bad.start) | torch.arange(len(q)).ge(bad.stop)
        assert torch.equal(a[others], b[others])
        assert b[bad].isnan().any()


@gpu
@pytest.mark.parametrize("rule", [{}, {"softcap": 20.0}, {"window": 400}], ids=str)
@pytest.mark.parametrize("heads", [(8, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256, 192])
def test_branches_of_a_short_prefix_that_many_see(dim, heads, rule):
    """Blocks share out the queries. The bits are the same at every run, and wherever the tree lies: here behind one with a
    long prefix."""
    tree = [333, *[290, 64, 3, 129] * 10]
    above = [-1, *itertools.chain.from_iterable((0, 4 * i + 1, 0, 0) for i in range(10))]
    long, branch = [2100, 70], [-1, 0]
    segments = [*long, *tree, *long, *tree]
    parents = [p + at * (p >= 0) for at, some in ((0, branch), (2, above), (43, branch), (45, above)) for p in some]
    shared = functools.partial(packops.attention, parents=torch.tensor(parents, dtype=torch.int32, device="cuda"))
    own = slice(2170, 2170 + sum(tree))
    q, k, v, grad, bounds = problem(segments, heads=heads, dim=dim, device="cuda", padding=9)
    found = results(shared, q, k, v, grad, bounds, **rule)
    for a, b in zip(found, results(shared, q, k, v, grad, bounds, **rule), strict=True):
        assert torch.equal(a, b)

    alone = [x[own].detach().requires_grad_() for x in (q, k, v)]
    given = *alone, grad[own], bounds_of(tree, "cuda")
    parents = torch.tensor(above, dtype=torch.int32, device="cuda")
    for call, tolerance in ((packops.attention, 0), (reference.attention, 2**-6)):
        for a, b in zip(found, results(functools.partial(call, parents=parents), *given, **rule), strict=True):
            assert (a[own].double() - b).abs().max() <= tolerance * b.abs().max()


def test_without_queries_keys_have_gradients_of_zeros(device):
    q, k, v, grad, bounds = problem([2100, 300], heads=(0, 2), device=device)
    out, grad_q, *others = results(packops.attention, q, k, v, grad, bounds)
    assert out.shape == grad_q.shape == (2400, 0, 64)
    assert all(x.shape == (2400, 2, 64) and (x == 0).all() for x in others)


@gpu
def test_hopper_has_kernels_for_long_documents():
    """They run where the code has products of warp groups. Nothing is launched for them where no document can be long. A window
    along paths that share prefixes has one for the forward alone."""
    built_for = packops._C.build_info()["cuda_archs"].split("_")
    by_groups = torch.cuda.get_device_capability() == (9, 0) and any(arch.startswith("9.0") for arch in built_for)
    expected = {
        64: {2049: 2, 2048: 1, 1280: 0},
        128: {1281: 2, 1280: 1, 768: 0},
        256: {1025: 2, 577: 1, 576: 0},
        80: {1281: 2, 1280: 1, 768: 0},
        192: {1025: 2, 577: 1},
    }
    cases = [(dim, [n], {}, kernels) for dim, counts in expected.items() for n, kernels in counts.items()]
    parents = torch.tensor([-1, 0], dtype=torch.int32, device="cuda")
    cases += [(64, [2049, 70], rule | {"parents": parents}, kernels) for rule, kernels in (({}, 2), ({"window": 2100}, 1))]
    for dim, lengths, rule, kernels in cases:
        given = problem(lengths, dim=dim, device="cuda")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            results(packops.attention, *given, **rule)
        names = [event.key for event in profile.key_averages()]
        found = [
            name for name in names if any(x in name for x in ("long_forward_kernel", "long_joint_kernel", "long_split_kernel"))
        ]
        assert len(found) == (kernels if by_groups else 0), found


def test_documents_never_see_each_other(device):
    q, k, v, grad, bounds = problem(device=device)
    begin, end = 71, 135
    before = results(packops.attention, q, k, v, grad, bounds)
    with torch.no_grad():
        for x in (q, k, v):
            x[:begin] = torch.nan
            x[end:] = torch.inf
    after = results(packops.attention, q, k, v, grad, bounds)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[begin:end], b[begin:end])


def test_padding_is_zero_whatever_it_holds(device):
    for padding in (1, 64, 200):
        q, k, v, grad, bounds = problem(device=device, padding=padding)
        grad[sum(LENGTHS) :] = torch.nan
        for x in results(packops.attention, q, k, v, grad, bounds):
            assert not x[sum(LENGTHS) :].any()
            assert x[: sum(LENGTHS)].isfinite().all()


@pytest.mark.parametrize("rule", [{}, {"softcap": 5.0}, {"causal": False}], ids=str)
def test_bits_depend_on_the_document_alone(rule, device):
    """Not on the run, the neighbours, or the place in the pack."""
    q, k, v, grad, bounds = problem([30, 150, 7], device=device)
    first = results(packops.attention, q, k, v, grad, bounds, **rule)
    again = results(packops.attention, q, k, v, grad, bounds, **rule)
    moved = [torch.cat([x[180:], x[:30], x[30:180]]).detach().requires_grad_() for x in (q, k, v, grad)]
    other = results(packops.attention, *moved, bounds_of([7, 30, 150], device), **rule)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[30:180], c[37:])


def test_strides(device):
    """Heads before tokens, a gradient that is expanded, rows that do not begin at 16 bytes, int64 boundaries."""
    dtype = dtypes_of(device)[-1]
    q, k, v = (torch.randn(h, 50, 64, device=device).to(dtype).transpose(0, 1).requires_grad_() for h in (4, 2, 2))
    grad = torch.randn(50, 1, 1, device=device).to(dtype).expand(50, 4, 64)
    check(q, k, v, grad, bounds_of([20, 30], device, torch.int64))
    odd = [torch.randn(50, h, 65, device=device).to(dtype)[:, :, 1:].requires_grad_() for h in (4, 2, 2)]
    check(*odd, torch.randn(50, 4, 65, device=device).to(dtype)[:, :, 1:], bounds_of([20, 30], device))
    wide = torch.randn(50, 4, 128, device=device).to(dtype)[..., ::2]  # the last dimension is not contiguous
    check(*(x.detach().requires_grad_() for x in (wide, wide[:, :2], wide[:, 2:])), grad, bounds_of([20, 30], device))


def test_only_what_needs_a_gradient(device):
    q, k, v, grad, bounds = problem(device=device)
    assert not packops.attention(q.detach(), k.detach(), v.detach(), bounds).requires_grad
    with torch.no_grad():
        assert not packops.attention(q, k, v, bounds).requires_grad
    out = packops.attention(q, k.detach(), v.detach(), bounds)
    (found,) = torch.autograd.grad(out, q, grad)
    assert torch.equal(found, results(packops.attention, q, k, v, grad, bounds)[1])


def test_gradcheck():
    q, k, v, _, bounds = problem([3, 0, 4], heads=(2, 1), dim=3, dtype=torch.float64)
    for rule in RULES:
        assert torch.autograd.gradcheck(lambda *x, rule=rule: packops.attention(*x, bounds, **rule), (q, k, v))
    (g,) = torch.autograd.grad(packops.attention(q, k, v, bounds).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        g.sum().backward()


def test_the_op_itself(device):
    """Differentiable, with fake kernels, and in one graph of torch.compile."""
    q, k, v, grad, bounds = problem(device=device)
    torch.library.opcheck(OPS.attention.default, (q, k, v, bounds), {"window": 20, "softcap": 3.0, "scale": 0.2})
    want = results(packops.attention, q, k, v, grad, bounds, window=20)
    call = torch.compile(functools.partial(packops.attention, window=20), backend="aot_eager", fullgraph=True)
    for found in (
        results(call, q, k, v, grad, bounds),
        results(functools.partial(OPS.attention, window=20), q, k, v, grad, bounds),
    ):
        for a, b in zip(found, want, strict=True):
            assert torch.equal(a, b)


@gpu
def test_no_host_sync_and_graphs():
    """A captured graph replays with other documents."""
    q, k, v, grad, bounds = problem([40, 60, 100], device="cuda")
    with no_host_sync():
        results(packops.attention, q, k, v, grad, bounds)
    graph, found = capture(lambda: results(packops.attention, q, k, v, grad, bounds))
    for lengths in ([40, 60, 100], [200, 0, 0], [1, 1, 50], [0, 0, 0]):
        bounds.copy_(bounds_of(lengths))
        graph.replay()
        for a, b in zip(found, results(packops.attention, q, k, v, grad, bounds), strict=True):
            assert torch.equal(a, b)


@gpu
def test_hopper_multiplies_by_warp_groups():
    """Code that has them is found and used: else it is right, and half as fast. Code for others has none, on a Hopper too."""
    built_for = packops._C.build_info()["cuda_archs"].split("_")
    by_groups = torch.cuda.get_device_capability() == (9, 0) and any(arch.startswith("9.0") for arch in built_for)
    given = problem(device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        results(packops.attention, *given)
    names = [event.key for event in profile.key_averages() if "_kernel<packops::bf16_t, 64" in event.key]
    assert len(names) == 3
    assert all(f"_kernel<packops::bf16_t, 64, false, {str(by_groups).lower()}" in name for name in names)


@gpu
def test_malformed_boundaries_read_nothing_outside():
    q, k, v, grad, _ = problem([100], device="cuda")
    for values in ([0, 500], [-7, 50, 3, 90], [60, 0, 100], [0, 2**31 - 1], [0, 100, 0, 100, 0, 100]):
        results(packops.attention, q, k, v, grad, torch.tensor(values, device="cuda"))
    torch.cuda.synchronize()
    packops.checks(True)
    try:
        with pytest.raises(ValueError, match=r"cu_seqlens\[1\] = 500"):
            packops.attention(q, k, v, torch.tensor([0, 500], device="cuda"))
    finally:
        packops.checks(False)


BAD = {
    "q must have shape": lambda q, k, v, b: (q[0], k, v, b),
    "k must have the shape of q": lambda q, k, v, b: (q, k[1:], v, b),
    "whose number divides": lambda q, k, v, b: (q[:, :3], k, v, b),
    "v must have the shape of k": lambda q, k, v, b: (q, k, v[:, :1], b),
    "k must have the dtype of q": lambda q, k, v, b: (q, k.double(), v, b),
    "cu_seqlens must be int32 or int64": lambda q, k, v, b: (q, k, v, b.float()),
    r"cu_seqlens must have shape \(documents \+ 1,\)": lambda q, k, v, b: (q, k, v, b[None]),
}


@pytest.mark.parametrize("message", BAD)
def test_refused(message, device):
    q, k, v, _, bounds = problem(device=device)
    with pytest.raises((ValueError, TypeError), match=f"attention: .*{message}"):
        packops.attention(*BAD[message](q, k, v, bounds))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"window": 4, "causal": False}, "needs causal"),
        ({"softcap": 0.0}, "softcap must be positive, got 0"),
        ({"scale": float("nan")}, "scale must be positive, got nan"),
        ({"scale": -0.1}, "scale must be positive"),
    ],
    ids=str,
)
def test_rules_refused(rule, message, device):
    q, k, v, _, bounds = problem(device=device)
    with pytest.raises(ValueError, match=message):
        packops.attention(q, k, v, bounds, **rule)


def test_boundaries_refused_on_the_cpu():
    q, k, v, _, _ = problem([10])
    for values, message in (([1, 10], r"\[0\] = 1"), ([0, 5, 3], r"\[2\] = 3"), ([0, 11], r"\[1\] = 11")):
        with pytest.raises(
            ValueError, match=f"must start at 0, not decrease, and end at or before the number of rows \\(10\\), got .*{message}"
        ):
            packops.attention(q, k, v, torch.tensor(values))


@gpu
def test_refused_on_cuda():
    q, k, v, _, bounds = problem(device="cuda")
    op = torch.ops.packops.attention  # packops.attention goes another way: test_attention_paths.py
    with pytest.raises(TypeError, match="on CUDA q must be float16 or bfloat16, got Float"):
        op(q.float(), k.float(), v.float(), bounds)
    with pytest.raises(ValueError, match="on CUDA head_dim must be a multiple of 8 up to 256, got q of shape"):
        op(q[..., :60], k[..., :60], v[..., :60], bounds)
    with pytest.raises(ValueError, match="cu_seqlens must be on the device of q"):
        packops.attention(q, k, v, bounds.cpu())
