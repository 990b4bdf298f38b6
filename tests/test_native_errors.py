"""Errors of the native library, for every op alike: memory that runs out, malformed documents, numbers that fp32 cannot hold,
memory that overlaps itself. Each op is a row of one table, so that none is forgotten."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import packops

OPS = torch.ops.packops
gpu = pytest.mark.gpu


def tables(device, width=4, rows=16) -> tuple[Tensor, Tensor]:
    angles = torch.arange(rows * width, device=device).view(rows, width) / 7
    return angles.cos(), angles.sin()


def bounds(*values: int, device="cpu") -> Tensor:
    return torch.tensor(values, device=device)


# --------------------------------------------------------------------------------------------------------------------------------
# Types


def test_compiled_and_direct_calls_raise_the_type():
    """Not a RuntimeError that names it: also where no Python of packops is between the caller and the kernel."""
    x, y = torch.randn(3, 5), torch.tensor([1, 2, 9])
    for call in (OPS.cross_entropy, OPS._cross_entropy_forward.default, packops.cross_entropy):
        with pytest.raises(IndexError, match=r"^packops\.cross_entropy: label 9 at position 2 is outside \[0, 5\)"):
            call(x, y)
    with pytest.raises(TypeError, match=r"^packops\.rms_norm: weight must have the dtype of x, Float, got Double$"):
        OPS._rms_norm(x, torch.ones(5, dtype=torch.float64), 1e-6, False)
    with pytest.raises(ValueError, match=r"^packops\.rms_norm: eps must not be negative, got -1$"):
        OPS._rms_norm(x, torch.ones(5), -1.0, False)


def test_the_type_survives_a_backward_pass():
    """The autograd engine calls backward from a thread of its own, on CUDA."""
    x = torch.randn(3, 5, requires_grad=True)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return OPS._rms_norm(grad, torch.ones(5), float("nan"), False)

    with pytest.raises(ValueError, match="eps must not be negative, got nan"):
        Broken.apply(x).sum().backward()


def test_an_op_made_of_others_is_named():
    hidden, weight = torch.randn(4, 8), torch.randn(6, 8)
    with pytest.raises(IndexError, match=r"^packops\.linear_cross_entropy: label 6 at position 1"):
        packops.linear_cross_entropy(hidden, weight, torch.tensor([0, 6, 1, 2]))


# --------------------------------------------------------------------------------------------------------------------------------
# Memory runs out. The sizes are those of views that hold one row: no memory is needed to ask for too much.

MANY = 2**44


def wide(*shape: int, device="cpu", dtype=torch.float32) -> Tensor:
    """(MANY, *shape) of one row."""
    return torch.ones(1, *shape, device=device, dtype=dtype).expand(MANY, *shape)


def rope_inputs() -> tuple:
    return (*tables("cpu"), torch.zeros(1, dtype=torch.long).expand(MANY))


TOO_LARGE: dict[str, Callable[[], object]] = {
    "rms_norm": lambda: packops.rms_norm(wide(8), torch.ones(8), eps=1e-6),
    "rms_norm, backward": lambda: OPS._rms_norm_backward(wide(8), wide(8), torch.ones(8), 1e-6, False),
    "gated_activation": lambda: packops.gated_activation(wide(8), wide(8)),
    "gated_activation, backward": lambda: OPS._gated_activation_backward(wide(8), wide(8), wide(8), "silu"),
    "rope": lambda: packops.apply_rope(wide(1, 8), None, *tables("cpu"), position_ids=rope_inputs()[2]),
    "rope, both": lambda: OPS._rope(wide(1, 8), wide(2, 8), *rope_inputs()),
    "qk_norm_rope": lambda: OPS._qk_norm_rope(wide(1, 8), None, torch.ones(8), None, *rope_inputs(), None, 1e-6),
    "packed_metadata": lambda: packops.packed_metadata(bounds(0, MANY), MANY),
    "packed_labels": lambda: OPS.packed_labels(torch.ones(1, dtype=torch.long).expand(MANY), bounds(0, MANY)),
}
TORCHS_WORDS = r"DefaultCPUAllocator: can't allocate memory: you tried to allocate \d+ bytes\. Error code 12"


@pytest.mark.parametrize("name", TOO_LARGE)
def test_too_large_for_the_cpu(name, capfd):
    with pytest.raises(RuntimeError, match=TORCHS_WORDS) as error:
        TOO_LARGE[name]()
    assert type(error.value) is RuntimeError
    assert "packops" not in str(error.value)
    assert ".cpp" not in str(error.value).replace("alloc_cpu.cpp", "")
    assert ".h" not in str(error.value)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert packops.rms_norm(torch.ones(2, 8), torch.ones(8), eps=0.0).shape == (2, 8)  # the next, smaller call works


# In a process whose address space ends a little above what it has: the inputs are real, and one allocation after another fails.
LIMITED = """
import ctypes, resource, sys
import torch, packops
from packops import linear_cross_entropy
torch.set_num_threads(1)
mega = 2**20

