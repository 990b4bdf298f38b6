"""RMS norm of rows and of sums against fp64, with the digits that small weights and large rows have; fixed bits; refusals."""

from __future__ import annotations

import functools

import pytest
import torch

import packops
from cuda_streams import capture, no_host_sync
from packops import reference

OPS = torch.ops.packops
gpu = pytest.mark.gpu


def dtypes_of(device):
    return (torch.float32, torch.float16, torch.bfloat16) + ((torch.float64,) if device.type == "cpu" else ())


UNITS = {torch.float64: 1e-13, torch.float32: 2**-23, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def problem(shape=(5, 7, 64), dtype=torch.float32, device="cpu", size=1.0):
    x, grad = ((size * torch.randn(shape, device=device)).to(dtype) for _ in range(2))
    return x.requires_grad_(), torch.randn(shape[-1], device=device).to(dtype).requires_grad_(), grad


def results(call, x, weight, grad, **options):
    y = call(x, weight, **options)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad.to(y.dtype))]


def check(x, weight, grad, *, call=packops.rms_norm, eps=1e-6, **options):
    got = results(call, x, weight, grad, eps=eps, **options)
    want = results(reference.rms_norm, x, weight, grad, eps=eps, **options)
    for name, a, b, units in zip(("y", "grad_x", "grad_weight"), got, want, (4, 4, 16), strict=True):
        assert a.dtype == x.dtype
        # y of the largest in its row; a small gradient, down to a whole row's, is the difference of large numbers
        scale = b.abs().amax(-1, keepdim=True) if name == "y" else b.abs().amax() if b.numel() else b
        worst = ((a.double() - b).abs() / scale.clamp(min=1e-30)).max() if b.numel() else torch.zeros(())
        assert worst <= units * UNITS[a.dtype], f"{name} is off by {worst / UNITS[a.dtype]:.1f} units"


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("columns", [8, 64, 1032, 2048, 2304, 4096])
def test_every_width(columns, zero_centered, device):
    for dtype in dtypes_of(device):
        check(*problem((3, 11, columns), dtype, device), zero_centered=zero_centered)


@gpu
def test_wide_rows_and_many():
    check(*problem((9, 8192), torch.bfloat16, "cuda"))
    check(*problem((4099, 2048), torch.bfloat16, "cuda"))
    check(*problem((70001, 64), torch.float32, "cuda"))


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_size_of_rows(size, device):
    """Where epsilon matters, and where squares would overflow in fp16."""
    for dtype in dtypes_of(device):
        x, weight, grad = problem((9, 64), dtype, device, size)
        check(x, weight, (grad / size).detach(), eps=1e-5)


def test_small_weights_keep_their_digits(device):
    """1 + weight is made in fp32: in 16 bits it would be 1."""
    x, weight, grad = problem((4, 64), torch.bfloat16, device)
    weight = (1e-3 * weight).detach().requires_grad_()
    y = packops.rms_norm(x, weight, eps=0.0, zero_centered=True)
    exact = reference.rms_norm(x, weight, eps=0.0, zero_centered=True)
    assert ((y.double() - exact).abs() <= 1.01 * 2**-8 * exact.abs()).all()
    assert not torch.equal(y, packops.rms_norm(x, torch.zeros_like(weight), eps=0.0, zero_centered=True))
    check(x, weight, grad, zero_centered=True)


def test_strides(device):
    """Rows of a slice, rows in another order, a gradient that is expanded, rows that do not begin at 16 bytes, no rows."""
    dtype = torch.bfloat16
    x, weight, grad = problem((6, 5, 128), dtype, device)
    slices = x.detach()[..., 64:].requires_grad_()
    check(slices, weight[64:].detach().requires_grad_(), grad[:1, :1, :64].expand(6, 5, 64))
    check(x.detach().transpose(0, 1).requires_grad_(), weight, grad.transpose(0, 1))
    odd = torch.randn(7, 67, device=device).to(dtype)[:, 3:].requires_grad_()
    check(odd, torch.randn(65, device=device).to(dtype)[1:].requires_grad_(), odd.detach())
    check(*problem((0, 64), dtype, device))
    check(*problem((64,), dtype, device))


