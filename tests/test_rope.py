"""RoPE against its fp64 specification: every layout, position kind and option, forward, backward and in place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import packops
from cuda_streams import capture, no_host_sync
from packops import reference
from packops.ops import rope as _rope

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
            assert out.dtype == dtype
            assert out.shape == source.shape
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
        assert inplace[0] is q_copy
        assert inplace[1] is k_copy
    for a, b, c, d in zip(outputs, plain, op, inplace, strict=True):
        if a is not None:
            assert torch.equal(a, b)
            assert torch.equal(a, c)
            assert torch.equal(a, d)


LAYOUTS = ["thd", "bshd", "bhsd", "bhsd_view", "fused_qkv"]


def make_qk(layout, dtype, device, *, batch=2, tokens=13, q_heads=5, k_heads=2, head_dim=64):
    if layout == "thd":
        return (
            make_heads((tokens, q_heads, head_dim), dtype, device),
            make_heads((tokens, k_heads, head_dim), dtype, device),
            None,
        )
    if layout == "bshd":
        shape = (batch, tokens)
        return (
            make_heads((*shape, q_heads, head_dim), dtype, device),
            make_heads((*shape, k_heads, head_dim), dtype, device),
            None,
        )
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


# MLA's tail, vectors of 16, 8, 4 and 2 bytes, odd halves, an odd number of vectors that pass through, large heads.
SIZES = [
    (64, 32, 0),
    (192, 64, 128),
    (80, 80, 0),
    (96, 20, 4),
    (72, 36, 36),
    (7, 6, 1),
    (2, 2, 0),
    (256, 64, 0),
    (512, 512, 0),
    (88, 64, 8),
    (96, 64, 4),
]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim, rotary_dim, offset", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_partial_rotary(device, dtype, head_dim, rotary_dim, offset, interleaved):
    q, k, _ = make_qk("thd", dtype, device, head_dim=head_dim, q_heads=3, k_heads=1)
    cos, sin = packops.rope_table(rotary_dim, 13, device=device)
    options = {"rotary_dim": rotary_dim, "rotary_offset": offset, "interleaved": interleaved}
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


# ---- Tables.


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_table_kinds(device, table_dtype, interleaved):
    """Half and full width, every dtype, rows that are not aligned, per token in every shape."""
    q, k, _ = make_qk("bshd", torch.bfloat16, device)
    cos, sin = (t.to(table_dtype) for t in packops.rope_table(64, 40, device=device))
    check(q, k, cos, sin, interleaved=interleaved)
    full = [t.repeat_interleave(2, -1) if interleaved else torch.cat([t, t], -1) for t in (cos, sin)]
    check(q, k, *full, interleaved=interleaved, rotary_dim=64)
    odd_rows = [torch.cat([t, t[:, :3]], -1)[:, 1:-2] for t in (cos, sin)]
    assert odd_rows[0].stride(0) == 35
    check(q, k, *odd_rows, interleaved=interleaved)
    ids = torch.randint(0, 40, (2, 13), device=device)
    for rows in (ids, ids[:1], ids.flatten()):
        check(q, k, cos[rows], sin[rows], per_token_table=True, interleaved=interleaved)
    gathered = full[0][ids], full[1][ids]
    check(q, k, *gathered, per_token_table=True, rotary_dim=64, interleaved=interleaved)
    cu_seqlens = torch.tensor([0, 4, 21], device=device)
    check(q, k, *gathered, per_token_table=True, rotary_dim=64, interleaved=interleaved, cu_seqlens=cu_seqlens)


def test_width_of_the_table_and_of_the_rotation(device):
    """Half width unless that is more than a head; rotary_dim says otherwise."""
    q = make_heads((5, 2, 64), torch.float32, device)
    cos, sin = packops.rope_table(32, 5, device=device)
    full = [torch.cat([t, t], -1) for t in (cos, sin)]
    partial = packops.apply_rope(q, None, cos, sin)[0]
    assert torch.equal(partial[..., 32:], q[..., 32:])
    assert not torch.equal(partial[1:, :, :32], q[1:, :, :32])
    assert torch.equal(packops.apply_rope(q, None, *full, rotary_dim=32)[0], partial)
    pairs = [t.repeat_interleave(2, -1) for t in (cos, sin)]
    packops.checks(True)  # the table can be read; rows of position 0 alone say nothing
    try:
        for wide in (full, pairs):
            for table in (wide, [t[[0, 0, 3]] for t in wide], [t.bfloat16() for t in wide]):
                heads = q[: len(table[0])]
                for options in ({}, {"per_token_table": True}):
                    with pytest.raises(ValueError, match="pass rotary_dim=32"):
                        packops.apply_rope(heads, None, *table, **options)
                    with pytest.raises(ValueError, match="pass rotary_dim=32"):
                        packops.apply_qk_norm_rope(heads, None, q.new_ones(64), None, *table, eps=1e-6, **options)
        assert torch.equal(packops.apply_rope(q[:1], None, *(t[:1] for t in full))[0], q[:1])
    finally:
        packops.checks(False)
    wide = packops.rope_table(64, 5, device=device)
    duplicated = [torch.cat([t, t], -1) for t in wide]
    assert torch.equal(packops.apply_rope(q, None, *duplicated)[0], packops.apply_rope(q, None, *wide)[0])


@pytest.mark.parametrize("mrope", [False, True])
@pytest.mark.parametrize("per_token_table", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fused_norm", [False, True])
@pytest.mark.parametrize("rotary_dim", [64, 24])
def test_full_width_tables_belong_to_features(device, mrope, per_token_table, interleaved, fused_norm, rotary_dim):
    """Column j belongs to feature j (Cohere, GLM and ERNIE repeat neighbours): the bits of the half table, gradients too."""
    if mrope and per_token_table:
        return
    q, k, _ = make_qk("bshd", torch.float32, device)
    cos, sin = packops.rope_table(rotary_dim, 40, device=device)
    ids = torch.randint(0, 40, (3, 2, 13) if mrope else (2, 13), device=device)
    options = {"interleaved": interleaved, "rotary_dim": rotary_dim, "rotary_offset": 64 - rotary_dim}
    if per_token_table:
        cos, sin, options["per_token_table"] = cos[ids], sin[ids], True
    else:
        options["position_ids"] = ids
    if mrope:
        options |= {"mrope_section": (rotary_dim // 2 - 8, 5, 3), "mrope_interleaved": rotary_dim == 64}
    results = []
    for table in ((cos, sin), [t.repeat_interleave(2, -1) if interleaved else torch.cat([t, t], -1) for t in (cos, sin)]):
        x, y = q.detach().clone().requires_grad_(), k.detach().clone().requires_grad_()
        if fused_norm:
            w = torch.linspace(0.5, 2, 64, device=device)
            out = packops.apply_qk_norm_rope(x, y, w, w + 1, *table, eps=1e-6, **options)
        else:
            out = packops.apply_rope(x, y, *table, **options)
        sum(o.square().mul(0.1).cos().sum() for o in out).backward()
        results.append((*out, x.grad, y.grad))
    for half, full in zip(*results, strict=True):
        assert torch.equal(half, full)


# (columns of a half table, how it is laid out, features of a head, options): what would be read as another table.
MISREAD_TABLES = {
    "a half table wider than half a head": (8, "half", 15, {}),
    "a half table as wide as a head": (8, "half", 8, {}),
    "said to be full": (8, "half", 16, {"rotary_dim": 8}),
    "neighbours for halves": (8, "neighbours", 16, {"rotary_dim": 16}),
    "halves for neighbours": (8, "halves", 16, {"interleaved": True}),
    "halves of partial rotary": (8, "halves", 32, {}),
    "neighbours of partial rotary": (8, "neighbours", 40, {"interleaved": True}),
}


@pytest.mark.parametrize("case", MISREAD_TABLES)
@pytest.mark.parametrize("fused_norm", [False, True])
@pytest.mark.parametrize("per_token_table", [False, True])
def test_tables_that_would_be_misread_are_refused(device, request, case, fused_norm, per_token_table):
    columns, layout, head_dim, options = MISREAD_TABLES[case]
    table = packops.rope_table(2 * columns, 7, device=device)
    widened = {"half": lambda t: t, "halves": lambda t: torch.cat([t, t], -1), "neighbours": lambda t: t.repeat_interleave(2, -1)}
    cos, sin = (widened[layout](t) for t in table)
    q = torch.randn(7, 2, head_dim, device=device)
    packops.checks(True)
    request.addfinalizer(lambda: packops.checks(False))

    def call():
        if fused_norm:
            weight = torch.ones(head_dim, device=device)
            packops.apply_qk_norm_rope(
                q, None, weight, None, cos, sin, eps=1e-6, layout="thd", per_token_table=per_token_table, **options
            )
        else:
            packops.apply_rope(q, None, cos, sin, layout="thd", per_token_table=per_token_table, **options)

    with pytest.raises(ValueError, match="every number twice"):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("case", MISREAD_TABLES)
@pytest.mark.parametrize("fused_norm", [False, True])
@pytest.mark.parametrize("per_token_table", [False, True])
def test_misread_tables_are_nan_on_cuda(case, fused_norm, per_token_table):
    """Without packops.checks nobody reads the table but the kernel."""
    columns, layout, head_dim, options = MISREAD_TABLES[case]
    table = packops.rope_table(2 * columns, 7, device="cuda")
    widened = {"half": lambda t: t, "halves": lambda t: torch.cat([t, t], -1), "neighbours": lambda t: t.repeat_interleave(2, -1)}
    cos, sin = (widened[layout](t) for t in table)
    q = torch.randn(7, 2, head_dim, device="cuda", requires_grad=True)
    options = {"layout": "thd", "per_token_table": per_token_table, **options}
    if fused_norm:
        out, _ = packops.apply_qk_norm_rope(q, None, torch.ones(head_dim, device="cuda"), None, cos, sin, eps=1e-6, **options)
    else:
        out, _ = packops.apply_rope(q, None, cos, sin, **options)
    assert out[0].isnan().any(-1).all()  # the first token of a row tells
    out.nan_to_num().sum().backward()
    assert q.grad.isfinite().all()
    if 2 * columns <= head_dim:
        assert packops.apply_rope(q.detach(), None, *table, layout="thd", per_token_table=per_token_table)[0].isfinite().all()


def test_equals_cohere(device):
    cohere = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    q = make_heads((2, 3, 10, 64), torch.float32, device)
    cos, sin = (t.repeat_interleave(2, -1)[None] for t in packops.rope_table(64, 10, device=device))
    theirs = cohere.apply_rotary_pos_emb(q, q, cos, sin)[0]
    for options in ({}, {"rotary_dim": 64}):
        ours = packops.apply_rope(q, None, cos, sin, layout="bhsd", interleaved=True, per_token_table=True, **options)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_transformers(device, dtype):
    """Hugging Face's own function on the strides its attention has, to the rounding of its three steps."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k, _ = make_qk("bhsd_view", dtype, device, batch=2, tokens=33)
    cos, sin = packops.rope_table(64, 100, device=device)
    ids = torch.randint(0, 100, (2, 33), device=device)
    cos, sin = (torch.cat([t, t], -1)[ids].to(dtype) for t in (cos, sin))
    ours = packops.apply_rope(q, k, cos, sin, layout="bhsd", per_token_table=True)
    theirs = llama.apply_rotary_pos_emb(q, k, cos, sin)
    for a, b in zip(ours, theirs, strict=True):
        assert a.stride() == b.stride() or a.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=4 * torch.finfo(dtype).eps * b.abs().max().item())
    exact = llama.apply_rotary_pos_emb(q.double(), k.double(), cos.double(), sin.double())
    for a, b in zip(ours, exact, strict=True):
        close(a, b, dtype)


