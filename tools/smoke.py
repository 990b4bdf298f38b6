"""Does an installed packops work? Every op once on the CPU, forward and backward, against plain torch.

Run by tools/check_wheel.sh and tools/check_abi_range.sh outside the source tree; prints where packops came from.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._ops import OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import packops
from packops import reference

ops = torch.ops.packops
CU_SEQLENS = torch.tensor([0, 3, 3, 9], dtype=torch.int32)  # documents of 3, 0 and 6 tokens, then a token of padding
TOKENS = 10


def gradients(outputs, inputs, retain_graph=False):
    """Of a weighted sum of all outputs, with the same weights whatever the dtype."""
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
    weights = [torch.linspace(-1, 1, x.numel()).reshape(x.shape).to(x.dtype) for x in outputs]
    return torch.autograd.grad(outputs, inputs, weights, retain_graph=retain_graph)


def same(got, want, inputs) -> None:
    """Values and gradients of an operation and of its specification in fp64."""
    for ours, theirs in zip(gradients(got, inputs), gradients(want, inputs, retain_graph=True), strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), strict=True):
        assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)


def check_cross_entropy() -> None:
    logits, labels = torch.randn(TOKENS, 1003, requires_grad=True), torch.randint(0, 1003, (TOKENS,))
    labels[4] = -100
    options = {"cu_seqlens": CU_SEQLENS, "shift": True, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 20.0}
    for reduction in reference.REDUCTIONS:
        want = reference.cross_entropy(logits, labels, reduction=reduction, **options)
        same(packops.cross_entropy(logits, labels, reduction=reduction, **options), want, [logits])
        same(ops.cross_entropy(logits, labels, reduction=reduction, **options), want, [logits])
        same(ops.cross_entropy_stats(logits, labels, reduction=reduction, **options)[0], want, [logits])
        same(packops.CrossEntropyLoss(reduction=reduction, shift=True)(logits[None], labels[None]),
             reference.cross_entropy(logits[None], labels[None], reduction=reduction, shift=True), [logits])  # fmt: skip
        same(packops.cross_entropy(logits * 1, labels, reduction=reduction, inplace=True, **options), want, [logits])
    same(packops.cross_entropy(logits, labels), F.cross_entropy(logits, labels), [logits])
    _, stats = packops.cross_entropy(logits, labels, return_stats=True)
    assert stats.num_tokens == TOKENS - 1
    assert_close(stats.lse[0], logits[0].logsumexp(-1))
    try:
        packops.cross_entropy(logits, labels + 2000)
    except IndexError:
        pass
    else:
        raise AssertionError("a label outside the vocabulary must raise IndexError")


def check_linear_and_sharded_losses() -> None:
    hidden, weight = torch.randn(TOKENS, 16, requires_grad=True), torch.randn(203, 16, requires_grad=True)
    labels, bias = torch.randint(0, 203, (TOKENS,)), torch.randn(203, requires_grad=True)
    options = {"cu_seqlens": CU_SEQLENS, "shift": True, "label_smoothing": 0.1, "z_loss": 0.01}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for reduction in reference.REDUCTIONS:
        want = reference.linear_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction, **options)
        inputs = [hidden, weight, bias]
        stats = ops.linear_cross_entropy_stats(hidden, weight, labels, bias=bias, reduction=reduction, **options)
        same(stats[0], want, inputs)
        for function in (packops.linear_cross_entropy, ops.linear_cross_entropy):
            same(function(hidden, weight, labels, bias=bias, reduction=reduction, **options), want, inputs)
        sharded = packops.vocab_parallel_linear_cross_entropy
        same(sharded(hidden, weight, labels, local_bias=bias, reduction=reduction, **options), want, inputs)
        logits = F.linear(hidden, weight, bias)
        same(packops.vocab_parallel_cross_entropy(logits, labels, reduction=reduction, **options), want, inputs)
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]  # whose logits are kept for the backward
    main_grad = torch.zeros(weight.shape)
    packops.linear_cross_entropy(*low, labels, main_grad=main_grad).backward()
    packops.linear_cross_entropy(*low, labels).backward()
    want = torch.autograd.grad(reference.linear_cross_entropy(*(x.double() for x in low), labels), low[1])[0]
    for found in (main_grad, low[1].grad):
        assert (found - want).abs().max() < 0.01 * want.abs().max(), "a gradient of kept logits is wrong"
    options = {"cu_seqlens": CU_SEQLENS, "shift": True, "logit_scale": 1.3, "softcap": 6.0}
    want = reference.linear_log_probs(hidden, weight, labels, bias=bias, **options)
    for function in (packops.linear_log_probs, ops.linear_log_probs):
        same(tuple(function(hidden, weight, labels, bias=bias, **options)), want, inputs)
    same(tuple(packops.vocab_parallel_linear_log_probs(hidden, weight, labels, local_bias=bias, **options)), want, inputs)
    values = torch.randn(TOKENS, requires_grad=True)
    for function in (packops.document_sums, ops.document_sums):
        same(function(values, CU_SEQLENS), reference.document_sums(values, CU_SEQLENS), [values])
    dist.destroy_process_group()


def check_rope() -> None:
    cos, sin = packops.rope_table(16, TOKENS)
    q, k = torch.randn(TOKENS, 4, 24, requires_grad=True), torch.randn(TOKENS, 2, 24, requires_grad=True)
    options = {"cu_seqlens": CU_SEQLENS, "rotary_offset": 4, "rotary_dim": 16}
    for interleaved in (False, True):
        want = reference.rope(q, k, cos, sin, interleaved=interleaved, **options)
        same(packops.apply_rope(q, k, cos, sin, interleaved=interleaved, **options), want, [q, k])
        same(ops.rope(q, k, cos, sin, interleaved=interleaved, **options), want, [q, k])
        same(packops.apply_rope(q * 1, k * 1, cos, sin, interleaved=interleaved, inplace=True, **options), want, [q, k])
        changed = q * 1, k * 1
        ops.rope_(*changed, cos, sin, interleaved=interleaved, **options)
        same(changed, want, [q, k])

    weights = [torch.rand(24, requires_grad=True) for _ in "qk"]
    want = reference.qk_norm_rope(q, k, *weights, cos, sin, eps=1e-6, **options)
    same(packops.apply_qk_norm_rope(q, k, *weights, cos, sin, eps=1e-6, **options), want, [q, k, *weights])
    same(ops.qk_norm_rope(q, k, *weights, cos, sin, eps=1e-6, **options), want, [q, k, *weights])


def check_gated_mlp() -> None:
    gate, up = (torch.randn(TOKENS, 24, requires_grad=True) for _ in range(2))
    weight, bias = torch.randn(16, 24, requires_grad=True), torch.randn(16, requires_grad=True)
    for activation in ("silu", "gelu_tanh", "gelu"):
        want = reference.gated_activation(gate, up, activation=activation)
        for function in (packops.gated_activation, ops.gated_activation):
            same(function(gate, up, activation=activation), want, [gate, up])
        want = reference.gated_linear(gate, up, weight, bias, activation=activation)
        for function in (packops.gated_linear, ops.gated_linear):
            same(function(gate, up, weight, bias, activation=activation), want, [gate, up, weight, bias])
        x, first = torch.randn(TOKENS, 8, requires_grad=True), [torch.randn(24, 8, requires_grad=True) for _ in range(2)]
        inputs = [x, *first, weight]
        want = reference.gated_mlp(*inputs, activation=activation)
        for function in (packops.gated_mlp, ops.gated_mlp):
            same(function(*inputs, activation=activation), want, inputs)


def check_attention_and_norm() -> None:
    q = torch.randn(TOKENS, 4, 8, requires_grad=True)
    k, v = (torch.randn(TOKENS, 2, 8, requires_grad=True) for _ in range(2))
    for options in ({}, {"window": 2, "softcap": 2.0}, {"causal": False}):
        want = reference.attention(q, k, v, CU_SEQLENS, **options)
        for function in (packops.attention, ops.attention):
            same(function(q, k, v, CU_SEQLENS, **options), want, [q, k, v])
    parents = torch.tensor([-1] + [0] * (len(CU_SEQLENS) - 2))
    for function in (packops.attention, ops.attention):
        same(function(q, k, v, CU_SEQLENS, parents), reference.attention(q, k, v, CU_SEQLENS, parents), [q, k, v])
    x, weight = torch.randn(TOKENS, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    for function in (packops.rms_norm, ops.rms_norm):
        want = reference.rms_norm(x, weight, eps=1e-3, zero_centered=True)
        same(function(x, weight, eps=1e-3, zero_centered=True), want, [x, weight])
    residual = torch.randn(TOKENS, 24, requires_grad=True)
    for function in (packops.add_rms_norm, ops.add_rms_norm):
        (y, total), exact = function(x, residual, weight, eps=1e-3), reference.add_rms_norm(x, residual, weight, eps=1e-3)
        same(y + 2 * total, exact[0] + 2 * exact[1], [x, residual, weight])


def check_metadata_and_packing() -> None:
    labels = torch.randint(0, 9, (TOKENS,))
    for function in (packops, ops):
        for got, want in (
            (function.packed_metadata(CU_SEQLENS, TOKENS), reference.packed_metadata(CU_SEQLENS, TOKENS)),
            (function.packed_labels(labels, CU_SEQLENS), reference.packed_labels(labels, CU_SEQLENS)),
        ):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (got, want)
    parents = torch.tensor([-1] + [0] * (len(CU_SEQLENS) - 2))
    for function in (packops.packed_metadata, ops.packed_forest):
        got, want = (f(CU_SEQLENS, TOKENS, parents) for f in (function, reference.packed_forest))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (got, want)
    lengths = torch.randint(1, 700, (500,)).tolist()
    for strategy in ("best_fit", "bfd", "ffd", "next_fit", "sequential"):
        plan = packops.pack(lengths, 1024, strategy=strategy)
        assert sorted(i for pack in plan for i in pack) == list(range(500)), strategy
        assert all(sum(lengths[i] for i in pack) <= 1024 for pack in plan), strategy
    batch = packops.PackingCollator()([torch.arange(n) for n in (7, 2, 12)])
    assert batch.cu_seqlens.tolist() == [0, 7, 9, 21]
    assert packops.loss_normalizer([batch, batch]) == 2 * batch.num_items
    assert sum(len(step) for step in packops.PackedBatchSampler(lengths, 1024)) == 500


def check_fakes() -> None:
    """What torch.compile and export use, registered through another torch than the one of the build."""
    with FakeTensorMode():
        logits, labels = torch.empty(TOKENS, 50, dtype=torch.bfloat16), torch.empty(TOKENS, dtype=torch.int64)
        loss = ops.cross_entropy(logits, labels, reduction="none")
        assert (loss.shape, loss.dtype) == ((TOKENS,), torch.float32)
        q, table = torch.empty(TOKENS, 4, 16), torch.empty(TOKENS, 8)
        assert ops.rope(q, None, table, table)[0].shape == q.shape
        assert ops.qk_norm_rope(q, None, torch.empty(16), None, table, table, eps=1e-6)[0].shape == q.shape
        assert ops.packed_metadata(torch.empty(4, dtype=torch.int32), TOKENS)[0].shape == (TOKENS,)
        assert ops.gated_activation(logits, logits).shape == logits.shape
        assert ops.rms_norm(q, torch.empty(16), eps=1e-6).shape == q.shape
        assert packops.attention(q, q, q, torch.empty(4, dtype=torch.int32)).shape == q.shape


class CalledOps(TorchFunctionMode):
    """Names of the packops ops that are called as ``torch.ops.packops.<name>`` while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if isinstance(func, OpOverloadPacket) and getattr(ops, func.__name__, None) is func:
            self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


def check_everything() -> None:
    torch.manual_seed(0)
    with CalledOps() as called:
        check_cross_entropy()
        check_linear_and_sharded_losses()
        check_rope()
        check_gated_mlp()
        check_attention_and_norm()
        check_metadata_and_packing()
    check_fakes()
    schemas = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("packops::")}
    public = {name.removeprefix("packops::") for name in schemas if not name.startswith("packops::_")}
    assert public == called.names, f"this script does not call {sorted(public - called.names)}"


def main() -> None:
    source = Path(__file__).resolve().parents[1] / "python"
    assert source not in Path(packops.__file__).resolve().parents, f"packops comes from the source tree: {packops.__file__}"
    sources = packops.jit.installed_csrc()  # what packops.jit compiles
    digest = packops._C.build_info()["sources"]
    assert packops._build.source_digest(sources) == digest, f"{sources} is not what the library was built from"
    check_everything()

    python = sys.version.split()[0]
    print(f"packops {packops.__version__} works under torch {torch.__version__}, Python {python}: {packops.__file__}")


if __name__ == "__main__":
    main()