def test_bits_do_not_depend_on_the_run_nor_on_other_rows(device):
    x, weight, grad = problem((50, 2048), torch.bfloat16, device)
    first, again = (results(packops.rms_norm, x, weight, grad, eps=1e-6) for _ in range(2))
    part = results(packops.rms_norm, x[20:30].detach().requires_grad_(), weight, grad[20:30], eps=1e-6)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first[:2], part, strict=False):
        assert torch.equal(a[20:30], b)


def test_gradcheck():
    x, weight, _ = problem((3, 5), torch.float64)
    for zero_centered in (False, True):
        call = functools.partial(packops.rms_norm, eps=1e-3, zero_centered=zero_centered)
        assert torch.autograd.gradcheck(call, (x, weight))
    (g,) = torch.autograd.grad(packops.rms_norm(x, weight, eps=0.1).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        g.sum().backward()


def test_the_op_itself(device):
    x, weight, grad = problem(device=device)
    torch.library.opcheck(OPS.rms_norm.default, (x, weight), {"eps": 1e-5, "zero_centered": True})
    for options in ({"eps": 1e-5}, {"eps": 1e-2, "zero_centered": True}):
        want = results(packops.rms_norm, x, weight, grad, **options)
        for call in (torch.compile(packops.rms_norm, backend="aot_eager", fullgraph=True), OPS.rms_norm):
            for a, b in zip(results(call, x, weight, grad, **options), want, strict=True):
                assert torch.equal(a, b)
    assert not packops.rms_norm(x.detach(), weight.detach(), eps=1e-5).requires_grad


@gpu
def test_no_host_sync_and_graphs():
    x, weight, grad = problem((33, 256), torch.bfloat16, "cuda")
    with no_host_sync():
        want = results(packops.rms_norm, x, weight, grad, eps=1e-5)
    graph, found = capture(lambda: results(packops.rms_norm, x, weight, grad, eps=1e-5))
    graph.replay()
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)


def test_refused(device):
    x, weight, _ = problem(device=device)
    for given, error, message in (
        ((x.long(), weight), TypeError, "x must be float32, float16 or bfloat16"),
        ((x, weight[:8]), ValueError, r"weight must have as many elements as a row of x, \(5, 7, 64\), got \(8,\)"),
        ((x, weight.half()), TypeError, "weight must have the dtype of x, Float, got Half"),
    ):
        with pytest.raises(error, match=f"rms_norm: {message}"):
            packops.rms_norm(*given, eps=1e-6)
    with pytest.raises(ValueError, match="eps must not be negative, got -1"):
        packops.rms_norm(x, weight, eps=-1.0)


@gpu
def test_refused_on_cuda():
    for columns in (12, 8200):
        x, weight, _ = problem((2, columns), torch.bfloat16, "cuda")
        with pytest.raises(ValueError, match=f"must be a multiple of 8 and at most 8192, got {columns}"):
            packops.rms_norm(x, weight, eps=1e-6)
    with pytest.raises(ValueError, match="weight must be on the device of x"):
        packops.rms_norm(x, weight.cpu(), eps=1e-6)


# --------------------------------------------------------------------------------------------------------------------------------
# The norm of a sum


def sum_problem(shape=(5, 7, 64), dtype=torch.float32, device="cpu"):
    x, weight, grad = problem(shape, dtype, device)
    residual, grad_total = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return x, residual.requires_grad_(), weight, grad, grad_total


def sum_results(call, x, residual, weight, grad, grad_total, **options):
    y, total = call(x, residual, weight, **options)
    leaves = [t for t in (x, residual, weight) if t is not None]
    return [y.detach(), total.detach(), *torch.autograd.grad((y, total), leaves, (grad, grad_total))]