@pytest.mark.parametrize("mrope_interleaved", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("section", [(8, 12, 12), (5, 24, 3), (32, 0, 0), (0, 1, 31), (12, 10, 10)])
def test_mrope(device, section, interleaved, mrope_interleaved):
    options = {"mrope_section": section, "mrope_interleaved": mrope_interleaved, "interleaved": interleaved}
    cos, sin = packops.rope_table(64, 50, device=device)
    for layout in ("thd", "bhsd_view"):
        q, k, name = make_qk(layout, torch.bfloat16, device)
        batch = 1 if layout == "thd" else 2
        ids = torch.randint(0, 50, (3, batch, 13), device=device)
        for position_ids in [ids, ids.flatten(1).int(), ids[:, :1], ids.permute(1, 2, 0).contiguous().permute(2, 0, 1)]:
            if position_ids.numel() == ids.numel() or layout != "thd":
                check(q, k, cos, sin, layout=name, position_ids=position_ids, **options)
        cu_seqlens = torch.tensor([0, 4, 9], device=device)
        check(q, k, cos, sin, layout=name, position_ids=ids, cu_seqlens=cu_seqlens, **options)


@pytest.mark.parametrize("model, section", [("qwen2_vl", (8, 12, 12)), ("qwen3_vl", (12, 10, 10))])
def test_mrope_equals_transformers(device, model, section):
    """The tables of Qwen's vision models, made by their own recomposition of frequencies."""
    transformers = pytest.importorskip("transformers")
    if model == "qwen2_vl":
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding as Embedding

        config = transformers.Qwen2VLConfig().get_text_config()
    else:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding as Embedding

        config = transformers.Qwen3VLConfig().get_text_config()
    config.head_dim = 64
    config.hidden_size, config.num_attention_heads = 256, 4
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}
    q, k, _ = make_qk("bhsd_view", torch.float32, device)
    ids = torch.randint(0, 50, (3, 2, 13), device=device)
    embedding = Embedding(config).to(device)
    cos, sin = embedding(q, ids)
    expected = [x.double() * cos[:, None].double() + rotate_half(x.double()) * sin[:, None].double() for x in (q, k)]
    table = packops.rope_table(64, 50, device=device)
    actual = packops.apply_rope(
        q, k, *table, layout="bhsd", position_ids=ids, mrope_section=section, mrope_interleaved=model == "qwen3_vl"
    )
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() < 1e-4  # their fp32 angles


