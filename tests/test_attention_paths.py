"""Attention within documents by what torch has: every way against the formula, the choice, and packops.attention around it."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import packops
from packops.ops import attention_paths
from packops.ops.attention_documents import Documents
from packops.ops.attention_paths import Rule


def assert_same(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0)


# ---- the ways to compute it, against the formula ---------------------------------------------------------------------------


def dense(q, k, v, lengths, *, causal=True, window=None, scaling=None, softcap=None):
    """The specification, (T, heads, head_dim) in fp64, with a mask of tokens x tokens."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    token = torch.arange(q.shape[1], device=q.device)
    seen = document[:, None] == document
    if causal:
        seen &= token[:, None] >= token
    if window is not None:
        seen &= token[:, None] - token < window
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def problem(lengths, dtype=torch.float64, device="cpu", heads=(4, 2), head_dim=16, value_dim=None):
    total = sum(lengths)
    shapes = [(heads[0], head_dim), (heads[1], head_dim), (heads[1], value_dim or head_dim)]
    # as a model makes them: heads of one fused projection, not contiguous
    q, k, v = (torch.randn(total, h + 1, d, dtype=dtype, device=device)[:, :h].requires_grad_() for h, d in shapes)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return (q, k, v), Documents(bounds, max(lengths, default=0), total)


def gradients(inputs, output, direction):
    return [output.detach(), *torch.autograd.grad(output, inputs, direction)]


OPTIONS = [
    {},
    {"window": 6},
    {"window": 130},
    {"softcap": 0.7, "scaling": 0.5},
    {"softcap": 0.7, "window": 6},
    {"causal": False},
]
PATTERNS = {"long": [300, 5, 129, 257], "short": [3, 1, 9, 2, 7, 4, 4, 1, 1, 5, 13, 2], "even": [64] * 4, "one": [1]}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("grouped", [False, True], ids=["each", "grouped"])
def test_sdpa(lengths, options, grouped, monkeypatch):
    monkeypatch.setattr(attention_paths, "CALL_PER_DOCUMENT", 10**9 if grouped else 0)
    monkeypatch.setattr(attention_paths, "SCORE_ROWS", 100)
    inputs, documents = problem(lengths, value_dim=8)
    direction = torch.randn(sum(lengths), 4, 8, dtype=torch.float64)
    found = gradients(inputs, attention_paths.attend_sdpa(*inputs, documents, Rule(**options)), direction)
    assert_same(found, gradients(inputs, dense(*inputs, lengths, **options), direction), 1e-12)


def test_groups_hold_every_token_once_and_waste_little():
    lengths = [1, 700, 3, 650, 80, 4, 76, 90, 5, 5, 300]
    _, documents = problem(lengths)
    grids, place = documents.groups
    assert torch.cat([rows for rows, _ in grids])[place].tolist() == [*range(sum(lengths))]
    assert len(grids) == 4
    assert sum(len(rows) for rows, _ in grids) < 1.2 * sum(lengths)


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("causal", True)], ids=str)
@pytest.mark.parametrize("lengths", [PATTERNS["long"], [127, 1, 129]], ids=str)
def test_flex(lengths, options):
    inputs, documents = problem(lengths, torch.float32)
    inputs = [x.detach() for x in inputs]  # on the CPU, FlexAttention has no backward
    found = attention_paths.attend_flex(*inputs, documents, Rule(**options))
    assert_same([found], [dense(*inputs, lengths, **options)], 1e-5)


@pytest.mark.parametrize("window", [None, 1, 6, 128, 200])
@pytest.mark.parametrize("lengths", [*PATTERNS.values(), [128, 128, 256], [127, 1, 129, 640]], ids=str)
def test_blocks_are_exactly_those_with_something_to_see(lengths, window):
    _, documents = problem(lengths)
    total = sum(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    token = torch.arange(total)
    seen = (document[:, None] == document) & (token[:, None] >= token)
    if window is not None:
        seen &= token[:, None] - token < window
    blocks = -(-total // 128)
    mask = documents.block_mask(window)
    assert documents.block_mask(window) is mask

    def listed(count, indices):
        found = torch.zeros(blocks, blocks, dtype=torch.bool)
        for row in range(blocks):
            found[row, indices[0, 0, row, : count[0, 0, row]].long()] = True
        return found

    some, whole = (torch.zeros(blocks, blocks, dtype=torch.bool) for _ in range(2))
    for i, j in itertools.product(range(blocks), repeat=2):
        part = seen[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        some[i, j], whole[i, j] = part.any(), part.all()
    found_whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(listed(mask.kv_num_blocks, mask.kv_indices) | found_whole, some)
    assert not (found_whole & ~whole).any()
    if window is None:
        assert torch.equal(found_whole, whole & ~torch.eye(blocks, dtype=torch.bool))


def signature_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    return fake_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, (-1, 0) if is_causal else (-1, -1), None)


def signature_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    return fake_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size, scale)


def signature_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa or query.shape[1] == key.shape[1]
    return fake_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size, scale)