def in_two_steps(x, residual, weight, **options):
    total = x * 1 if residual is None else x + residual
    return packops.rms_norm(total, weight, **options), total


def check_sum(x, residual, weight, grad, grad_total, eps=1e-6, **options):
    """The results are those of two steps, the gradients nearer to the exact ones."""
    y, total, *grads = sum_results(packops.add_rms_norm, x, residual, weight, grad, grad_total, eps=eps, **options)
    want_y, want_total, *_ = sum_results(in_two_steps, x, residual, weight, grad, grad_total, eps=eps, **options)
    assert torch.equal(y, want_y)
    assert torch.equal(total, want_total)
    assert y.is_contiguous()
    leaf, exact = total.double().requires_grad_(), weight.detach().double().requires_grad_()
    made = reference.rms_norm(leaf, exact, eps=eps, **options), leaf * 1
    of_total, of_weight = torch.autograd.grad(made, (leaf, exact), (grad.double(), grad_total.double()))
    for found in grads[:-1]:
        # half a unit in the last place of each number, and what fp32 loses in a row
        bound = 0.51 * 2 * UNITS[x.dtype] * of_total.abs() + 2**-18 * (1 + of_total.abs().amax(-1, keepdim=True))
        assert found.dtype == x.dtype
        assert ((found.double() - of_total).abs() <= bound.clamp(min=1e-12)).all()
    assert ((grads[-1].double() - of_weight).abs() <= 16 * UNITS[x.dtype] * of_weight.abs().amax()).all()


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("columns", [8, 64, 1032, 2304, 4096])
def test_a_sum_against_fp64(columns, zero_centered, forked, device):
    for dtype in dtypes_of(device):
        x, residual, *others = sum_problem((3, 11, columns), dtype, device)
        check_sum(x, None if forked else residual, *others, zero_centered=zero_centered)


def test_a_sum_is_the_same_as_in_two_steps_where_it_is_rounded(device):
    """1 + 2^-9 is 1 in bf16."""
    x = torch.ones(2, 64, dtype=torch.bfloat16, device=device)
    x[:, ::2] = 3
    residual = torch.full_like(x, 2**-9)
    weight = torch.ones(64, dtype=torch.bfloat16, device=device)
    y, total = packops.add_rms_norm(x, residual, weight, eps=0.0)
    assert torch.equal(total, x)
    assert torch.equal(y, packops.rms_norm(x, weight, eps=0.0))


def test_strides_of_a_sum(device):
    """Terms and gradients whose rows lie apart in four ways, an expanded one, rows that do not begin at 16 bytes, no rows."""
    x, residual, weight, grad, grad_total = sum_problem((6, 5, 128), torch.bfloat16, device)
    left, right = x.detach()[..., :64].requires_grad_(), residual.detach()[:, :, 64:].transpose(0, 1).contiguous().transpose(0, 1)
    check_sum(
        left,
        right.requires_grad_(),
        weight[64:].detach().requires_grad_(),
        grad[:1, :1, :64].expand(6, 5, 64),
        grad_total[..., 64:],
    )
    odd = torch.randn(7, 67, device=device).to(torch.bfloat16)
    check_sum(
        odd[:, 3:].requires_grad_(),
        odd[:, 1:65].detach().requires_grad_(),
        weight[:64].detach().requires_grad_(),
        odd[:, :64],
        odd[:, 2:66],
    )
    check_sum(*sum_problem((0, 64), torch.bfloat16, device))