def rotate_half(x):
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


# ---- Identities.


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_keeps_norms_and_relative_positions(device, interleaved):
    q, k, _ = make_qk("thd", torch.float32, device, q_heads=2, k_heads=2)
    cos, sin = packops.rope_table(64, 200_000, device=device)
    ids = torch.randint(0, 1000, (13,), device=device)
    near = packops.apply_rope(q, k, cos, sin, position_ids=ids, interleaved=interleaved)
    far = packops.apply_rope(q, k, cos, sin, position_ids=ids + 131072, interleaved=interleaved)
    assert not torch.equal(near[0], far[0])
    for x, y in zip((q, k), far, strict=True):
        torch.testing.assert_close(x.norm(dim=-1), y.norm(dim=-1), rtol=1e-6, atol=0)
    scores = [torch.einsum("thd,shd->hts", *(x.double() for x in pair)) for pair in (near, far)]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=2e-5)


def test_a_document_does_not_know_where_it_lies(device):
    q, k, _ = make_qk("thd", torch.bfloat16, device, tokens=30)
    cos, sin = packops.rope_table(64, 30, device=device)
    packed = packops.apply_rope(q, k, cos, sin, cu_seqlens=torch.tensor([0, 11, 24, 30], device=device))
    for begin, end in [(0, 11), (11, 24), (24, 30)]:
        alone = packops.apply_rope(q[begin:end], k[begin:end], cos, sin)
        assert all(torch.equal(p[begin:end], a) for p, a in zip(packed, alone, strict=True))


@pytest.mark.parametrize("interleaved", [False, True])
def test_backward_is_the_transpose_also_with_attention_factor(device, interleaved):
    """<R x, g> = <x, R' g>, where cos² + sin² is 1.7²."""
    q, k, _ = make_qk("thd", torch.float32, device)
    cos, sin = (1.7 * t for t in packops.rope_table(64, 13, device=device))
    q.requires_grad_()
    out, _ = packops.apply_rope(q, k, cos, sin, interleaved=interleaved)
    grad = make_heads(out.shape, torch.float32, device, seed=5)
    out.backward(grad)
    left, right = (out.double() * grad.double()).sum(), (q.double() * q.grad.double()).sum()
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(out.norm(), 1.7 * q.norm(), rtol=1e-5, atol=0)


# ---- Bits that must pass through.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_what_does_not_turn_keeps_its_bits(device, dtype, inplace):
    """NaNs with payloads and infinities, in features outside the rotary part and in tokens outside the documents."""
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(integer)
    bits = torch.randint(info.min, info.max, (20, 3, 96), device=device).to(integer)
    q = bits.clone().view(dtype)
    cos, sin = packops.rope_table(32, 20, device=device)
    cu_seqlens = torch.tensor([0, 6, 13], device=device, dtype=torch.int32)
    out, _ = packops.apply_rope(q, None, cos, sin, cu_seqlens=cu_seqlens, rotary_offset=40, inplace=inplace)
    out = out.view(integer)
    assert torch.equal(out[13:], bits[13:])
    assert torch.equal(out[..., :40], bits[..., :40])
    assert torch.equal(out[..., 72:], bits[..., 72:])
    assert not torch.equal(out[1:6, :, 40:72], bits[1:6, :, 40:72])


# ---- Positions and documents that cannot be.

BAD_POSITIONS = [-1, 9, 2**31 - 1, -(2**31), 2**32 + 1, -(2**63), 2**63 - 1]


@pytest.mark.parametrize("bad", BAD_POSITIONS)
def test_position_outside_the_table_on_the_cpu(bad):
    q = make_heads((4, 2, 16), torch.float32, "cpu")
    kept, ids = q.clone(), torch.tensor([0, 8, bad, 3])
    cos, sin = packops.rope_table(16, 9)
    with pytest.raises(IndexError, match=rf"packops.rope: position {bad} of token 2 is outside the table of 9 positions"):
        packops.apply_rope(q, None, cos, sin, position_ids=ids, inplace=True)
    assert torch.equal(q, kept)
    with pytest.raises(IndexError, match="position 9 of token 9"):
        packops.apply_rope(make_heads((10, 2, 16), torch.float32, "cpu"), None, cos, sin)
    with pytest.raises(IndexError, match="position 9 of token 11"):
        packops.apply_rope(make_heads((12, 2, 16), torch.float32, "cpu"), None, cos, sin, cu_seqlens=torch.tensor([0, 2, 12]))
    axes = torch.zeros(3, 4, dtype=torch.int64)
    axes[1, 3] = bad
    with pytest.raises(IndexError, match=f"position {bad} of token 3"):
        packops.apply_rope(q, None, cos, sin, position_ids=axes, mrope_section=[3, 3, 2])
    # Padding may hold anything.
    packops.apply_rope(q, None, cos, sin, position_ids=ids, cu_seqlens=torch.tensor([0, 2]))