def fake_varlen(q, k, v, cu_q, cu_k, max_q, max_k, window_size, scale):
    """What FlashAttention documents: a query sees ``window_size`` = (left, right) keys on its sides, -1 without end."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    lengths = cu_q.diff().tolist()
    assert max_q == max_k == max(lengths)
    left, right = window_size
    assert right in (-1, 0)
    return dense(q, k, v, lengths, causal=right == 0, window=None if left < 0 else left + 1, scaling=scale)


@pytest.mark.parametrize("signature", [signature_2_10, signature_2_11, signature_2_13])
@pytest.mark.parametrize("options", [{}, {"window": 6}, {"scaling": 0.3}, {"causal": False}], ids=str)
def test_varlen_is_called_as_this_torch_wants_it(signature, options, monkeypatch):
    monkeypatch.setattr(attention_paths, "has_cuda", False)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", signature)
    attention_paths.varlen_parameters.cache_clear()
    try:
        path = attention_paths.choose_path(
            torch.device("cuda"), torch.bfloat16, Rule(**options), heads=4, head_dims=(16, 16), total=40, count=3,
            longest=19, capability=(9, 0),
        )  # fmt: skip
        assert path == ("sdpa" if signature is signature_2_10 and options.keys() & {"window", "scaling"} else "varlen")
        if path == "varlen":
            inputs, documents = problem([7, 1, 19, 13])
            found = attention_paths.attend_varlen(*inputs, documents, Rule(**options))
            assert_same([found], [dense(*inputs, [7, 1, 19, 13], **options)], 1e-12)
    finally:
        attention_paths.varlen_parameters.cache_clear()


def test_choice_of_path(monkeypatch):
    monkeypatch.setattr(attention_paths, "has_cuda", True)
    everything = frozenset(["cu_seq_q", "window_size", "scale"])
    usual = {
        "heads": 8,
        "head_dims": (64, 64),
        "total": 4096,
        "count": 9,
        "longest": 3000,
        "parameters": everything,
        "capability": (9, 0),
    }

    def path(device="cuda", dtype=torch.bfloat16, **changes):
        rule = Rule(**{name: changes.pop(name) for name in ("window", "scaling", "softcap", "dropout") if name in changes})
        return attention_paths.choose_path(torch.device(device), dtype, rule, **{**usual, **changes})

    own = [
        {}, {"dtype": torch.float16}, {"window": 100}, {"scaling": 0.1}, {"softcap": 30.0}, {"head_dims": (256, 256)},
        {"parameters": frozenset()}, {"capability": (8, 0), "longest": 500}, {"capability": (8, 0), "softcap": 30.0},
        {"heads": 64, "head_dims": (128, 128), "total": 32768, "count": 1800},
        {"capability": (8, 0), "longest": 500, "head_dims": (80, 80)},
        *({"head_dims": (dim, dim)} for dim in (8, 80, 96, 192, 248)),
    ]  # fmt: skip
    assert [path(**changes) for changes in own] == ["packops"] * len(own)
    assert path(capability=(8, 0)) == path(capability=(10, 0)) == "varlen"
    assert {path(capability=(8, 0), longest=500, head_dims=(dim, dim)) for dim in (136, 192, 256)} == {"varlen"}
    assert path(softcap=30.0, dtype=torch.float32) == path(softcap=30.0, head_dims=(192, 128)) == "flex"
    slow = {"capability": (8, 0), "head_dims": (96, 96)}
    others = [
        {"device": "cpu"}, {"device": "cpu", "softcap": 30.0}, {"dtype": torch.float32}, {"capability": (7, 5)},
        {"head_dims": (192, 128)}, {"head_dims": (288, 288)}, {"head_dims": (60, 60)}, {"dropout": 0.1},
        {"dropout": 0.1, "softcap": 30.0}, {**slow, "parameters": frozenset()},
        {**slow, "parameters": frozenset(["cu_seq_q"]), "window": 9},
        {**slow, "heads": 64, "total": 32768, "count": 3600},  # past 2^31 in FlashAttention-2's backward
    ]  # fmt: skip
    assert [path(**changes) for changes in others] == ["sdpa"] * len(others)
    monkeypatch.setattr(attention_paths, "has_cuda", False)
    assert path() == path(head_dims=(96, 96)) == "varlen"
    assert path(softcap=30.0) == "flex"


FLEX = [(torch.float32, (8, 2), 64), (torch.bfloat16, (4, 4), 32)]  # each is compiled, which takes half a minute


@pytest.mark.gpu
@pytest.mark.parametrize("options", [o for o in OPTIONS if o != {"softcap": 0.7, "window": 6}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 32])
def test_on_a_gpu(dtype, options, heads, head_dim, monkeypatch):
    """Whichever path is chosen there, forward and backward, no worse than a few roundings of its dtype. 32 features: in a build
    without kernels."""
    monkeypatch.setattr(attention_paths, "has_cuda", head_dim == 64)
    torch.compiler.reset()  # a process compiles one function a limited number of times; these tests together want more
    device, lengths = torch.device("cuda"), [300, 5, 129, 1, 257]
    inputs, documents = problem(lengths, dtype, device, heads, head_dim)
    direction = torch.randn(sum(lengths), heads[0], head_dim, device=device, dtype=dtype)
    path = attention_paths.choose_path(
        device,
        dtype,
        Rule(**options),
        heads=heads[0],
        head_dims=(head_dim,) * 2,
        total=documents.total,
        count=len(lengths),
        longest=300,
    )
    if dtype == torch.bfloat16 and head_dim == 64:
        assert path == "packops"
        return  # test_attention.py
    else:
        assert path == ("flex" if "softcap" in options else "varlen" if dtype == torch.bfloat16 else "sdpa")
    if path == "flex" and (dtype, heads, head_dim) not in FLEX:
        return
    found = gradients(inputs, attention_paths.ATTEND[path](*inputs, documents, Rule(**options)), direction)
    expected = gradients(inputs, dense(*inputs, lengths, **options), direction.double())
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).abs().max() <= (2**-6 if dtype == torch.bfloat16 else 1e-4) * b.abs().max()


# ---- packops.attention, where its kernel does not take the heads -----------------------------------------------------------

FOREST = ([4, 3, 0, 5, 2, 6], [-1, 0, 1, 0, -1, 4])  # lengths of segments, and what each continues


def padded(lengths, padding=3, **options):
    """The problem with padding that holds NaN in its tensors."""
    inputs, documents = problem([*lengths, padding], **options)
    with torch.no_grad():
        for x in inputs:
            x[sum(lengths) :] = torch.nan
    return inputs, documents.cu_seqlens[:-1]


def in_a_graph(monkeypatch):
    monkeypatch.setattr(attention_paths, "in_graph", lambda cu_seqlens: True)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("options", [*OPTIONS, {"softcap": 0.7, "causal": False}], ids=str)
def test_torch_instead(options, graph, monkeypatch):
    """With padding that holds NaN, and values of another size, on both sides of a stretch of queries."""
    monkeypatch.setattr(attention_paths, "SCORE_ROWS", 50)
    if graph:
        in_a_graph(monkeypatch)
    lengths = [30, 1, 0, 75, 12]
    inputs, bounds = padded(lengths, value_dim=24)
    direction = torch.randn(121, 4, 24, dtype=torch.float64)
    output = attention_paths.attend(*inputs, bounds, None, Rule(**options))
    assert output.is_contiguous()
    found = gradients(inputs, output, direction)
    real = [x.detach()[:118].requires_grad_() for x in inputs]
    expected = gradients(real, dense(*real, [n for n in lengths if n], **options), direction[:118])
    assert_same([x[:118] for x in found], expected, 1e-12)
    assert all(x[118:].eq(0).all() for x in found)


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 0.7, "scaling": 0.5}, {"softcap": 0.7, "window": 5}], ids=str)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_torch_instead_with_shared_prefixes(options, graph, monkeypatch):
    monkeypatch.setattr(attention_paths, "SCORE_ROWS", 7)
    if graph:
        in_a_graph(monkeypatch)
    inputs, bounds = padded(FOREST[0])
    parents, direction = torch.tensor(FOREST[1]), torch.randn(23, 4, 16, dtype=torch.float64)
    found = gradients(inputs, attention_paths.attend(*inputs, bounds, parents, Rule(**options)), direction)
    names = {"scaling": "scale"}
    options = {names.get(name, name): value for name, value in options.items()}
    expected = gradients(inputs, packops.attention(*inputs, bounds, parents, **options), direction)
    assert_same(found, expected, 1e-12)
    assert all(x[20:].eq(0).all() for x in found)


@pytest.mark.parametrize(
    "graph, options",
    [
        *itertools.product(("eager", "graph"), ({}, {"window": 4}, {"softcap": 0.7}, {"causal": False})),
        ("compiled", {}),
        ("compiled", {"softcap": 0.7, "window": 4}),
    ],
    ids=str,
)
@pytest.mark.parametrize("bad", ["q", "k", "v", "direction"])
@pytest.mark.parametrize("share", [False, True], ids=["documents", "segments"])
def test_nan_stays_in_its_document(share, bad, graph, options, monkeypatch):
    """In a graph scores of all tokens are computed: what is not seen must not count, in either direction."""
    if share and options.get("causal") is False:
        pytest.skip("segments are causal")
    monkeypatch.setattr(attention_paths, "SCORE_ROWS", 7)
    if graph != "eager":
        in_a_graph(monkeypatch)
    lengths = FOREST[0]
    inputs, documents = problem([*lengths, 2])
    bounds = documents.cu_seqlens[:-1]
    parents = torch.tensor(FOREST[1]) if share else None
    direction = torch.randn(22, 4, 16, dtype=torch.float64)

    def results(spoilt, value):
        values = {"q": inputs[0], "k": inputs[1], "v": inputs[2], "direction": direction}
        values = {name: x.detach().clone() for name, x in values.items()}
        values[bad][int(bounds[spoilt]) + 1, 0, 3] = value
        leaves = [values[name].requires_grad_() for name in "qkv"]
        attend = attention_paths.attend
        if graph == "compiled":
            attend = torch.compile(attend, backend="aot_eager", fullgraph=True)
        return gradients(leaves, attend(*leaves, bounds, parents, Rule(**options)), values["direction"])

    # A segment, those that see it, and those that it sees, whose keys and values have a gradient of it.
    for spoilt, sees, seen in ((3, set(), {0}), (4, {5}, set())):
        want = results(spoilt, 0.5)
        for value in (torch.nan, torch.inf):
            got = results(spoilt, value)
            for segment in set(range(6)) - {spoilt}:
                rows = slice(int(bounds[segment]), int(bounds[segment + 1]))
                for at, (x, y) in enumerate(zip(got, want, strict=True)):
                    if not share or (segment not in sees and (segment not in seen or at < 2)):
                        torch.testing.assert_close(x[rows], y[rows], rtol=1e-12, atol=1e-12)
            token = int(bounds[spoilt]) + 1
            if graph != "eager":  # torch's kernels give some such rows a finite result
                assert not got[2 if bad == "direction" else 0][token].isfinite().all()
            assert all(x[20:].eq(0).all() for x in got)


def test_the_forest_is_that_of_both_tensors_as_they_are_now():
    (q, k, v), bounds = padded(FOREST[0])
    parents = torch.tensor(FOREST[1])
    others = bounds.clone()
    others[1] += 1
    alone = torch.full_like(parents, -1)
    for boundaries, above in ((bounds, parents), (others, parents), (bounds, alone), (bounds, parents)):
        out = attention_paths.attend(q, k, v, boundaries, above, Rule())
        torch.testing.assert_close(out, packops.attention(q, k, v, boundaries, above), rtol=1e-12, atol=1e-12)
    parents.fill_(-1)
    torch.testing.assert_close(
        attention_paths.attend(q, k, v, bounds, parents, Rule()), packops.attention(q, k, v, bounds, alone)
    )
    parents.fill_(7)
    with pytest.raises(ValueError, match="parents must be -1 or, depth first"):
        attention_paths.attend(q, k, v, bounds, parents, Rule())


@pytest.mark.parametrize("path", ["varlen", "flex", "sdpa"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_every_path_leaves_the_padding_alone(path, graph, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", signature_2_13 if not graph else wider)
    attention_paths.varlen_parameters.cache_clear()
    monkeypatch.setattr(attention_paths, "choose_path", lambda *given, **options: path)
    if graph:
        in_a_graph(monkeypatch)
    try:
        (q, k, v), bounds = padded([7, 1, 19], dtype=torch.float32)
        found = attention_paths.attend(q.detach(), k.detach(), v.detach(), bounds, None, Rule(window=6))
    finally:
        attention_paths.varlen_parameters.cache_clear()
    assert_same([found[:27]], [dense(q[:27], k[:27], v[:27], [7, 1, 19], window=6)], 1e-5)
    assert found[27:].eq(0).all()


def wider(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """In a graph nobody knows the longest document; all tokens are as many as it can have."""
    assert max_q == max_k == query.shape[0]
    return fake_varlen(query, key, value, cu_seq_q, cu_seq_k, *[int(cu_seq_q.diff().max())] * 2, window_size, scale)


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("parents", [False, True])
def test_no_documents(lengths, padding, parents):
    inputs, bounds = padded(lengths, padding)
    tree = torch.full((len(lengths),), -1) if parents else None
    found = attention_paths.attend(*inputs, bounds, tree, Rule())
    assert found.shape == (padding, 4, 16)
    assert all(x.eq(0).all() for x in gradients(inputs, found, torch.ones_like(found)))


def test_boundaries_are_read_once_and_again_when_they_change(monkeypatch):
    calls, original = [], attention_paths.read_documents
    monkeypatch.setattr(attention_paths, "read_documents", lambda *given: calls.append(0) or original(*given))
    (q, k, v), bounds = padded([5, 6], padding=0)
    first = attention_paths.attend(q, k, v, bounds, None, Rule())
    assert torch.equal(attention_paths.attend(q, k, v, bounds, None, Rule()), first)
    assert len(calls) == 1
    bounds[1] = 3
    assert_same([attention_paths.attend(q, k, v, bounds, None, Rule())], [dense(q, k, v, [3, 8])], 1e-12)
    with torch.inference_mode():  # whose tensors do not say that they change
        bounds = torch.tensor([0, 5, 11])
        attention_paths.attend(q, k, v, bounds, None, Rule())
        bounds[1] = 3
        assert_same([attention_paths.attend(q, k, v, bounds, None, Rule())], [dense(q, k, v, [3, 8])], 1e-12)


BAD = {
    r"q must have shape": lambda q, k, v, b: (q[0], k, v, b, None, Rule()),
    r"k must have the shape of q except for heads.*\(11, 4, 16\), got \(11, 3, 16\)": lambda q, k, v, b: (
        q, torch.cat([k, k[:, :1]], 1), v, b, None, Rule()
    ),
    r"v must have the tokens and heads of k": lambda q, k, v, b: (q, k, v[:, :1], b, None, Rule()),
    r"q must be float32, .*got torch.int64": lambda q, k, v, b: (q.long(), k.long(), v.long(), b, None, Rule()),
    r"v must have the dtype of q, torch.float64, got torch.float32": lambda q, k, v, b: (q, k, v.float(), b, None, Rule()),
    r"k must be on the device of q, cpu, got meta": lambda q, k, v, b: (q, k.to("meta"), v, b, None, Rule()),
    r"cu_seqlens must be on the device": lambda q, k, v, b: (q, k, v, b.to("meta"), None, Rule()),
    r"cu_seqlens must be int32 or int64, got torch.float32": lambda q, k, v, b: (q, k, v, b.float(), None, Rule()),
    r"cu_seqlens must have shape \(documents \+ 1,\), got \(0,\)": lambda q, k, v, b: (q, k, v, b[:0], None, Rule()),
    r"parents must have shape \(2,\), got \(3,\)": lambda q, k, v, b: (q, k, v, b, b, Rule()),
    r"parents needs causal": lambda q, k, v, b: (q, k, v, b, b[:2], Rule(causal=False)),
    r"window must be at least 1": lambda q, k, v, b: (q, k, v, b, None, Rule(window=0)),
    r"window .*needs causal": lambda q, k, v, b: (q, k, v, b, None, Rule(window=4, causal=False)),
    r"softcap must be positive": lambda q, k, v, b: (q, k, v, b, None, Rule(softcap=0.0)),
    r"scale must be positive and finite, got nan": lambda q, k, v, b: (q, k, v, b, None, Rule(scaling=float("nan"))),
    r"scale must be positive and finite, got 1e\+60": lambda q, k, v, b: (q, k, v, b, None, Rule(scaling=1e60)),
    r"cu_seqlens must rise from 0 to at most the 11 tokens of q, got \[1, 6, 12\]": lambda q, k, v, b: (
        q, k, v, b + 1, None, Rule()
    ),
    r"cu_seqlens must rise from 0 .*\[0, 9, 5\]": lambda q, k, v, b: (
        q, k, v, torch.tensor([0, 9, 5]), None, Rule()
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_refused_without_a_kernel_too(message):
    (q, k, v), bounds = padded([5, 6], padding=0)
    with pytest.raises((TypeError, ValueError), match="packops.attention: " + message):
        attention_paths.attend(*BAD[message](q, k, v, bounds))


def on_cuda(heads=(4, 2), dims=(64, 64), dtype=torch.bfloat16):
    """Fake tensors of a GPU that is not there."""
    with FakeTensorMode():
        shapes = [(11, heads[0], dims[0]), (11, heads[1], dims[0]), (11, heads[1], dims[1])]
        q, k, v = (torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes)
        return q, k, v, torch.empty(3, dtype=torch.int32, device="cuda")


@contextlib.contextmanager
def autocast_to_bf16(enabled):
    """``torch.autocast`` does nothing where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(attention_paths, "has_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def test_path_by_name(a_gpu, monkeypatch):
    def path(*, parents=False, autocast=False, **rule):
        given = {name: rule.pop(name) for name in ("dims", "dtype") if name in rule}
        q, k, v, bounds = on_cuda(**given)
        with q.fake_mode, autocast_to_bf16(autocast):
            tree = torch.empty(2, dtype=torch.int32, device="cuda") if parents else None
            return packops.attention_path(q, k, v, bounds, tree, **rule)

    fp32 = torch.float32
    for dim in (8, 64, 80, 96, 128, 192, 256):
        assert path(dims=(dim, dim)) == path(dims=(dim, dim), dtype=fp32, autocast=True) == "packops"
        assert path(dims=(dim, dim), parents=True, softcap=3.0) == path(dims=(dim, dim), causal=False) == "packops"
    assert path(window=4) == path(causal=False, softcap=3.0) == "packops"
    for dims in ((84, 84), (12, 12), (257, 257), (264, 264)):
        assert path(dims=dims, parents=True) == path(dims=dims, dtype=fp32, autocast=True) == "masked"
    assert path(dims=(84, 84), softcap=3.0) == path(dtype=fp32, softcap=3.0) == path(dims=(192, 128), softcap=3.0) == "flex"
    # fake tensors say nothing to the host: else these are "sdpa"
    others = [
        {"dtype": fp32}, {"dims": (192, 128)}, {"dims": (60, 60)}, {"dtype": torch.float64},
        {"dtype": torch.float64, "softcap": 3.0},
        {"dtype": fp32, "softcap": 3.0, "causal": False}, {"dims": (12, 12), "softcap": 3.0},
        {"dims": (288, 288), "softcap": 3.0},
    ]  # fmt: skip
    assert [path(**rule) for rule in others] == ["masked"] * len(others)
    monkeypatch.setattr(attention_paths, "has_cuda", False)
    assert path() == path(dims=(80, 80), dtype=fp32, autocast=True) == path(dims=(8, 8), causal=False) == "varlen"


def test_a_gpu_without_the_kernels_instructions_takes_what_torch_has(a_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    attention_paths.runs_kernels.cache_clear()
    try:
        q, k, v, bounds = on_cuda(dims=(64, 64), dtype=torch.float16)
        with q.fake_mode:
            assert packops.attention_path(q, k, v, bounds) == "masked"
    finally:
        attention_paths.runs_kernels.cache_clear()


def test_path_on_the_cpu_and_what_it_refuses(a_gpu):
    (q, k, v), bounds = problem([5, 6], head_dim=80)
    assert packops.attention_path(q, k, v, bounds.cu_seqlens) == "packops"
    with pytest.raises(TypeError, match="q must be a tensor, got a list"):
        packops.attention_path([1.0], k, v, bounds.cu_seqlens)
    q, k, v, bounds = on_cuda(dims=(84, 84))
    with pytest.raises(TypeError, match="v must be a tensor, got None"):
        packops.attention_path(q, k, None, bounds)
    with pytest.raises(TypeError, match="causal must be a bool, got an int, 1"):
        packops.attention(q, k, v, bounds, causal=1)
    with pytest.raises(ValueError, match="window must be at least 1"), q.fake_mode:
        packops.attention_path(q, k, v, bounds, window=0)


def test_attention_takes_the_path(a_gpu, monkeypatch):
    """And the kernel where that takes the heads, which for fake tensors is its fake kernel."""
    taken = []

    def attend(q, k, v, bounds, parents, rule):
        assert rule == Rule(True, 4, 3.0, 0.5)
        taken.append(q.dtype)
        return q.new_empty(*q.shape[:2], v.shape[2])

    monkeypatch.setattr(attention_paths, "attend", attend)
    for given, autocast, expected in (
        ({"dims": (96, 80)}, False, torch.bfloat16),
        ({"dtype": torch.float32}, False, torch.float32),
        ({"dtype": torch.float32, "dims": (84, 84)}, True, torch.bfloat16),
        ({"dtype": torch.float32, "dims": (80, 80)}, True, None),
        ({}, False, None),
        ({"dtype": torch.float32}, True, None),
    ):
        q, k, v, bounds = on_cuda(**given)
        with q.fake_mode, autocast_to_bf16(autocast):
            output = packops.attention(q, k, v, bounds, window=4, softcap=3.0, scale=0.5)
        assert output.shape == (11, 4, v.shape[2])
        assert output.dtype == (torch.bfloat16 if autocast else q.dtype)
        assert taken == ([] if expected is None else [expected])
        taken.clear()


def test_compiles_in_one_graph_where_nobody_reads_boundaries():
    (q, k, v), bounds = padded([7, 1, 19])
    compiled = torch.compile(
        lambda *given: attention_paths.attend(*given, None, Rule(window=6)), fullgraph=True, backend="aot_eager"
    )
    direction = torch.randn(30, 4, 16, dtype=torch.float64)
    found = gradients((q, k, v), compiled(q, k, v, bounds), direction)
    expected = gradients((q, k, v), attention_paths.attend(q, k, v, bounds, None, Rule(window=6)), direction)
    assert_same(found, expected, 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        "fp32", "fp64", "84", "264", "192, values 128",
        "fp32, softcap", "192, values 128, softcap", "fp32, tree", "192, values 128, tree",
    ],
)  # fmt: skip
def test_heads_without_a_kernel(case):
    torch.compiler.reset()
    dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(case[:4], torch.bfloat16)
    sizes = [int(word) for word in case.replace(",", "").split() if word.isdigit()] or [64]
    inputs, bounds = padded(FOREST[0], dtype=dtype, device="cuda", head_dim=sizes[0], value_dim=sizes[-1])
    direction = torch.randn(23, 4, sizes[-1], device="cuda", dtype=dtype)
    parents = torch.tensor(FOREST[1]) if "tree" in case else None
    rule = {"softcap": 3.0 if "softcap" in case else None, "window": 4}
    on_device = None if parents is None else parents.cuda()
    assert packops.attention_path(*inputs, bounds, on_device, **rule) != "packops"
    found = gradients(inputs, packops.attention(*inputs, bounds, on_device, **rule), direction)
    host = [x.detach().cpu().double().requires_grad_() for x in inputs]
    expected = gradients(host, attention_paths.attend(*host, bounds.cpu(), parents, Rule(softcap=rule["softcap"], window=4)),
                         direction.cpu().double())  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        assert (a.cpu().double() - b).abs().max() <= (2**-6 if dtype == torch.bfloat16 else 1e-4) * b.abs().max()
