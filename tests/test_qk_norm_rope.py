"""RMS norm + RoPE against its fp64 specification and against Hugging Face's modules; weight gradients to the bit."""

from __future__ import annotations

import pytest
import torch
from test_rope import LAYOUTS, close, make_heads, make_qk

import packops
from packops import reference


def check(q, k, cos, sin, *, across=False, weight_dtype=torch.float32, **options):
    dtype, dim = q.dtype, q.shape[-1]
    layout = options.get("layout")
    head_axis = 2 if layout == "bshd" or (layout is None and q.dim() == 4) else 1
    weights = [
        None if x is None else (1 + 0.3 * make_heads(((x.shape[head_axis] if across else 1) * dim,), torch.float32, x.device, seed=3)).to(weight_dtype)
        for x in (q, k)
    ]
    inputs = [q, k, *weights]
    leaves = [None if x is None else x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    doubles = [None if x is None else x.detach().double().requires_grad_() for x in leaves]
    outputs = packops.apply_qk_norm_rope(*leaves, cos, sin, **options)
    expected = reference.qk_norm_rope(*doubles, cos, sin, **options)
    grads = [None if x is None else make_heads(x.shape, dtype, x.device, seed=7) for x in (q, k)]
    for out, exp in zip(outputs, expected, strict=True):
        close(out, exp, dtype)
    torch.autograd.backward([o for o in outputs if o is not None], [g for g in grads if g is not None])
    torch.autograd.backward([e for e in expected if e is not None], [g.double() for g in grads if g is not None])
    for leaf, double in zip(leaves[:2], doubles[:2], strict=True):
        if leaf is not None:
            close(leaf.grad, double.grad, dtype)
    for leaf, double in zip(leaves[2:], doubles[2:], strict=True):
        if leaf is not None:
            scale = double.grad.abs().max().clamp(min=1)
            bound = torch.finfo(weight_dtype).eps * double.grad.abs() + 2e-6 * scale
            assert ((leaf.grad.double() - double.grad).abs() <= bound).all()
            assert leaf.grad.dtype == weight_dtype
    with torch.no_grad():
        plain = packops.apply_qk_norm_rope(*inputs, cos, sin, **options)
    op = torch.ops.packops.qk_norm_rope(*leaves, cos, sin, **options)
    for a, b, c in zip(outputs, plain, op, strict=True):
        assert (a is None and b is None and c is None) or (torch.equal(a, b) and torch.equal(a, c))
    again = [None if x is None else x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    torch.autograd.backward(
        [o for o in torch.ops.packops.qk_norm_rope(*again, cos, sin, **options) if o is not None], [g for g in grads if g is not None]
    )
    for a, b in zip(leaves, again, strict=True):
        assert a is None or torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout, across, dtype):
    q, k, name = make_qk(layout, dtype, device, tokens=37)
    cos, sin = packops.rope_table(64, 37, device=device)
    check(q, k, cos, sin, eps=1e-6, layout=name, across=across)
    check(q, None, cos, sin, eps=1e-6, layout=name, across=across, zero_centered=True, interleaved=True)


@pytest.mark.parametrize("head_dim, rotary_dim, offset", [(128, 128, 0), (256, 64, 0), (192, 64, 128), (80, 80, 0), (72, 72, 0), (96, 20, 4), (7, 6, 1), (512, 512, 0), (1056, 32, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_sizes(device, head_dim, rotary_dim, offset, dtype, interleaved):
    q, k, _ = make_qk("thd", dtype, device, head_dim=head_dim, q_heads=5, k_heads=1)
    cos, sin = packops.rope_table(rotary_dim, 13, device=device)
    check(q, k, cos, sin, eps=1e-5, rotary_dim=rotary_dim, rotary_offset=offset, interleaved=interleaved, weight_dtype=dtype)


@pytest.mark.parametrize("head_dim", [64, 1056])
def test_documents_and_padding(device, head_dim):
    q, k, _ = make_qk("thd", torch.bfloat16, device, tokens=50, head_dim=head_dim)
    cos, sin = packops.rope_table(head_dim, 50, device=device)
    cu_seqlens = torch.tensor([0, 7, 7, 30, 41], device=device, dtype=torch.int32)
    check(q, k, cos, sin, eps=0.0, cu_seqlens=cu_seqlens)
    # What lies in the padding reaches neither the tokens nor the weights' gradients.
    q[41:], k[41:] = float("nan"), float("inf")
    weight = torch.ones(head_dim, device=device, requires_grad=True)
    q.requires_grad_()
    q_out, k_out = packops.apply_qk_norm_rope(q, k, weight, weight, cos, sin, eps=0.0, cu_seqlens=cu_seqlens)
    assert q_out[41:].isnan().all() and (k_out[41:] == float("inf")).all()
    (q_out[:41].float().sum() + k_out[:41].float().sum()).backward()
    assert weight.grad.isfinite().all() and q.grad[:41].isfinite().all() and (q.grad[41:] == 0).all()