@pytest.mark.gpu
@pytest.mark.parametrize("bad", BAD_POSITIONS)
@pytest.mark.parametrize("mrope", [False, True])
def test_position_outside_the_table_on_cuda(bad, mrope):
    device = torch.device("cuda")
    q = make_heads((4, 2, 24), torch.bfloat16, device)
    cos, sin = packops.rope_table(16, 9, device=device)
    ids = torch.tensor([0, 8, bad, 3], device=device)
    options = (
        {"position_ids": torch.stack([ids * 0, ids, ids * 0]), "mrope_section": [3, 3, 2]} if mrope else {"position_ids": ids}
    )
    leaf = q.clone().requires_grad_()
    out, _ = packops.apply_rope(leaf, None, cos, sin, **options)
    out.backward(torch.ones_like(out))
    assert out[2, :, :16].isnan().all()
    assert torch.equal(out[2, :, 16:], q[2, :, 16:])
    assert (leaf.grad[2, :, :16] == 0).all()
    assert (leaf.grad[2, :, 16:] == 1).all()
    good = [0, 1, 3]
    assert out[good].isfinite().all()
    assert leaf.grad[good].isfinite().all()
    packops.checks(True)
    try:
        with pytest.raises(IndexError, match=f"= {bad} is outside the table of 9 positions"):
            packops.apply_rope(q, None, cos, sin, **options)
    finally:
        packops.checks(False)


def test_the_checks_of_positions():
    """What packops.checks adds on CUDA, on tensors of any device."""
    q, ids = torch.zeros(2, 4, 3, 16), torch.tensor([[0, 1, 2, 3], [0, 1, 9, 3]])
    cos, _ = packops.rope_table(16, 9)
    check = packops._checks.raise_bad_positions
    for position_ids in (ids, ids[1:], torch.stack([ids * 0, ids, ids]), ids.flatten()):
        with pytest.raises(IndexError, match=r"packops.rope: position_ids\[[\d, ]+\] = 9 is outside the table of 9 positions"):
            check("rope", q, cos, position_ids, None, None, False)
    check("rope", q, cos, ids, torch.tensor([0, 6]), None, False)  # in the padding
    with pytest.raises(IndexError, match="4 tokens has positions outside the table of 3"):
        check("rope", q.transpose(1, 2), cos[:3], None, None, "bhsd", False)
    with pytest.raises(IndexError, match="5 tokens has positions outside the table of 4"):
        check("rope", q, cos[:4], None, torch.tensor([0, 3, 8]), None, False)
    check("rope", q, cos[:4], None, torch.tensor([0, 4, 8]), None, False)
    check("rope", q, cos[:1], None, torch.tensor([0]), None, False)
    check("rope", q, cos[:1], None, None, None, True)


@pytest.mark.parametrize(
    "bounds, message", [([1, 5], "start at 0"), ([0, 5, 3], "decrease"), ([0, 3, 11], "10"), ([-2, 4], "start at 0")]
)
def test_malformed_cu_seqlens(device, bounds, message):
    q = make_heads((10, 2, 16), torch.float32, device)
    cos, sin = packops.rope_table(16, 10, device=device)
    cu_seqlens = torch.tensor(bounds, device=device)
    packops.checks(True)
    try:
        with pytest.raises(ValueError, match=f"packops.rope: cu_seqlens .*{message}"):
            packops.apply_rope(q, None, cos, sin, cu_seqlens=cu_seqlens)
    finally:
        packops.checks(False)


@pytest.mark.gpu
def test_malformed_cu_seqlens_are_memory_safe_on_cuda():
    device = torch.device("cuda")
    q = make_heads((300, 2, 64), torch.bfloat16, device)
    cos, sin = packops.rope_table(64, 300, device=device)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        count = int(torch.randint(1, 200, (1,), generator=generator))
        cu_seqlens = torch.randint(-(2**62), 2**62, (count,), generator=generator) >> int(
            torch.randint(0, 62, (1,), generator=generator)
        )
        packops.apply_rope(q, None, cos, sin, cu_seqlens=cu_seqlens.to(device))
        packops.apply_rope(q, None, cos, sin, cu_seqlens=cu_seqlens.int().to(device))
    torch.cuda.synchronize()
    assert packops.apply_rope(q, None, cos, sin)[0].isfinite().all()


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 100, 1025, 3000])
def test_many_documents(device, count):
    """Every depth of the search for a token's document, empty documents included."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(0, 5, (count,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int().to(device)
    tokens = int(lengths.sum()) + 3
    q = make_heads((tokens, 1, 16), torch.float32, device)
    cos, sin = packops.rope_table(16, 5, device=device)
    ours, _ = packops.apply_rope(q, None, cos, sin, cu_seqlens=cu_seqlens)
    close(ours, reference.rope(q, None, cos, sin, cu_seqlens=cu_seqlens)[0], torch.float32)


# ---- Memory: strides in, strides out.


def test_outputs_are_dense_in_the_memory_order_of_their_inputs(device):
    cos, sin = packops.rope_table(16, 8, device=device)
    base = torch.randn(3, 8, 5, 16, device=device)
    cases = {
        "contiguous": (base, "bshd", base.stride()),
        "transposed": (base.transpose(1, 2), "bhsd", base.transpose(1, 2).stride()),
        "slice": (torch.randn(3, 8, 9, 16, device=device)[:, :, 2:7], "bshd", base.stride()),
        "expanded": (base[:1].expand(3, 8, 5, 16), "bshd", None),
        "batch inside": (torch.randn(8, 3, 5, 16, device=device).transpose(0, 1), "bshd", (80, 240, 16, 1)),
        "overlapping heads": (torch.randn(400, device=device).as_strided((3, 8, 5, 16), (100, 20, 1, 1)), "bshd", None),
    }
    for name, (q, layout, stride) in cases.items():
        out, _ = packops.apply_rope(q, None, cos, sin, layout=layout)
        assert stride is None or out.stride() == stride, name
        assert out.stride(-1) == 1
        close(out, reference.rope(q, None, cos, sin, layout=layout)[0], torch.float32)


@pytest.mark.parametrize("shift", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_address(device, dtype, shift):
    """Rows that start at any element: the kernel takes narrower vectors and gives the same bits."""
    q = make_heads((7, 3, 64), dtype, device)
    storage = torch.zeros(7 * 3 * 64 + 16, dtype=dtype, device=device)
    shifted = storage[shift : shift + q.numel()].view_as(q).copy_(q)
    cos, sin = packops.rope_table(48, 7, device=device)
    expected = packops.apply_rope(q, None, cos, sin, rotary_offset=8)[0]
    assert torch.equal(packops.apply_rope(shifted, None, cos, sin, rotary_offset=8)[0], expected)
    packops.apply_rope(shifted, None, cos, sin, rotary_offset=8, inplace=True)
    assert torch.equal(shifted, expected)
    assert (storage[:shift] == 0).all()
    assert (storage[shift + q.numel() :] == 0).all()


SHAPES_AND_STRIDES = {
    "half": st.integers(1, 20),
    "extra": st.integers(0, 9),
    "heads": st.tuples(st.integers(1, 5), st.integers(1, 3)),
    "shape": st.tuples(st.integers(1, 3), st.integers(1, 7)),
    "interleaved": st.booleans(),
    "dtype": st.sampled_from(DTYPES),
}


@settings(max_examples=60)
@given(data=st.data(), **SHAPES_AND_STRIDES)
def test_any_shape_and_stride(data, **case):
    """Every dimension cut out of a larger tensor, in any memory order. CUDA's turn is in test_any_shape_and_stride_on_cuda."""
    run_shape_and_stride(data.draw, "cpu", **case)


