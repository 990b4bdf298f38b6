"""RoPE against its fp64 specification: every layout, position kind and option, forward, backward and in place."""

from __future__ import annotations

import pytest
import torch

import packops
from packops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def close(actual, expected, dtype):
    """One rounding at the end: half an ulp of the result, plus fp32 noise of its two terms."""
    if expected is None:
        assert actual is None
        return
    eps = torch.finfo(dtype).eps
    bound = expected.abs() * (eps / 2 if dtype != torch.float32 else 4 * eps) + 4e-7 * expected.abs().amax().clamp(min=1)
    if dtype == torch.float16:
        bound = bound + 2**-25  # subnormals
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), f"largest excess {(error - bound).max().item():.3g}"


def make_heads(shape, dtype, device, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def check(q, k, cos, sin, **options):
    """Forward and backward, functional, in place and through the op, against the specification."""
    dtype = q.dtype
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in (q, k) if x is not None]
    q_leaf, k_leaf = leaves[0], leaves[1] if k is not None else None
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    expected = reference.rope(doubles[0], doubles[1] if k is not None else None, cos, sin, **options)
    outputs = packops.apply_rope(q_leaf, k_leaf, cos, sin, **options)
    for out, exp, source in zip(outputs, expected, (q, k), strict=True):
        close(out, exp, dtype)
        if out is not None:
            assert out.dtype == dtype and out.shape == source.shape
    grads = [make_heads(x.shape, dtype, x.device, seed=7) for x in leaves]
    torch.autograd.backward([o for o in outputs if o is not None], grads)
    torch.autograd.backward([e for e in expected if e is not None], [g.double() for g in grads])
    for leaf, double in zip(leaves, doubles, strict=True):
        close(leaf.grad, double.grad, dtype)

    with torch.no_grad():
        plain = packops.apply_rope(q, k, cos, sin, **options)
        op = torch.ops.packops.rope(q, k, cos, sin, **options)
        q_copy, k_copy = q.clone(), None if k is None else k.clone()
        inplace = packops.apply_rope(q_copy, k_copy, cos, sin, inplace=True, **options)
        assert inplace[0] is q_copy and inplace[1] is k_copy
    for a, b, c, d in zip(outputs, plain, op, inplace, strict=True):
        if a is not None:
            assert torch.equal(a, b) and torch.equal(a, c) and torch.equal(a, d)


LAYOUTS = ["thd", "bshd", "bhsd", "bhsd_view", "fused_qkv"]


def make_qk(layout, dtype, device, *, batch=2, tokens=13, q_heads=5, k_heads=2, head_dim=64):
    if layout == "thd":
        return make_heads((tokens, q_heads, head_dim), dtype, device), make_heads((tokens, k_heads, head_dim), dtype, device), None
    if layout == "bshd":
        shape = (batch, tokens)
        return make_heads((*shape, q_heads, head_dim), dtype, device), make_heads((*shape, k_heads, head_dim), dtype, device), None
    if layout == "bhsd":
        q, k = (make_heads((batch, h, tokens, head_dim), dtype, device) for h in (q_heads, k_heads))
        return q, k, "bhsd"
    if layout == "bhsd_view":  # what Hugging Face attention holds
        q, k = (make_heads((batch, tokens, h, head_dim), dtype, device).transpose(1, 2) for h in (q_heads, k_heads))
        return q, k, "bhsd"
    qkv = make_heads((batch, tokens, q_heads + 2 * k_heads, head_dim), dtype, device)
    return qkv[:, :, :q_heads], qkv[:, :, q_heads : q_heads + k_heads], "bshd"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout, interleaved, dtype):
    q, k, name = make_qk(layout, dtype, device)
    cos, sin = packops.rope_table(64, 13, device=device)
    check(q, k, cos, sin, layout=name, interleaved=interleaved)
    check(q, None, cos, sin, layout=name, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim, rotary_dim, offset", [(64, 32, 0), (192, 64, 128), (80, 80, 0), (96, 20, 4), (72, 36, 36), (7, 6, 1), (2, 2, 0), (256, 64, 0), (512, 512, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_partial_rotary(device, dtype, head_dim, rotary_dim, offset, interleaved):
    q, k, _ = make_qk("thd", dtype, device, head_dim=head_dim, q_heads=3, k_heads=1)
    cos, sin = packops.rope_table(rotary_dim, 13, device=device)
    options = dict(rotary_dim=rotary_dim, rotary_offset=offset, interleaved=interleaved)
    check(q, k, cos, sin, **options)
    out, _ = packops.apply_rope(q, k, cos, sin, **options)
    passing = [i for i in range(head_dim) if not offset <= i < offset + rotary_dim]
    assert torch.equal(out[..., passing], q[..., passing])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", ["thd", "bshd", "bhsd_view"])
def test_positions(device, layout, index_dtype):
    q, k, name = make_qk(layout, torch.float32, device)
    batch, tokens = (1, 13) if layout == "thd" else (2, 13)
    cos, sin = packops.rope_table(64, 50, device=device)
    ids = torch.randint(0, 50, (batch, tokens), generator=torch.Generator().manual_seed(1)).to(device, index_dtype)
    for position_ids in [ids, ids.flatten(), ids[:1], ids.t().contiguous().t()]:
        if position_ids.numel() == batch * tokens or layout != "thd":
            check(q, k, cos, sin, layout=name, position_ids=position_ids)
    for bounds in [[0, 13], [0, 5, 5, 9, 13], [0, 3, 11], [0], [0, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]:
        cu_seqlens = torch.tensor(bounds, device=device, dtype=index_dtype)
        check(q, k, cos, sin, layout=name, cu_seqlens=cu_seqlens)
        check(q, k, cos, sin, layout=name, cu_seqlens=cu_seqlens, position_ids=ids)
