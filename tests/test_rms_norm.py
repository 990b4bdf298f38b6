"""RMS norm of rows against fp64, with the digits that small weights and large rows have; fixed bits; what is refused."""

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