@pytest.mark.gpu
@settings(max_examples=60)
@given(data=st.data(), **SHAPES_AND_STRIDES)
def test_any_shape_and_stride_on_cuda(data, **case):
    run_shape_and_stride(data.draw, "cuda", **case)


def run_shape_and_stride(draw, device, half, extra, heads, shape, interleaved, dtype):
    head_dim, (batch, tokens) = 2 * half + extra, shape
    offset = draw(st.integers(0, extra))
    order = draw(st.permutations([0, 1, 2]))
    layout = draw(st.sampled_from(["bshd", "bhsd"]))

    def make(count, seed):
        sizes = (batch, tokens, count) if layout == "bshd" else (batch, count, tokens)
        margins = [draw(st.integers(0, 2)) for _ in range(4)]
        step = draw(st.integers(1, 2))
        storage = make_heads([sizes[i] * step + margins[i] for i in order] + [head_dim + margins[3]], dtype, device, seed=seed)
        view = storage.permute(*[order.index(i) for i in range(3)], 3)
        return view[tuple(slice(m, m + n * step, step) for m, n in zip(margins, sizes, strict=False))][..., margins[3] :]

    q, k = make(heads[0], 1), make(heads[1], 2)
    cos, sin = packops.rope_table(2 * half, tokens, device=device)
    check(q, k, cos, sin, layout=layout, interleaved=interleaved, rotary_offset=offset, rotary_dim=2 * half)


@pytest.mark.parametrize("shape", [(0, 2, 16), (0, 3, 2, 16), (3, 0, 2, 16), (3, 0, 16), (2, 3, 0, 16)])
def test_empty(device, shape):
    q = torch.empty(shape, device=device, requires_grad=True)
    cos, sin = packops.rope_table(16, 4, device=device)
    out, k = packops.apply_rope(q, q.detach(), cos, sin)
    assert out.shape == k.shape == shape
    out.sum().backward()
    assert q.grad.shape == shape
    if len(shape) == 3:
        packops.apply_rope(q, None, cos, sin, cu_seqlens=torch.zeros(1, dtype=torch.int32, device=device))


# ---- Autograd.


@pytest.mark.parametrize("layout", ["thd", "bhsd_view"])
def test_gradients_of_every_stride(device, layout):
    q, k, name = make_qk(layout, torch.float32, device)
    cos, sin = packops.rope_table(64, 13, device=device)
    dense = make_heads(q.shape, torch.float32, device, seed=3)
    variants = {
        "expanded": torch.ones((), device=device).expand(q.shape),
        "expanded heads": dense.select(1, 0).unsqueeze(1).expand(q.shape),
        "strided features": torch.stack([dense, dense], -1)[..., 0],
        "transposed": dense.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": torch.cat([dense, dense], 1)[:, q.shape[1] :],
    }
    for grad in variants.values():
        for call in (packops.apply_rope, torch.ops.packops.rope):
            leaf, double = q.detach().clone().requires_grad_(), q.detach().double().requires_grad_()
            kept = grad.clone()
            call(leaf, k, cos, sin, layout=name)[0].backward(grad)
            reference.rope(double, k, cos, sin, layout=name)[0].backward(grad.double())
            close(leaf.grad, double.grad, torch.float32)
            assert torch.equal(grad, kept)


@pytest.mark.parametrize("call", [packops.apply_rope, torch.ops.packops.rope])
def test_gradient_reaches_only_what_needs_it(device, call):
    q, k, _ = make_qk("thd", torch.float32, device)
    cos, sin = packops.rope_table(64, 13, device=device)
    k.requires_grad_()
    q_out, k_out = call(q, k, cos, sin)
    assert not q_out.requires_grad
    assert k_out.requires_grad
    k_out.sum().backward()
    assert k.grad is not None
    assert q.grad is None
    q.requires_grad_()
    q_out, k_out = call(q, k, cos, sin)
    k.grad = None
    q_out.sum().backward()  # no gradient for k_out at all
    assert q.grad is not None
    assert k.grad is None
    with pytest.raises(ValueError, match="cos needs a gradient"):
        call(q, k, cos.requires_grad_(), sin)


