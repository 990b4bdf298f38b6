"""RMS norm + RoPE against its fp64 specification and against Hugging Face's modules; weight gradients to the bit."""

from __future__ import annotations

import pytest
import torch

import packops
from cuda_streams import capture, no_host_sync
from packops import reference
from test_rope import LAYOUTS, close, make_heads, make_qk


def check(q, k, cos, sin, *, across=False, weight_dtype=torch.float32, **options):
    dtype, dim = q.dtype, q.shape[-1]
    layout = options.get("layout")
    head_axis = 2 if layout == "bshd" or (layout is None and q.dim() == 4) else 1
    weights = [
        None
        if x is None
        else (1 + 0.3 * make_heads(((x.shape[head_axis] if across else 1) * dim,), torch.float32, x.device, seed=3)).to(
            weight_dtype
        )
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
        [o for o in torch.ops.packops.qk_norm_rope(*again, cos, sin, **options) if o is not None],
        [g for g in grads if g is not None],
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


@pytest.mark.parametrize(
    "head_dim, rotary_dim, offset",
    [(128, 128, 0), (256, 64, 0), (192, 64, 128), (80, 80, 0), (72, 72, 0), (96, 20, 4), (7, 6, 1), (512, 512, 0), (1056, 32, 0)],
)
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
    assert q_out[41:].isnan().all()
    assert (k_out[41:] == float("inf")).all()
    (q_out[:41].float().sum() + k_out[:41].float().sum()).backward()
    assert weight.grad.isfinite().all()
    assert q.grad[:41].isfinite().all()
    assert (q.grad[41:] == 0).all()


@pytest.mark.parametrize("zero_centered", [False, True])
def test_equals_the_modules_of_transformers(device, zero_centered):
    """Qwen3's norm (or Gemma 3's) and then apply_rotary_pos_emb, in fp64 so that only the formula is compared."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    if zero_centered:
        from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm as Norm
    else:
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm as Norm
    q, k, _ = make_qk("bhsd_view", torch.float32, device)
    norms = [Norm(64, eps=1e-6).to(device) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight, 0.0 if zero_centered else 1.0, 0.3)
    cos, sin = packops.rope_table(64, 13, device=device)
    full = [torch.cat([t, t], -1)[None] for t in (cos, sin)]
    expected = llama.apply_rotary_pos_emb(norms[0](q), norms[1](k), *full)
    weights = [norm.weight for norm in norms]
    actual = packops.apply_qk_norm_rope(q, k, *weights, cos, sin, eps=1e-6, zero_centered=zero_centered, layout="bhsd")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=2e-6)
    torch.autograd.backward(expected, [torch.ones_like(e) for e in expected])
    grads = [norm.weight.grad.clone() for norm in norms]
    for norm in norms:
        norm.weight.grad = None
    (actual[0].sum() + actual[1].sum()).backward()
    for norm, grad in zip(norms, grads, strict=True):
        torch.testing.assert_close(norm.weight.grad, grad, rtol=1e-4, atol=1e-4)


def test_gradcheck():
    q, k = (torch.randn(5, h, 6, dtype=torch.float64, requires_grad=True) for h in (2, 1))
    cos, sin = (1.3 * t for t in packops.rope_table(4, 5, dtype=torch.float64))
    cu_seqlens = torch.tensor([0, 2, 4])
    for sizes in [(6, 6), (12, 6)]:
        weights = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in sizes]
        for call in (packops.apply_qk_norm_rope, torch.ops.packops.qk_norm_rope):
            assert torch.autograd.gradcheck(
                lambda *x, call=call: call(*x, cos, sin, eps=1e-3, cu_seqlens=cu_seqlens, rotary_offset=1), (q, k, *weights)
            )


@pytest.mark.parametrize("call", [packops.apply_qk_norm_rope, torch.ops.packops.qk_norm_rope])
def test_gradients_of_every_stride(device, call):
    q, k, _ = make_qk("thd", torch.float32, device)
    cos, sin = packops.rope_table(64, 13, device=device)
    weight = torch.randn(64, device=device)
    dense = make_heads(q.shape, torch.float32, device, seed=3)
    for grad in [
        torch.ones((), device=device).expand(q.shape),
        dense.transpose(0, 2).contiguous().transpose(0, 2),
        dense[:1].expand(q.shape),
    ]:
        leaves = [x.clone().requires_grad_() for x in (q, weight)]
        doubles = [x.double().requires_grad_() for x in (q, weight)]
        call(leaves[0], k, leaves[1], weight, cos, sin, eps=1e-6)[0].backward(grad)  # and none for k
        reference.qk_norm_rope(doubles[0], k, doubles[1], weight, cos, sin, eps=1e-6)[0].backward(grad.double())
        for leaf, double in zip(leaves, doubles, strict=True):
            torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=1e-5, atol=1e-5)
    frozen = weight.clone()
    out = call(q, k.requires_grad_(), frozen, frozen, cos, sin, eps=1e-6)
    assert not out[0].requires_grad
    assert out[1].requires_grad
    out[1].sum().backward()
    assert k.grad is not None
    assert frozen.grad is None


@pytest.mark.parametrize("across", [False, True])
def test_opcheck_and_compile(device, across):
    torch._dynamo.reset()
    q, k = (make_heads((2, 4, h, 16), torch.float32, device) for h in (3, 1))
    weights = [torch.randn(16 * (h if across else 1), device=device) for h in (3, 1)]
    cos, sin = packops.rope_table(16, 8, device=device)
    ids = torch.randint(0, 8, (2, 4), device=device)
    options = {"eps": 1e-6, "position_ids": ids}
    ops = torch.ops.packops
    leaves = [x.clone().requires_grad_() for x in (q, k, *weights)]
    torch.library.opcheck(ops.qk_norm_rope.default, (*leaves, cos, sin), options)
    torch.library.opcheck(ops.qk_norm_rope.default, (q, None, weights[0], None, cos, sin), options)
    torch.library.opcheck(ops._qk_norm_rope.default, (q, k, *weights, cos, sin, ids, None, 1e-6))
    torch.library.opcheck(ops._qk_norm_rope_backward.default, (q, k, q, k, *weights, cos, sin, ids, None, 1e-6))

    def function(q, k, qw, kw):
        return packops.apply_qk_norm_rope(q * 1.5, k * 1.5, qw, kw, cos, sin, **options)

    twins = [x.detach().clone().requires_grad_() for x in leaves]
    expected, actual = function(*leaves), torch.compile(function, fullgraph=True)(*twins)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    (expected[0].square().sum() + expected[1].square().sum()).backward()
    (actual[0].square().sum() + actual[1].square().sum()).backward()
    for a, e in zip(twins, leaves, strict=True):
        torch.testing.assert_close(a.grad, e.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 1056])
def test_weight_gradients_do_not_depend_on_the_run(device, head_dim):
    q, k, _ = make_qk("thd", torch.bfloat16, device, tokens=3000 if head_dim == 64 else 300, head_dim=head_dim)
    cos, sin = packops.rope_table(head_dim, 3000, device=device)
    results = []
    threads = torch.get_num_threads()
    for run in range(3):
        if run == 1 and device.type == "cpu":
            torch.set_num_threads(1)
        weights = [torch.ones(head_dim, device=device, requires_grad=True) for _ in range(2)]
        out = packops.apply_qk_norm_rope(q, k, *weights, cos, sin, eps=1e-6)
        torch.autograd.backward(out, [o.detach() for o in out])
        results.append([w.grad for w in weights])
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in results[1:] for a, b in zip(run, results[0], strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 16), (2, 0, 3, 16), (3, 0, 16)])
def test_empty(device, shape):
    q = torch.empty(shape, device=device, requires_grad=True)
    weight = torch.ones(16, device=device, requires_grad=True)
    cos, sin = packops.rope_table(16, 4, device=device)
    out, _ = packops.apply_qk_norm_rope(q, None, weight, None, cos, sin, eps=1e-6)
    out.sum().backward()
    assert out.shape == shape
    assert (weight.grad == 0).all()


def test_position_outside_the_table(device):
    q = make_heads((4, 2, 24), torch.float32, device)
    weight = torch.ones(24, device=device, requires_grad=True)
    cos, sin = packops.rope_table(24, 9, device=device)
    ids = torch.tensor([0, 8, 9, 3], device=device)
    if device.type == "cpu":
        with pytest.raises(IndexError, match=r"packops\.qk_norm_rope: position 9 of token 2 is outside the table of 9 positions"):
            packops.apply_qk_norm_rope(q, None, weight, None, cos, sin, eps=1e-6, position_ids=ids)
        return
    q.requires_grad_()
    out, _ = packops.apply_qk_norm_rope(q, None, weight, None, cos, sin, eps=1e-6, position_ids=ids)
    out.sum().backward()
    assert out[2].isnan().all()
    assert (q.grad[2] == 0).all()
    assert weight.grad.isfinite().all()
    assert out[[0, 1, 3]].isfinite().all()


def test_errors(device):
    q, k = torch.randn(6, 2, 16, device=device), torch.randn(6, 1, 16, device=device)
    weight = torch.ones(16, device=device)
    cos, sin = packops.rope_table(16, 8, device=device)

    def raises(kind, message, *arguments, eps=1e-6):
        with pytest.raises(kind, match=r"packops\.qk_norm_rope: " + message):
            packops.apply_qk_norm_rope(*arguments, cos, sin, eps=eps)

    raises(ValueError, "k and k_weight must be given together", q, k, weight, None)
    raises(ValueError, "k and k_weight must be given together", q, None, weight, weight)
    raises(
        ValueError,
        r"q_weight and k_weight must have head_dim = 16 elements each .*or 32 and 16 .*got 8 and 16",
        q,
        k,
        weight[:8],
        weight,
    )
    raises(ValueError, "eps must not be negative, got -1", q, k, weight, weight, eps=-1.0)
    raises(TypeError, "k_weight must be floating, in the dtype of q_weight, got Half", q, k, weight, weight.half())
    raises(ValueError, r"q_weight must be a contiguous vector, got shape \(2, 16\)", q, k, weight.expand(2, 16), weight)
    raises(TypeError, "q must be float32", q.int(), k, weight, weight)


@pytest.mark.gpu
def test_no_host_sync_and_graph_capture():
    q, k, _ = make_qk("thd", torch.bfloat16, "cuda", tokens=200)
    leaves = [x.requires_grad_() for x in (q, k, torch.ones(64, device="cuda"), torch.ones(64, device="cuda"))]
    cos, sin = packops.rope_table(64, 300, device="cuda")
    cu_seqlens = torch.tensor([0, 50, 120, 180], device="cuda", dtype=torch.int32)
    grads = torch.randn_like(q), torch.randn_like(k)

    def step():
        for leaf in leaves:
            leaf.grad = None
        out = packops.apply_qk_norm_rope(*leaves, cos, sin, eps=1e-6, cu_seqlens=cu_seqlens)
        torch.autograd.backward(out, grads)
        return *out, *(leaf.grad for leaf in leaves)

    step()
    with no_host_sync():
        step()
    graph, captured = capture(step)
    cu_seqlens.copy_(torch.tensor([0, 10, 11, 199], device="cuda"))
    graph.replay()
    replayed = [x.clone() for x in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))