def test_a_sum_without_some_gradients(device):
    """Of one result alone, of some tensors alone; of leaves, each in memory of its own."""
    for forked in (False, True):
        x, residual, weight, grad, _ = sum_problem(device=device)
        residual = None if forked else residual
        for of in (0, 1):
            made, want = (call(x, residual, weight, eps=1e-5) for call in (packops.add_rms_norm, in_two_steps))
            for a, b in zip(
                *(torch.autograd.grad(m[of], (x, weight), grad, materialize_grads=True) for m in (made, want)), strict=True
            ):
                torch.testing.assert_close(a, b)
        for constant in (0, 2):
            tensors = [t if i != constant or t is None else t.detach() for i, t in enumerate((x, residual, weight))]
            leaves = [t for t in tensors if t is not None and t.requires_grad]
            made, want = (sum(map(torch.sum, call(*tensors, eps=1e-5))) for call in (packops.add_rms_norm, in_two_steps))
            for a, b in zip(torch.autograd.grad(made, leaves), torch.autograd.grad(want, leaves), strict=True):
                torch.testing.assert_close(a, b)
    x, residual, weight, *_ = sum_problem(device=device)
    sum(map(torch.sum, packops.add_rms_norm(x, residual, weight, eps=1e-5))).backward()
    assert torch.equal(x.grad, residual.grad)
    assert x.grad.data_ptr() != residual.grad.data_ptr()


def test_a_norm_that_nobody_used(device):
    """The weight has no gradient, a row whose norm is not finite spoils none, and the sum differentiates twice."""
    x, residual, weight, grad, _ = sum_problem(device=device)
    with torch.no_grad():
        x[0, 0], residual[0, 0] = 0, 0
    for other in (None, residual):
        _, total = packops.add_rms_norm(x, other, weight, eps=0.0)
        found, of_weight = torch.autograd.grad(total, (x, weight), grad, allow_unused=True)
        assert of_weight is None
        assert torch.equal(found, grad)
        (g,) = torch.autograd.grad(packops.add_rms_norm(x, other, weight, eps=1e-5)[1].square().sum(), x, create_graph=True)
        assert torch.equal(torch.autograd.grad(g.sum(), x)[0], torch.full_like(x, 2))


def test_a_sum_of_constants_is_one(device):
    x, residual, weight, grad, _ = sum_problem(device=device)
    y, total = packops.add_rms_norm(x.detach(), residual.detach(), weight, eps=1e-5)
    assert y.requires_grad
    assert not total.requires_grad
    want = torch.autograd.grad(packops.rms_norm(total, weight, eps=1e-5), weight, grad)
    assert torch.equal(torch.autograd.grad(y, weight, grad)[0], want[0])


def test_without_a_residual_the_sum_is_x(device):
    x, _, weight, *_ = sum_problem(device=device)
    _, total = packops.add_rms_norm(x, None, weight, eps=1e-6)
    assert total.data_ptr() == x.data_ptr()
    with torch.no_grad():
        assert packops.add_rms_norm(x, None, weight, eps=1e-6)[1] is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sum_under_autocast(device, dtype):
    """A sum is left alone, what the norm reads is cast."""
    x, residual, weight, grad, grad_total = sum_problem(dtype=dtype, device=device)
    weight = weight.detach().float().requires_grad_()
    for terms in ((x, residual), (x, residual.detach().float().requires_grad_()), (x, None)):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            want = in_two_steps(*terms, weight, eps=1e-6)
            calls = [packops.add_rms_norm, torch.compile(packops.add_rms_norm, backend="aot_eager")]
            for call in calls if terms[1] is None else [*calls, OPS.add_rms_norm]:
                made = call(*terms, weight, eps=1e-6)
                for a, b in zip(made, want, strict=True):
                    assert a.dtype == b.dtype
                    assert torch.equal(a, b)
                grads = [grad.to(made[0].dtype), grad_total.to(made[1].dtype)]
                for a, b in zip(
                    *(torch.autograd.grad(m, (x, weight), grads, retain_graph=True) for m in (made, want)), strict=True
                ):
                    torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-2)