def test_gradcheck_any_order():
    q = torch.randn(5, 2, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(5, 1, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = packops.rope_table(4, 5, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 2, 4])

    def function(q, k):
        return packops.apply_rope(q, k, 1.3 * cos, 1.3 * sin, cu_seqlens=cu_seqlens, rotary_offset=1, interleaved=True)

    assert torch.autograd.gradcheck(function, (q, k), fast_mode=False)
    assert torch.autograd.gradgradcheck(function, (q, k))
    assert torch.autograd.gradcheck(lambda q, k: torch.ops.packops.rope(q, k, cos, sin), (q, k))


def test_fp64_on_the_cpu_is_fp64():
    q, k, _ = make_qk("thd", torch.float64, "cpu")
    cos, sin = packops.rope_table(64, 13, dtype=torch.float64)
    out = packops.apply_rope(q, k, cos, sin, interleaved=True)
    for a, b in zip(out, reference.rope(q, k, cos, sin, interleaved=True), strict=True):
        assert (a - b).abs().max() < 1e-14


def test_options_that_are_not_passed_on_have_the_defaults_of_the_ops():
    for op in (torch.ops.packops._rope, torch.ops.packops._rope_):
        names = [argument.name for argument in op.default._schema.arguments]
        options = op.default._schema.arguments[names.index("layout") : names.index("transposed")]
        assert _rope.given(tuple(argument.default_value for argument in options)) == ()
    assert _rope.given((None, None, 4, False, None, False, False)) == (None, None, 4, False, None, False, False)


def test_in_place_under_autograd(device):
    """Views and non-leaves get the gradients of the functional form; nobody's saved tensor is changed unseen."""
    q, k, _ = make_qk("thd", torch.float32, device)
    cos, sin = packops.rope_table(64, 13, device=device)
    options = {"cu_seqlens": torch.tensor([0, 4, 11], device=device), "rotary_offset": 0}
    grads = [make_heads(x.shape, torch.float32, device, seed=9) for x in (q, k)]

    def gradients(function):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        torch.autograd.backward(function(*leaves), grads)
        return [x.grad for x in leaves]

    expected = gradients(lambda q, k: packops.apply_rope(q * 2, k * 2, cos, sin, **options))

    def non_leaves(q, k):
        a, b = q * 2, k * 2
        out = packops.apply_rope(a, b, cos, sin, inplace=True, **options)
        assert out[0] is a
        assert out[1] is b
        return out

    def views(q, k):
        fused = torch.cat([q, k], 1) * 2
        a, b = fused[:, : q.shape[1]], fused[:, q.shape[1] :]
        packops.apply_rope(a, b, cos, sin, inplace=True, **options)
        return fused[:, : q.shape[1]], fused[:, q.shape[1] :]

    def operator(q, k):
        a, b = q * 2, k * 2
        torch.ops.packops.rope_(a, b, cos, sin, **options)
        return a, b

    for function in (non_leaves, views, operator):
        for actual, wanted in zip(gradients(function), expected, strict=True):
            assert torch.equal(actual, wanted), function.__name__

    leaf = q.clone().requires_grad_()
    for call in (
        lambda: packops.apply_rope(leaf, None, cos, sin, inplace=True),
        lambda: torch.ops.packops.rope_(leaf, None, cos, sin),
    ):
        with pytest.raises(ValueError, match="q is a leaf that needs a gradient"):
            call()
    with torch.no_grad():
        packops.apply_rope(leaf, None, cos, sin, inplace=True)
    assert torch.equal(leaf, packops.apply_rope(q, None, cos, sin)[0])

    # exp saves its output for its gradient: rotating that output must not pass unnoticed.
    for no_grad in (False, True):
        x = q.clone().requires_grad_()
        y = x.exp()
        with torch.set_grad_enabled(not no_grad):
            packops.apply_rope(y, None, cos, sin, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    x = q.clone()
    version = x._version
    torch.ops.packops.rope_(x, None, cos, sin)
    assert x._version == version + 1
    with pytest.raises(ValueError, match=r"q of shape .* has elements that share memory"):
        packops.apply_rope(q[:1].expand(13, -1, -1), None, cos, sin, inplace=True)


def test_checkpoint_and_retain_graph(device):
    from torch.utils.checkpoint import checkpoint

    q, k, _ = make_qk("thd", torch.float32, device)
    cos, sin = packops.rope_table(64, 13, device=device)
    q.requires_grad_()
    out = checkpoint(lambda q: packops.apply_rope(q, k, cos, sin)[0], q, use_reentrant=False)
    out.sum().backward(retain_graph=True)
    first = q.grad.clone()
    out.sum().backward()
    assert torch.equal(q.grad, 2 * first)


# ---- torch.compile, opcheck, export.

OPTION_SETS = {
    "plain": {},
    "positions": {"position_ids": "ids"},
    "documents": {"cu_seqlens": "cu"},
    "layout": {"layout": "bhsd", "position_ids": "ids"},
    "partial": {"rotary_dim": 16, "rotary_offset": 8, "interleaved": True},
    "per token": {"per_token_table": True},
    "mrope": {"position_ids": "axes", "mrope_section": [3, 3, 2], "mrope_interleaved": True},
}


def option_case(name, device):
    options = dict(OPTION_SETS[name])
    q, k = (make_heads((2, 4, h, 32), torch.float32, device) for h in (3, 1))
    if options.get("layout") == "bhsd":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    cos, sin = packops.rope_table(16, 8, device=device)
    ids = torch.randint(0, 8, (2, 4), device=device)
    values = {"ids": ids, "cu": torch.tensor([0, 3, 7], device=device), "axes": torch.stack([ids, ids, ids])}
    options = {key: values.get(value, value) if isinstance(value, str) else value for key, value in options.items()}
    return q, k, *((cos[ids], sin[ids]) if name == "per token" else (cos, sin)), options


@pytest.mark.parametrize("name", OPTION_SETS)
def test_opcheck(device, name):
    q, k, cos, sin, options = option_case(name, device)
    ops = torch.ops.packops
    torch.library.opcheck(ops.rope.default, (q, k, cos, sin), options)
    torch.library.opcheck(ops.rope.default, (q.clone().requires_grad_(), k.clone().requires_grad_(), cos, sin), options)
    torch.library.opcheck(ops.rope.default, (q.clone().requires_grad_(), None, cos, sin), options)
    torch.library.opcheck(ops._rope.default, (q, k, cos, sin), {**options, "transposed": True})
    torch.library.opcheck(ops.rope_.default, (q.clone(), k.clone(), cos, sin), options)
    torch.library.opcheck(ops._rope_.default, (q.clone(), None, cos, sin), options)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", OPTION_SETS)
def test_compile(device, name, inplace):
    q, k, cos, sin, options = option_case(name, device)

    def function(q, k):
        a, b = q * 1.5, k * 1.5
        a, b = packops.apply_rope(a, b, cos, sin, inplace=inplace, **options)
        return a * 2, b * 2

    torch._dynamo.reset()  # every case compiles the same code, which has a limit
    compiled = torch.compile(function, fullgraph=True)
    for grad in (False, True):
        leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_(grad) for x in (q, k, q, k)]
        expected, actual = function(*leaves[:2]), compiled(*leaves[2:])
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)
        if grad:
            sum(x.square().sum() for x in expected).backward()
            sum(x.square().sum() for x in actual).backward()
            for a, e in zip(leaves[2:], leaves[:2], strict=True):
                torch.testing.assert_close(a.grad, e.grad, rtol=1e-5, atol=1e-5)