def used():
    return int(open("/proc/self/statm").read().split()[0]) * 4096

libc = ctypes.CDLL("libc.so.6")
libc.mallopt(-3, mega)  # M_MMAP_THRESHOLD: what is freed goes back at once
rows, width = 2048, 2048  # 16 MiB in float32
g = torch.Generator().manual_seed(0)
x = torch.randn(rows, width, generator=g)
y = torch.randint(0, width, (rows,), generator=g)
heads = x.view(rows, 16, 128)
cos, sin = torch.ones(rows, 64), torch.zeros(rows, 64)
w, head = torch.ones(width), torch.ones(128)
doc = torch.tensor([0, rows // 2, rows])
leaf = x.clone().requires_grad_()
small = torch.ones(16, width)
strided = torch.randn(rows, 2, width // 2, generator=g).transpose(1, 2)  # rows that must be copied
weight = torch.randn(2048, 512, generator=g).requires_grad_()
hidden = torch.randn(rows, 512, generator=g).requires_grad_()

columns = torch.zeros(rows, width // 2, dtype=torch.long)

def leaf_heads():
    return leaf.view(heads.shape)

cases = {
    "cross_entropy": lambda: packops.cross_entropy(leaf, y).backward(),
    "cross_entropy, none": lambda: packops.cross_entropy(leaf, y, reduction="none").sum().backward(),
    "cross_entropy, strided": lambda: packops.cross_entropy(strided, columns),
    "linear_cross_entropy": lambda: linear_cross_entropy(hidden, weight, y).backward(),
    "linear_cross_entropy, none": lambda: linear_cross_entropy(hidden, weight, y, reduction="none").sum().backward(),
    "rms_norm": lambda: packops.rms_norm(leaf, w, eps=1e-6).sum().backward(),
    "gated_activation": lambda: packops.gated_activation(leaf, leaf).sum().backward(),
    "rope": lambda: packops.apply_rope(leaf_heads(), heads, cos, sin)[0].sum().backward(),
    "qk_norm_rope": lambda: packops.apply_qk_norm_rope(leaf_heads(), heads, head, head, cos, sin, eps=1e-6)[0].sum().backward(),
}

for case, run in cases.items():
    leaf.grad = weight.grad = hidden.grad = None
    run()  # everything that is loaded or kept once
    failures, succeeded = set(), False
    for room in range(0, 400, 8):  # MiB: every allocation of the op is the one that fails, at some room
        leaf.grad = weight.grad = hidden.grad = None
        libc.malloc_trim(0)
        resource.setrlimit(resource.RLIMIT_AS, (used() + room * mega, resource.RLIM_INFINITY))
        try:
            run()
            succeeded = True
            break
        except RuntimeError as error:
            assert type(error) is RuntimeError, (case, type(error))
            assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate" in str(error), (case, str(error))
            failures.add(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert succeeded, (case, "never enough")
    assert failures, (case, "never too little")
    print(case)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_every_allocation_may_fail():
    """Forward and backward in ever more memory, until they pass: every failure on the way is torch's own."""
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 9


def test_accelerate_lowers_the_batch_size():
    accelerate = pytest.importorskip("accelerate")
    tried = []

    def train(batch_size):
        tried.append(batch_size)
        x = torch.ones(1, 8).expand(batch_size, 8)
        return packops.rms_norm(x, torch.ones(8), eps=1e-6)[:1]

    accelerate.utils.find_executable_batch_size(
        train, starting_batch_size=2**42, reduce_batch_size_fn=lambda: tried[-1] // 2**20
    )()
    assert tried == [2**42, 2**22]


def test_a_failed_allocation_keeps_nothing():
    """What went into a copy that failed is released with the caller's tensor."""
    x = torch.ones(2, 8).t().expand(2**42, 8, 2)  # its rows are not contiguous, and there is no memory to copy them
    storage = x.untyped_storage()
    before = torch._C._storage_Use_Count(storage._cdata)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            packops.rms_norm(x, torch.ones(2), eps=0.0)
    assert torch._C._storage_Use_Count(storage._cdata) == before


@gpu
@pytest.mark.parametrize(
    "case",
    [
        "cross_entropy",
        "cross_entropy, none",
        "linear_cross_entropy",
        "rms_norm",
        "gated_activation",
        "rope",
        "qk_norm_rope",
        "attention",
    ],
)
def test_every_allocation_may_fail_on_cuda(case, capfd):
    """As on the CPU: torch.OutOfMemoryError in torch's words, and the next call works."""
    rows, width, device = 16384, 2048, "cuda"  # 64 MiB, more than what is left of other tensors' segments
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    y = torch.randint(0, width, (rows,), device=device)
    leaf = x.clone().requires_grad_()
    heads, head = x.view(rows, 16, 128), torch.ones(128, device=device, dtype=x.dtype)
    cos, sin = torch.ones(rows, 64, device=device), torch.zeros(rows, 64, device=device)
    weight, hidden = torch.randn(32000, 512, device=device, dtype=x.dtype), torch.randn(4096, 512, device=device, dtype=x.dtype)
    weight.requires_grad_(), hidden.requires_grad_()
    documents = torch.tensor([0, 100, rows], device=device)
    cases = {
        "cross_entropy": lambda: packops.cross_entropy(leaf, y).backward(),
        "cross_entropy, none": lambda: packops.cross_entropy(leaf, y, reduction="none").sum().backward(),
        "linear_cross_entropy": lambda: packops.linear_cross_entropy(hidden, weight, y[:4096]).backward(),
        "rms_norm": lambda: packops.rms_norm(leaf, torch.ones(width, device=device, dtype=x.dtype), eps=1e-6).sum().backward(),
        "gated_activation": lambda: packops.gated_activation(leaf, x).sum().backward(),
        "rope": lambda: packops.apply_rope(leaf.view(heads.shape), heads, cos, sin)[0].sum().backward(),
        "qk_norm_rope": lambda: (
            packops.apply_qk_norm_rope(leaf.view(heads.shape), heads, head, head, cos, sin, eps=1e-6)[0].sum().backward()
        ),
        "attention": lambda: packops.attention(leaf.view(heads.shape), heads, heads, documents).sum().backward(),
    }
    run = cases[case]
    run()
    leaf.grad = weight.grad = hidden.grad = None
    total = torch.cuda.get_device_properties(0).total_memory
    capfd.readouterr()
    failures, filled = [], []
    try:
        # What other tests left free between their tensors would serve a whole call, and so would their garbage.
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        for size in (2**26, 2**23, 2**20):
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    filled.append(torch.empty(size, dtype=torch.uint8, device=device))
        for room in range(0, 3000, 8):  # MiB
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room * 2**20) / total)
            try:
                run()
                break
            except torch.OutOfMemoryError as error:
                failures.append(str(error))
            leaf.grad = weight.grad = hidden.grad = None
        else:
            pytest.fail("never enough")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert failures
    assert all(text.startswith("CUDA out of memory. Tried to allocate") for text in failures), failures
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_torch_before_2_13_is_asked_again():
    """There the library hears no reason, only that it failed: torch is asked for the same memory and raises its own error."""
    from packops._errors import error_of

    with pytest.raises(RuntimeError, match=TORCHS_WORDS):
        raise error_of("FailedAllocation", f"cpu {2**47}")
    by_then_enough = error_of("FailedAllocation", "cpu 64")
    assert type(by_then_enough) is RuntimeError
    assert "DefaultCPUAllocator: can't allocate memory" in str(by_then_enough)


# --------------------------------------------------------------------------------------------------------------------------------
# Malformed documents: one wording

Q = torch.randn(8, 2, 8)
WITH_DOCUMENTS: dict[str, Callable[[Tensor], object]] = {
    "cross_entropy": lambda cu: packops.cross_entropy(torch.randn(8, 5), torch.ones(8, dtype=torch.long), cu_seqlens=cu),
    "linear_cross_entropy": lambda cu: packops.linear_cross_entropy(
        torch.randn(8, 4), torch.randn(5, 4), torch.ones(8, dtype=torch.long), cu_seqlens=cu
    ),
    "rope": lambda cu: packops.apply_rope(Q, Q, *tables("cpu"), cu_seqlens=cu),
    "qk_norm_rope": lambda cu: packops.apply_qk_norm_rope(
        Q, Q, torch.ones(8), torch.ones(8), *tables("cpu"), cu_seqlens=cu, eps=1e-6
    ),
    "attention": lambda cu: packops.attention(Q, Q, Q, cu),
    "packed_metadata": lambda cu: packops.packed_metadata(cu, 8),
    "packed_labels": lambda cu: packops.packed_labels(torch.ones(8, dtype=torch.long), cu),
}
MALFORMED = {
    "start": ([1, 8], "[0] = 1"),
    "order": ([0, 5, 3, 8], "[2] = 3"),
    "end": ([0, 9], "[1] = 9"),
    "negative": ([-1, 8], "[0] = -1"),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("op", WITH_DOCUMENTS)
def test_one_wording_for_documents(op, dtype):
    call = WITH_DOCUMENTS[op]
    for values, got in MALFORMED.values():
        with pytest.raises(ValueError) as error:
            call(torch.tensor(values, dtype=dtype))
        assert str(error.value) == (
            f"packops.{op}: cu_seqlens must start at 0, not decrease, and end at or before the number of rows (8), "
            f"got cu_seqlens{got}"
        )
    with pytest.raises(ValueError, match=rf"^packops\.{op}: cu_seqlens must have shape \(documents \+ 1,\), got \(0,\)$"):
        call(torch.zeros(0, dtype=dtype))
    with pytest.raises(ValueError, match=rf"^packops\.{op}: cu_seqlens must have shape \(documents \+ 1,\), got \(1, 2\)$"):
        call(torch.zeros(1, 2, dtype=dtype))
    with pytest.raises(TypeError, match=rf"^packops\.{op}: cu_seqlens must be int32 or int64, got Float$"):
        call(torch.zeros(2))


@pytest.mark.parametrize("op", WITH_DOCUMENTS)
def test_documents_of_any_stride(op):
    torch.manual_seed(0)
    call, cu = WITH_DOCUMENTS[op], torch.tensor([0, 3, 3, 7])
    every_second = torch.full((8,), 99)
    every_second[::2] = cu

    def result(boundaries):
        torch.manual_seed(1)
        return call(boundaries)

    expected, got = result(cu), result(every_second[::2])
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (expected, got)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------------------------------
# Host numbers

X, Y = torch.randn(5, 9), torch.tensor([0, 1, 2, 3, 4])
NUMBERS: dict[str, tuple[Callable[[float], object], str]] = {
    "cross_entropy softcap": (lambda v: packops.cross_entropy(X, Y, softcap=v), "softcap"),
    "cross_entropy logit_scale": (lambda v: packops.cross_entropy(X, Y, logit_scale=v), "logit_scale"),
    "cross_entropy z_loss": (lambda v: packops.cross_entropy(X, Y, z_loss=v), "z_loss"),
    "cross_entropy label_smoothing": (lambda v: packops.cross_entropy(X, Y, label_smoothing=v), "label_smoothing"),
    "cross_entropy op": (lambda v: OPS.cross_entropy(X, Y, softcap=v), "softcap"),
    "cross_entropy backward": (
        lambda v: OPS._cross_entropy_backward(
            torch.ones(()), X, torch.ones(4, 5), torch.ones(1, 5, dtype=torch.int32), softcap=v
        ),
        "softcap",
    ),
    "linear_cross_entropy softcap": (lambda v: packops.linear_cross_entropy(X, torch.randn(7, 9), Y, softcap=v), "softcap"),
    "linear_cross_entropy logit_scale": (
        lambda v: packops.linear_cross_entropy(X, torch.randn(7, 9), Y, logit_scale=v),
        "logit_scale",
    ),
    "attention softcap": (lambda v: packops.attention(Q, Q, Q, bounds(0, 8), softcap=v), "softcap"),
    "attention scale": (lambda v: packops.attention(Q, Q, Q, bounds(0, 8), scale=v), "scale"),
    "rms_norm eps": (lambda v: packops.rms_norm(X, torch.ones(9), eps=v), "eps"),
    "qk_norm_rope eps": (
        lambda v: packops.apply_qk_norm_rope(Q, Q, torch.ones(8), torch.ones(8), *tables("cpu"), eps=v),
        "eps",
    ),
}


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e39, 1e-46, -1.0], ids=str)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_fp32_cannot_hold(name, value):
    call, argument = NUMBERS[name]
    with pytest.raises(ValueError, match=rf"^packops\.\w+: {argument} must "):
        call(value)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_fp32_holds(name):
    NUMBERS[name][0](0.5)


def test_a_scale_over_a_softcap_must_fit_too():
    with pytest.raises(ValueError, match="logit_scale / softcap must be a finite number that float32 can hold, got 1e\\+40"):
        packops.cross_entropy(X, Y, softcap=1e-20, logit_scale=1e20)


EVERY_NUMBER = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]


@pytest.mark.parametrize("dtype", EVERY_NUMBER, ids=str)
def test_num_items_of_every_dtype(dtype, device):
    x, y = X.to(device), Y.to(device)
    count = 1 if dtype == torch.bool else 7
    total = packops.cross_entropy(x, y, reduction="sum")
    for place in {device, torch.device("cpu")}:
        for shape in ((), (1,), (1, 1)):
            num_items = torch.full(shape, count).to(dtype).to(place)
            torch.testing.assert_close(packops.cross_entropy(x, y, num_items=num_items), total / count)


@pytest.mark.parametrize("value", [-1, -0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("reduction", ["mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_num_items_must_be_positive(value, reduction, device):
    x, y = X.to(device), Y.to(device)
    for num_items in (value, torch.tensor(value)):
        with pytest.raises(ValueError, match=r"^packops.cross_entropy: num_items must be positive"):
            packops.cross_entropy(x, y, num_items=num_items, reduction=reduction)
        with pytest.raises(ValueError, match=r"^packops.linear_cross_entropy: num_items must be positive"):
            packops.linear_cross_entropy(x, torch.randn(7, 9, device=device), y, num_items=num_items, reduction=reduction)


def test_num_items_of_zero():
    """Legal where nothing is counted."""
    ignored = torch.full_like(Y, -100)
    leaf = X.clone().requires_grad_()
    for num_items in (0, 0.0, torch.tensor(0), torch.tensor([0.0])):
        with pytest.raises(ValueError, match="num_items must be positive where rows are counted, got 0"):
            packops.cross_entropy(X, Y, num_items=num_items)
        loss = packops.cross_entropy(leaf, ignored, num_items=num_items)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert loss == 0
        assert (grad == 0).all()


@gpu
@pytest.mark.parametrize("value", [0.0, -3.0, float("nan"), float("inf")])
def test_num_items_on_a_device_gives_nan(value):
    """Nobody looks at it without waiting for the device, so it must show in the loss."""
    x, y = X.cuda(), Y.cuda()
    for dtype in (torch.float32, torch.float64, torch.int64):
        if dtype == torch.int64 and value not in (0.0, -3.0):
            continue
        num_items = torch.tensor(value, device="cuda").to(dtype)
        assert packops.cross_entropy(x, y, num_items=num_items).isnan()
        assert packops.cross_entropy(x, torch.full_like(y, -100), num_items=num_items) == 0


# --------------------------------------------------------------------------------------------------------------------------------
# In place


def overlapping(kind: str, rows: int, width: int) -> Tensor:
    """(rows, width) with elements that share memory."""
    if kind == "expand":
        return torch.randn(1, width).expand(rows, width)
    if kind == "unfold":  # rows begin at every second element
        return torch.randn(2 * rows + width).unfold(0, width, 2)[:rows]
    if kind == "one element":  # the last of a row is the first of the next
        return torch.randn(rows * width).as_strided((rows, width), (width - 1, 1))
    return torch.randn(rows + width).as_strided((rows, width), (1, 1))


@pytest.mark.parametrize("kind", ["expand", "unfold", "one element", "as_strided"])
def test_in_place_on_memory_that_overlaps(kind):
    rows, width = 6, 8
    y = torch.arange(rows)
    x = overlapping(kind, rows, width)
    before = x.clone()
    match = "elements that share memory .* so it cannot be overwritten in place"
    with pytest.raises(ValueError, match=match):
        OPS._cross_entropy_forward_(x, y)
    _, _, floats, ints, *_ = OPS._cross_entropy_forward(x.clone(), y)
    with pytest.raises(ValueError, match=match):
        OPS._cross_entropy_backward_(x, torch.ones(()), None, floats, ints, holds_gradient=False)
    with pytest.raises(ValueError, match="packops.rope: q of shape .* " + match):
        OPS.rope_(x.view(rows, 1, width) if kind == "expand" else x[:, None], None, *tables("cpu"))
    with pytest.raises(ValueError, match="packops.rope: k of shape .* " + match):
        packops.apply_rope(torch.randn(rows, 1, width), x[:, None], *tables("cpu"), inplace=True)
    torch.testing.assert_close(x, before, rtol=0, atol=0)  # refused before anything was written


def test_in_place_cross_entropy_under_autograd_refuses_overlaps():
    for kind in ("expand", "unfold", "as_strided"):
        for reduction in ("mean", "none"):
            leaf = torch.randn(40, requires_grad=True)
            x = (leaf * 1).as_strided((6, 8), {"expand": (0, 1), "unfold": (2, 1), "as_strided": (1, 1)}[kind])
            with pytest.raises(ValueError, match="share memory"):
                packops.cross_entropy(x, torch.arange(6), inplace=True, reduction=reduction).sum().backward()


def test_in_place_rope_of_q_and_k_that_share_memory():
    memory = torch.randn(8, 6, 8)
    first, last = (memory.view(-1)[begin : begin + 160].view(20, 1, 8) for begin in (0, 159))
    cases = {
        "the last element of q": (first, last),
        "the last element of k": (last, first),
        "the same": (memory, memory),
        "one head in common": (memory[:, :3], memory[:, 2:]),
        "one token in common": (memory[:5], memory[3:]),
        "shifted by a feature": (memory.view(-1)[:-8].view(47, 1, 8), memory.view(-1)[1:-7].view(47, 1, 8)),
    }
    for name, (q, k) in cases.items():
        with pytest.raises(ValueError, match="q and k share memory"):
            OPS.rope_(q, k, *tables("cpu", rows=64)), name
    fine = {
        "slices of a fused tensor": (memory[:, :4], memory[:, 4:]),
        "halves": (memory[:4], memory[4:]),
        "every second head": (memory[:, ::2], memory[:, 1::2]),
    }
    for name, (q, k) in fine.items():
        wanted = packops.apply_rope(q.clone(), k.clone(), *tables("cpu"))
        before = memory.clone()
        OPS.rope_(q, k, *tables("cpu"))
        for got, want in zip((q, k), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, msg=name)
        memory.copy_(before)


# --------------------------------------------------------------------------------------------------------------------------------
# Layouts that need a copy

LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "(B,V,L).transpose": ((2, 7, 5), lambda t: t.transpose(1, 2)),
    "(V,T).t": ((7, 5), lambda t: t.t()),
    "(B,K,L,V).transpose": ((2, 3, 4, 7), lambda t: t.transpose(1, 2)),
    "(L,B,V).transpose": ((5, 2, 7), lambda t: t.transpose(0, 1)),
    "every second class": ((3, 5, 14), lambda t: t[..., ::2]),
    "sliced vocabulary": ((3, 5, 9), lambda t: t[..., :7]),
    "four dimensions, reversed": ((7, 2, 3, 4), lambda t: t.permute(3, 2, 1, 0)),
    "expanded": ((1, 1, 7), lambda t: t.expand(4, 3, 7)),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_of_any_layout(name, dtype, reduction, device):
    shape, view = LAYOUTS[name]
    torch.manual_seed(0)
    base = torch.randn(shape, dtype=dtype, device=device)
    mine, theirs = base.clone().requires_grad_(), base.float().clone().requires_grad_()
    rows = view(base).shape[:-1]
    labels = torch.randint(0, view(base).shape[-1], rows, device=device)
    loss = packops.cross_entropy(view(mine), labels, reduction=reduction)
    want = torch.nn.functional.cross_entropy(view(theirs).flatten(0, -2), labels.flatten(), reduction=reduction).view(loss.shape)
    torch.testing.assert_close(loss, want)
    weight = torch.rand_like(loss) if reduction == "none" else torch.tensor(3.0, device=device)
    (loss * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(mine.grad.float(), theirs.grad, rtol=2e-3, atol=2e-3 if dtype == torch.float16 else 1e-6)
    with torch.no_grad():
        torch.testing.assert_close(packops.cross_entropy(view(mine), labels, reduction=reduction), want)


@pytest.mark.parametrize("name", LAYOUTS)
def test_fake_gradients_have_the_strides_of_real_ones(name):
    """Compiled code takes them for granted."""
    shape, view = LAYOUTS[name]
    x = view(torch.randn(shape))
    labels = torch.zeros(x.shape[:-1], dtype=torch.long)

    def gradients(x: Tensor, labels: Tensor) -> list[tuple[int, ...]]:
        _, early, floats, ints, *_ = OPS._cross_entropy_forward(x, labels, with_grad=True)
        late = OPS._cross_entropy_backward(x.new_ones(()), x, floats, ints)
        return [early.stride(), late.stride()]

    with FakeTensorMode() as mode:
        fake = gradients(mode.from_tensor(x), mode.from_tensor(labels))
    assert fake == gradients(x, labels)


def every_second(x: Tensor) -> Tensor:
    """The same values with a stride of 2."""
    memory = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1]))
    memory[..., ::2] = x
    return memory[..., ::2]


def test_labels_and_weights_of_any_stride(device):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 9, device=device)
    y = torch.randint(0, 9, (4, 6), device=device)
    w = torch.rand(4, 6, device=device)
    want = packops.cross_entropy(x, y, token_weight=w, shift=True)
    for labels in (every_second(y), y.t().contiguous().t(), y.int().t().contiguous().t()):
        for weight in (every_second(w), w.t().contiguous().t(), w.double()):
            assert packops.cross_entropy(x, labels, token_weight=weight, shift=True) == want
    row = w[:1].expand(4, 6)
    assert packops.cross_entropy(x, y, token_weight=row) == packops.cross_entropy(x, y, token_weight=row.contiguous())
    target, counts = packops.packed_labels(every_second(y.view(-1)), torch.tensor([0, 5, 24], device=device))
    wanted = packops.packed_labels(y.view(-1), torch.tensor([0, 5, 24], device=device))
    assert (target == wanted[0]).all()
    assert (counts == wanted[1]).all()


def test_positions_of_any_stride(device):
    q = torch.randn(6, 2, 8, device=device)
    ids = torch.tensor([3, 1, 4, 1, 5, 9], device=device)
    want, _ = packops.apply_rope(q, None, *tables(device), position_ids=ids)
    got, _ = packops.apply_rope(q, None, *tables(device), position_ids=every_second(ids))
    assert (got == want).all()
    same, _ = packops.apply_rope(q, None, *tables(device), position_ids=ids[:1].expand(6))
    wanted, _ = packops.apply_rope(q, None, *tables(device), position_ids=ids[:1].repeat(6))
    assert (same == wanted).all()


# --------------------------------------------------------------------------------------------------------------------------------
# Other programs


def test_a_library_without_the_python_module_names_the_type():
    """As a C++ program meets it, or torch.ops.load_library: a RuntimeError whose text begins with the type."""
    script = textwrap.dedent("""
        import packops._errors as errors
        try:
            errors.raise_typed(RuntimeError("packops.IndexError: rope: position 9\\nException raised from f"), op="my_op")
        except IndexError as error:
            assert str(error) == "packops.my_op: position 9", error
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


META: dict[str, Callable[[], object]] = {
    "rms_norm": lambda: packops.rms_norm(X, torch.ones(9, device="meta"), eps=1e-6),
    "gated_activation": lambda: packops.gated_activation(X, X.to("meta")),
    "cross_entropy": lambda: packops.cross_entropy(X, Y.to("meta")),
    "cross_entropy, weights": lambda: packops.cross_entropy(X, Y, token_weight=torch.ones(5, device="meta")),
    "cross_entropy, gradient": lambda: packops.cross_entropy(X.clone().requires_grad_(), Y.to("meta")),
    "rope": lambda: packops.apply_rope(Q, Q, *tables("meta")),
    "qk_norm_rope": lambda: packops.apply_qk_norm_rope(Q, Q, torch.ones(8), torch.ones(8), *tables("meta"), eps=1e-6),
    "attention": lambda: packops.attention(Q, Q, Q, bounds(0, 8).to("meta")),
    "attention, op": lambda: OPS.attention(Q, Q, Q, bounds(0, 8).to("meta")),
    "linear_cross_entropy": lambda: packops.linear_cross_entropy(
        X, torch.randn(7, 9), Y, token_weight=torch.ones(5, device="meta")
    ),
    "packed_labels": lambda: packops.packed_labels(Y, bounds(0, 5).to("meta")),
}


@pytest.mark.parametrize("name", META)
def test_meta_tensors_beside_real_ones(name):
    """Torch takes the whole call for one on the meta device: the result would be uninitialised memory."""
    with pytest.raises(ValueError, match=r"^packops\.\w+: .* must be on the device of .*, got the meta device"):
        META[name]()


def test_meta_tensors_alone():
    assert packops.rms_norm(X.to("meta"), torch.ones(9, device="meta"), eps=1e-6).device.type == "meta"
    assert packops.cross_entropy(X.to("meta"), Y.to("meta"), num_items=4).device.type == "meta"