def test_gradcheck_of_a_sum():
    x, residual, weight, *_ = sum_problem((3, 5), torch.float64)
    for forked in (False, True):
        for zero_centered in (False, True):
            call = functools.partial(packops.add_rms_norm, eps=1e-3, zero_centered=zero_centered)
            given = (x, None, weight) if forked else (x, residual, weight)
            assert torch.autograd.gradcheck(call, given)
            (g,) = torch.autograd.grad(call(*given)[0].square().sum(), x, create_graph=True)
            with pytest.raises(RuntimeError, match="differentiable once"):
                g.sum().backward()


def test_the_op_of_a_sum_itself(device):
    x, residual, weight, *grads = sum_problem(device=device)
    torch.library.opcheck(OPS.add_rms_norm.default, (x, residual, weight), {"eps": 1e-5, "zero_centered": True})
    torch._dynamo.reset()  # the other tests' compilations count against a limit
    compiled = torch.compile(packops.add_rms_norm, backend="aot_eager", fullgraph=True)
    for options in ({"eps": 1e-5}, {"eps": 1e-2, "zero_centered": True}):
        for terms, calls in (((x, residual), (compiled, OPS.add_rms_norm)), ((x, None), (compiled,))):
            want = sum_results(packops.add_rms_norm, *terms, weight, *grads, **options)
            for call in calls:
                for a, b in zip(sum_results(call, *terms, weight, *grads, **options), want, strict=True):
                    torch.testing.assert_close(a, b)
    made = packops.add_rms_norm(x.detach(), residual.detach(), weight.detach(), eps=1e-5)
    assert not any(t.requires_grad for t in made)


def test_transforms_of_a_sum(device):
    x, residual, weight, *_ = sum_problem((4, 64), device=device)
    for terms in ((x, residual), (x, None)):

        def loss(x, residual, weight, call=packops.add_rms_norm):
            return sum(t.square().sum() for t in call(x, residual, weight, eps=1e-5))

        found = torch.func.grad(loss)(*terms, weight)
        want = torch.func.grad(functools.partial(loss, call=in_two_steps))(*terms, weight)
        torch.testing.assert_close(found, want)
        dims = (0, None if terms[1] is None else 0, None)
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss), dims)(*terms, weight), want)


@gpu
def test_no_host_sync_and_graphs_of_a_sum():
    x, residual, weight, *grads = sum_problem((33, 256), torch.bfloat16, "cuda")
    for terms in ((x, residual), (x, None)):
        with no_host_sync():
            want = sum_results(packops.add_rms_norm, *terms, weight, *grads, eps=1e-5)
        graph, found = capture(lambda terms=terms: sum_results(packops.add_rms_norm, *terms, weight, *grads, eps=1e-5))
        graph.replay()
        for a, b in zip(found, want, strict=True):
            assert torch.equal(a, b)


@gpu
def test_wide_sums_and_many():
    check_sum(*sum_problem((9, 8192), torch.bfloat16, "cuda"))
    check_sum(*sum_problem((4099, 2048), torch.bfloat16, "cuda"))
    check_sum(*sum_problem((701, 5120), torch.float16, "cuda"))
    check_sum(*sum_problem((70001, 64), torch.float32, "cuda"))


def test_refused_sums(device):
    x, residual, weight, *_ = sum_problem(device=device)
    for given, error, message in (
        ((x, residual[:4], weight), ValueError, r"residual must have the shape of x, \(5, 7, 64\), got \(4, 7, 64\)"),
        ((x, residual.half(), weight), TypeError, "residual must have the dtype of x, Float, got Half"),
        ((x, residual, weight[:8]), ValueError, r"weight must have as many elements as a row of x, \(5, 7, 64\), got \(8,\)"),
    ):
        for detached in (False, True):
            with pytest.raises(error, match=f"packops.add_rms_norm: {message}"):
                packops.add_rms_norm(*(t.detach() if detached else t for t in given), eps=1e-6)