def test_compile_rotates_the_slice_that_it_was_given_in_place(device):
    """Where lengths change, so does where a slice begins, and inductor does not tell that to an op which writes to it."""
    cos, sin = packops.rope_table(8, 32, device=device)

    def rotate(qkv):
        packops.apply_rope(qkv[0], qkv[1], cos, sin, inplace=True)
        return qkv

    torch._dynamo.reset()
    compiled = torch.compile(rotate, fullgraph=True, dynamic=True)
    for tokens in (7, 9):
        qkv = torch.randn(3, tokens, 2, 8, device=device)
        torch.testing.assert_close(compiled(qkv.clone()), rotate(qkv.clone()), rtol=1e-6, atol=1e-6)


def test_compile_once_for_all_lengths(device):
    cos, sin = packops.rope_table(32, 100, device=device)
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, cu: packops.apply_rope(q, k, cos, sin, cu_seqlens=cu), fullgraph=True, dynamic=True, backend=counter
    )
    for tokens, documents in [(10, 4), (17, 5), (33, 7), (64, 4)]:
        q, k = torch.randn(tokens, 3, 32, device=device, requires_grad=True), torch.randn(tokens, 2, 32, device=device)
        cu_seqlens = torch.linspace(0, tokens, documents + 1, device=device).int()
        out = compiled(q, k, cu_seqlens)
        out[0].sum().backward()
        assert torch.equal(out[0], packops.apply_rope(q, k, cos, sin, cu_seqlens=cu_seqlens)[0])
    assert counter.frame_count == 1


def test_export(device):
    class Rotate(torch.nn.Module):
        def forward(self, q, k, ids):
            cos, sin = torch.ones(9, 8, device=q.device), torch.zeros(9, 8, device=q.device)
            return packops.apply_rope(q, k, cos, sin, position_ids=ids)

    q, ids = torch.randn(5, 2, 16, device=device), torch.arange(5, device=device)
    program = torch.export.export(Rotate(), (q, q, ids))
    assert any("packops.rope" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(q, q, ids)[0], q)


# ---- Errors.


def test_errors(device):
    def raises(kind, message, *arguments, **options):
        for inplace in (False, True):
            with pytest.raises(kind, match="packops.rope: .*" + message):
                packops.apply_rope(*arguments, inplace=inplace, **options)

    q = torch.randn(6, 2, 16, device=device)
    four = torch.randn(2, 3, 2, 16, device=device)
    cos, sin = packops.rope_table(16, 8, device=device)
    ids = torch.arange(6, device=device)
    raises(TypeError, "q must be float32, float16 or bfloat16 .*got Long", q.long(), None, cos, sin)
    raises(TypeError, "k must have the dtype of q, Float, got Half", q, q.half(), cos, sin)
    raises(TypeError, "cos and sin must have one floating dtype, got Int", q, None, cos.int(), sin.int())
    raises(TypeError, "got Float and BFloat16", q, None, cos, sin.bfloat16())
    raises(TypeError, "position_ids must be int32 or int64, got Float", q, None, cos, sin, position_ids=ids.float())
    raises(TypeError, "cu_seqlens must be int32 or int64, got Float", q, None, cos, sin, cu_seqlens=ids.float())
    raises(ValueError, "layout must be 'thd', 'bshd' or 'bhsd', got 'sbhd'", four, None, cos, sin, layout="sbhd")
    raises(ValueError, r"with layout 'thd' 3-D, got shape \(2, 3, 2, 16\)", four, None, cos, sin, layout="thd")
    raises(ValueError, r"got shape \(6, 16\)", q[:, 0], None, cos, sin)
    raises(
        ValueError,
        "last dimension of q must be contiguous, got stride 2",
        torch.randn(6, 2, 32, device=device)[..., ::2],
        None,
        cos,
        sin,
    )
    raises(ValueError, r"k must have the shape of q .*got \(5, 2, 16\)", q, q[:5], cos, sin)
    raises(ValueError, "k must have the shape of q", q, q[..., :8], cos, sin)
    raises(ValueError, r"cos must be \(positions, width\), got shape \(8,\)", q, None, cos[:, 0], sin[:, 0])
    raises(ValueError, "pass per_token_table=True", four, None, cos[None], sin[None])
    raises(ValueError, r"sin must have the shape of cos, \(8, 8\), got \(7, 8\)", q, None, cos, sin[1:])
    raises(ValueError, "last dimension of cos and sin must be contiguous", q, None, cos.t(), sin.t())
    raises(
        ValueError, "rotary dimension must be even and positive, got 9", q, None, cos[:, :3].repeat(1, 3), sin[:, :3].repeat(1, 3)
    )
    raises(ValueError, "even and positive, got 7", q, None, cos, sin, rotary_dim=7)
    raises(ValueError, "rotary_dim / 2 = 6 columns, or rotary_dim = 12 .*got 8", q, None, cos, sin, rotary_dim=12)
    raises(
        ValueError,
        "must lie inside a head of 16 features, got rotary_offset 4 and rotary_dim 16",
        q,
        None,
        cos,
        sin,
        rotary_offset=4,
    )
    raises(ValueError, "must lie inside", q, None, cos, sin, rotary_offset=-2)
    raises(
        ValueError,
        r"position_ids must have one entry per token, \(6\) or \(1, 6\), got shape \(5,\)",
        q,
        None,
        cos,
        sin,
        position_ids=ids[:5],
    )
    raises(ValueError, r"got shape \(3,\)", four, None, cos, sin, position_ids=ids[:3])
    raises(ValueError, r"cos must have one entry per token", q, None, cos[:5], sin[:5], per_token_table=True)
    raises(
        ValueError,
        "position_ids and mrope_section must be None",
        q,
        None,
        cos[:6],
        sin[:6],
        per_token_table=True,
        position_ids=ids,
    )
    raises(
        ValueError, "three widths that add up to rotary_dim / 2 = 8", q, None, cos, sin, mrope_section=[4, 4, 4], position_ids=ids
    )
    raises(ValueError, "three widths", q, None, cos, sin, mrope_section=[4, 4], position_ids=ids)
    raises(ValueError, r"mrope_section needs position_ids of shape \(3, ...\)", q, None, cos, sin, mrope_section=[4, 2, 2])
    raises(
        ValueError,
        r"position_ids must be \(3, ...\) with mrope_section",
        q,
        None,
        cos,
        sin,
        mrope_section=[4, 2, 2],
        position_ids=ids,
    )
    raises(ValueError, "mrope_interleaved=True needs mrope_section", q, None, cos, sin, mrope_interleaved=True)
    raises(ValueError, r"cu_seqlens must have shape \(documents \+ 1,\), got \(0,\)", q, None, cos, sin, cu_seqlens=ids[:0])


