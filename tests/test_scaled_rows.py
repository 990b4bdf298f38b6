"""Rows times a factor against fp64: every pair of dtypes, rows anywhere, what is left out, added to, overwritten, refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from cuda_streams import capture, no_host_sync
from packops.ops.scaled_rows import scaled_rows_

OPS = torch.ops.packops
gpu = pytest.mark.gpu
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
UNITS = {torch.float64: 2**-52, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def check(rows, columns, dtypes, device, *, gap=0, late=0, factors=None, masked=False, gathered=False, add=False, in_place=False):
    """gap: elements between the rows of x; late: how far into its memory each tensor begins; factors: how many, None: none."""
    dtype, to = dtypes
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    memory = torch.randn(late + (rows + 3) * (columns + gap), device=device).to(dtype)
    x = memory[late:].view(rows + 3, columns + gap)[:, :columns]
    given = {}
    index = torch.arange(rows, device=device)
    if gathered:
        given["index"] = index = torch.randperm(rows + 3, device=device)[:rows]
    elif not in_place:
        x = x[:rows]
    if masked:
        given["target"] = torch.randint(-2, 3, (rows,), dtype=torch.int32, device=device)
        x[index[given["target"] < 0]] = torch.nan
    factor = None if factors is None else torch.randn(factors, dtype=wide, device=device)
    if in_place:
        x = x[:rows]
        out = x
    else:
        out = torch.randn(late + rows * columns, device=device).to(to)[late:].view(rows, columns)
    want = x.double()[index] * (1 if factor is None else factor.double().reshape(-1, 1))
    if masked:
        want = torch.where((given["target"] < 0)[:, None], 0, want)
    if add:
        want = want + out.double()
    made = scaled_rows_(out, x, factor, add=add, **given)
    assert made is out
    assert not want.isnan().any()
    # A sum that cancels is off by the rounding of its terms, in fp32.
    allowed = 0.51 * UNITS[to] * want.abs() + (4e-7 if add else 1e-7) * (to != torch.float64) + 1e-15
    off = (out.double() - want).abs()
    assert (off <= allowed).all(), f"off by {(off - allowed).max().item():.2g} more than rounding"


def pairs_of(device):
    return [*itertools.product(FLOATS, FLOATS), *([(torch.float64, torch.float64)] if device.type == "cpu" else [])]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("columns", [1, 7, 40, 896, 2304, 4100])
def test_every_dtype_and_width(columns, add, device):
    for dtypes in pairs_of(device):
        check(5, columns, dtypes, device, factors=1, add=add)
        check(5, columns, dtypes, device, gap=3, factors=5, add=add)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("factors", [None, 1, 37])
def test_rows_that_do_not_count(factors, gathered, add, device):
    for dtypes in pairs_of(device):
        for columns, gap, late in ((64, 0, 0), (72, 8, 0), (33, 1, 0), (64, 0, 1)):
            check(37, columns, dtypes, device, gap=gap, late=late, factors=factors, masked=True, gathered=gathered, add=add)
        check(37, 64, dtypes, device, factors=factors, gathered=gathered, add=add)


@pytest.mark.parametrize("masked", [False, True])
def test_in_place(masked, device):
    for dtype in FLOATS:
        for factors in (1, 29):
            check(29, 136, (dtype, dtype), device, factors=factors, masked=masked, in_place=True)
    x = torch.randn(3, 8, device=device)
    x[1] = torch.nan
    kept, target = x.clone(), torch.tensor([4, -1, 0], dtype=torch.int32, device=device)
    scaled_rows_(x, x, torch.ones((), device=device), target=target)  # a factor of 1 does not excuse a row that does not count
    assert torch.equal(x, torch.where((target < 0)[:, None], 0, kept))


def test_nothing_to_do(device):
    for shape in ((0, 8), (8, 0), (0,)):
        x = torch.zeros(shape, device=device)
        assert scaled_rows_(x, x, torch.ones((), device=device)) is x
    bias = torch.arange(5.0, device=device)  # one row
    assert torch.equal(scaled_rows_(torch.empty_like(bias), bias, torch.full((), 2.0, device=device)), 2 * bias)


def test_factors_that_are_expanded_arrive_one_by_one(device):
    x, factor = torch.ones(4, 8, device=device), torch.full((1,), 3.0, device=device).expand(4)
    with pytest.raises(ValueError, match="factor must be contiguous"):
        scaled_rows_(torch.empty_like(x), x, factor)
    assert torch.equal(scaled_rows_(torch.empty_like(x), x, factor.contiguous()), 3 * x)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"out": torch.empty(3, 9)}, ValueError, "x must have the rows of out"),
        ({"out": torch.empty(4, 8)}, ValueError, "x must have the rows of out"),
        ({"out": torch.empty(8, 3).t()}, ValueError, "out contiguous"),
        ({"out": torch.empty(3, 8, dtype=torch.float64)}, TypeError, "float64"),
        ({"out": torch.empty(3, 8, dtype=torch.int32)}, TypeError, "out must be float32"),
        ({"factor": torch.ones(2)}, ValueError, "factor must be contiguous, one Float for each of 3 rows"),
        ({"factor": torch.ones((), dtype=torch.bfloat16)}, ValueError, "got BFloat16"),
        ({"index": torch.zeros(3, dtype=torch.int32)}, ValueError, "index must be contiguous, one Long"),
        ({"index": torch.zeros(2, dtype=torch.int64)}, ValueError, "index must be contiguous"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, "target must be contiguous, one Int"),
        ({"target": torch.zeros(6, dtype=torch.int32)[::2]}, ValueError, "target must be contiguous"),
    ],
)
def test_errors(change, error, text):
    given = {"out": torch.empty(3, 8), "x": torch.ones(3, 8), **change}
    with pytest.raises(error, match=text):
        scaled_rows_(**given)


def test_memory_that_is_shared_in_part_is_refused(device):
    memory = torch.ones(4, 8, device=device)
    halves = memory.view(torch.bfloat16).view(-1)
    shared = [(memory[1:], memory[:3]), (memory.view(-1)[:8], memory.view(-1)[4:12]), (halves[:32].view(4, 8), memory)]
    for out, x in (*shared, (halves[32:].view(4, 8), memory), (memory.view(-1)[:16], halves[31:47])):
        with pytest.raises(ValueError, match="share no memory"):
            scaled_rows_(out, x)
    with pytest.raises(ValueError, match="share no memory"):
        scaled_rows_(memory, memory, index=torch.tensor([3, 2, 1, 0], device=device))
    scaled_rows_(memory.view(-1)[:16], halves[32:48])  # side by side


def test_compiled():
    x, factor = torch.randn(5, 8), torch.randn(())
    for op in (lambda x, s: scaled_rows_(torch.empty_like(x), x, s), lambda x, s: scaled_rows_(x.clone(), x, s, add=True)):
        assert torch.equal(torch.compile(op, backend="aot_eager", fullgraph=True)(x, factor), op(x, factor))
    torch.library.opcheck(OPS._scaled_rows_.default, (torch.empty(5, 8), x, factor))


@gpu
def test_no_host_sync_and_graphs():
    x, factor = torch.randn(64, 128, device="cuda"), torch.full((), 2.0, device="cuda")
    out = torch.empty_like(x, dtype=torch.bfloat16)
    with no_host_sync():
        scaled_rows_(out, x, factor)
    graph = capture(lambda: scaled_rows_(out, x, factor))[0]
    x.fill_(3)
    graph.replay()
    assert (out == 6).all()


@gpu
@pytest.mark.large(gib=14)
def test_more_elements_than_32_bits_count():
    x = torch.ones((1 << 31) + 24, dtype=torch.bfloat16, device="cuda")
    x[-1] = 5
    out = scaled_rows_(torch.empty_like(x), x, torch.full((), 2.0, device="cuda"))
    assert (out[-1], out[0]) == (10, 2)
    assert (out[-1000:-1] == 2).all()
    rows = scaled_rows_(torch.zeros(1 << 20, 2048, dtype=torch.bfloat16, device="cuda"), x[: 2048 << 20].view(-1, 2048), add=True)
    assert (rows == 1).all()