@pytest.mark.gpu
def test_errors_of_devices():
    q = torch.randn(6, 2, 16, device="cuda")
    cos, sin = packops.rope_table(16, 8, device="cuda")
    for arguments, options in [
        ((q, q.cpu(), cos, sin), {}),
        ((q, None, cos.cpu(), sin), {}),
        ((q, None, cos, sin.cpu()), {}),
        ((q, None, cos, sin), {"position_ids": torch.arange(6)}),
        ((q, None, cos, sin), {"cu_seqlens": torch.tensor([0, 6])}),
        ((q.cpu(), None, cos, sin), {}),
    ]:
        with pytest.raises(ValueError, match="must be on the device of q"):
            packops.apply_rope(*arguments, **options)
    with pytest.raises(TypeError, match=r"float64 on the CPU"):
        packops.apply_rope(q.double(), None, cos, sin)


# ---- How the work is cut up.


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 192])
def test_a_token_has_the_same_bits_in_problems_of_every_size(layout, head_dim):
    """A thread takes one, two or four heads, by the size of the problem (rope_launch.h). The emulator tries every launch."""
    q, k, name = make_qk(layout, torch.bfloat16, "cuda", tokens=40000, head_dim=head_dim)
    cos, sin = packops.rope_table(64, 40000, device="cuda")
    options = {"layout": name, "rotary_dim": 64, "rotary_offset": head_dim - 64}
    token = 2 if name == "bhsd" else q.dim() - 3
    expected = packops.apply_rope(q, k, cos, sin, **options)
    for tokens in (5, 12000):
        some = packops.apply_rope(*(x.narrow(token, 0, tokens) for x in (q, k)), cos, sin, **options)
        assert all(torch.equal(x, y.narrow(token, 0, tokens)) for x, y in zip(some, expected, strict=True)), tokens


# ---- What a training loop needs of a CUDA op.


@pytest.mark.gpu
def test_no_host_sync_and_graph_capture():
    q, k, _ = make_qk("thd", torch.bfloat16, "cuda", tokens=200)
    q.requires_grad_()
    k.requires_grad_()
    cos, sin = packops.rope_table(64, 300, device="cuda")
    ids = torch.arange(200, device="cuda")
    cu_seqlens = torch.tensor([0, 50, 120, 180], device="cuda", dtype=torch.int32)
    grads = torch.randn_like(q), torch.randn_like(k)

    def step(position_ids, cu_seqlens):
        q.grad = k.grad = None
        out = packops.apply_rope(q, k, cos, sin, position_ids=position_ids, cu_seqlens=cu_seqlens)
        torch.autograd.backward(out, grads)
        return *out, q.grad, k.grad

    step(ids, None)
    with no_host_sync():
        step(ids, None)
        step(None, cu_seqlens)
        with torch.no_grad():
            packops.apply_rope(q, k, cos, sin, cu_seqlens=cu_seqlens, inplace=True)

    graph, captured = capture(lambda: step(None, cu_seqlens))
    cu_seqlens.copy_(torch.tensor([0, 10, 11, 199], device="cuda"))
    graph.replay()
    replayed = [x.clone() for x in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(None, cu_seqlens), strict=True))


@pytest.mark.gpu
def test_the_same_bits_every_time_on_any_stream():
    q, k, _ = make_qk("bhsd_view", torch.bfloat16, "cuda", tokens=500)
    cos, sin = packops.rope_table(64, 500, device="cuda")
    expected = packops.apply_rope(q, k, cos, sin, layout="bhsd")
    stream = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            late = q * 1
            out = packops.apply_rope(late, k, cos, sin, layout="bhsd")
        stream.synchronize()
        assert torch.equal(out[0], expected[0])
        assert torch.equal(out[1], expected[1])


@pytest.mark.gpu
@pytest.mark.large(gib=24)
def test_more_than_two_to_the_31_elements():
    tokens, heads, dim = 2**17 + 3, 129, 128  # 2.16e9 elements
    q = torch.zeros(tokens, heads, dim, device="cuda", dtype=torch.bfloat16)
    last = torch.randn(5, heads, dim, device="cuda", dtype=torch.bfloat16)
    q[-5:] = last
    cos, sin = packops.rope_table(dim, tokens, device="cuda")
    out, _ = packops.apply_rope(q, None, cos, sin)
    expected, _ = packops.apply_rope(last, None, cos[-5:].contiguous(), sin[-5:].contiguous())
    assert torch.equal(out[-5:], expected)
    assert (out[:-5] == 0).all()
    # A stride beyond 2^31: one token's heads lie that far apart.
    far = torch.as_strided(q, (3, 2, dim), (dim, 2**31, 1))
    near, _ = packops.apply_rope(far.contiguous(), None, cos, sin)
    assert torch.equal(packops.apply_rope(far, None, cos, sin)[0], near)


@pytest.mark.parametrize("most", [2**63 - 4, 2**62])
def test_numbers_whose_sum_overflows_are_refused(most):
    q, (cos, sin) = torch.randn(4, 2, 16), packops.rope_table(8, 16)
    weight, positions = torch.ones(16), torch.zeros(3, 4, dtype=torch.long)

    def norm_rope(q, k, *given, **named):
        return packops.apply_qk_norm_rope(q, k, weight, None, *given, eps=1e-6, **named)

    for call in (packops.apply_rope, norm_rope):
        with pytest.raises(ValueError, match=f"must lie inside a head of 16 features, got rotary_offset {most} and rotary_dim 8"):
            call(q, None, cos, sin, rotary_dim=8, rotary_offset=most)
        with pytest.raises(ValueError, match=r"mrope_section must be three widths that add up to rotary_dim / 2 = 4, got \("):
            call(q, None, cos, sin, position_ids=positions, mrope_section=[2**63 - 1, 2**63 - 1, 6])
