"""How fast RoPE is: time, bytes per second, and the share of what a plain copy of the same bytes reaches in the same run.

    python bench/rope.py                     # the table: every layout, forward and backward, fused norm, host cost
    python bench/rope.py --sweep             # kernel configurations: heads per thread, threads per block, order of tokens
    python bench/rope.py --peers             # eager, torch.compile and whichever of Liger, Unsloth, flash-attn, QuACK import
    python bench/rope.py --device cpu        # against the eager formula

Method. Variants of one case take turns, launch by launch, and each call works on the next of several buffers that together exceed
the second-level cache. On CUDA a sleeping kernel holds the stream until a group of launches is queued, so that events time the
device and not the host. Figures are medians. Bytes: every head read and written once (in place: the rotated features only), plus
table rows and positions; `copy` is `y.copy_(x)` moving as many bytes as the first case of its line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import packops

NAME = "rope"


@dataclass
class Result:
    case: str
    variant: str
    microseconds: float
    bytes: int
    fraction_of_copy: float = float("nan")
    host_microseconds: float = float("nan")

    @property
    def terabytes_per_second(self) -> float:
        return self.bytes / self.microseconds / 1e6


@dataclass
class Case:
    """One line of the table: callables that take a buffer index, and the bytes a call must move."""

    name: str
    bytes: int
    variants: dict[str, Callable[[int], Any]]
    buffers: int


def timed(case: Case, device: str, rounds: int) -> dict[str, float]:
    """Median microseconds per call of every variant; variants take turns."""
    samples: dict[str, list[float]] = {name: [] for name in case.variants}
    group = case.buffers
    for call in case.variants.values():  # compile, allocate
        for i in range(min(group, 3)):
            call(i)
    for _ in range(rounds):
        for name, call in case.variants.items():
            if device == "cpu":
                begin = time.perf_counter()
                for i in range(group):
                    call(i)
                samples[name].append((time.perf_counter() - begin) / group * 1e6)
                continue
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            torch.cuda._sleep(400_000 + 60_000 * group)
            events[0].record()
            for i in range(group):
                call(i)
            events[1].record()
            torch.cuda.synchronize()
            samples[name].append(events[0].elapsed_time(events[1]) / group * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def host_cost(call: Callable[[int], Any], device: str) -> float:
    """Microseconds the host spends in a call, measured where the device keeps up."""
    for i in range(100):
        call(i)
    best = float("inf")
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for i in range(100):
            call(i)
        best = min(best, time.perf_counter() - begin)
    if device == "cuda":
        torch.cuda.synchronize()
    return best / 100 * 1e6


def buffers_for(bytes_per_call: int, device: str) -> int:
    cache = 128e6 if device == "cuda" else 64e6
    return max(2, min(16, int(2 * cache / bytes_per_call) + 1))


def heads(n: int, shape: tuple, dtype: torch.dtype, device: str, view: Callable = lambda x: x) -> list[torch.Tensor]:
    return [view(torch.randn(shape, device=device, dtype=dtype)) for _ in range(n)]


def documents(tokens: int, length: int, device: str) -> torch.Tensor:
    return torch.arange(0, tokens + 1, length, device=device, dtype=torch.int32)


def rope_cases(device: str, dtype: torch.dtype, quick: bool) -> Iterable[Case]:
    """Ours only: each shape and layout of the contract."""
    raw, raw_ = torch.ops.packops._rope.default, torch.ops.packops._rope_.default
    size = torch.tensor([], dtype=dtype).element_size()

    def case(name, tokens, hq, hk, dim, rotary=None, inplace=False, make=None, variants=None):
        rotary = rotary or dim
        moved = 2 * tokens * (hq + hk) * (rotary if inplace else dim) * size + tokens * (rotary * 4 + 8)
        held = 2 * tokens * (hq + hk) * dim * size
        n = buffers_for(held, device)
        make = make or (lambda h: heads(n, (tokens, h, dim), dtype, device))
        q, k = make(hq), make(hk)
        return Case(name, moved, variants(q, k, n), n)

    def positions(tokens, length):
        return torch.arange(tokens, device=device) % length

    shapes = [(4096, 32, 8, 128), (16384, 32, 8, 128), (16384, 64, 8, 128), (16384, 16, 16, 64), (65536, 32, 8, 128)]
    if device == "cpu":
        shapes = [(4096, 32, 8, 128), (4096, 16, 16, 64)]
    for tokens, hq, hk, dim in shapes[: 2 if quick else None]:
        cos, sin = packops.rope_table(dim, 4096, device=device)
        ids = positions(tokens, 2048)

        def forward_backward(q, k, n, cos=cos, sin=sin, ids=ids):
            return {
                "position_ids": lambda i: raw(q[i % n], k[i % n], cos, sin, ids),
                "transposed": lambda i: raw(q[i % n], k[i % n], cos, sin, ids, transposed=True),
            }

        yield case(f"{tokens} x {hq}/{hk} x {dim}", tokens, hq, hk, dim, variants=forward_backward)
    if quick:
        return

    tokens, hq, hk, dim = (16384, 32, 8, 128) if device == "cuda" else (4096, 32, 8, 128)
    cos, sin = packops.rope_table(dim, tokens, device=device)
    bf_cos, bf_sin = cos.to(torch.bfloat16), sin.to(torch.bfloat16)
    ids, line = positions(tokens, 2048), f"{tokens} x {hq}/{hk} x {dim}"
    few, many = documents(tokens, 4096, device), documents(tokens, 8, device)
    gathered = [torch.cat([t, t], -1)[ids].contiguous() for t in (bf_cos, bf_sin)]
    axes = torch.stack([ids, ids // 2, ids // 3])
    yield case(
        f"{line}, positions",
        tokens,
        hq,
        hk,
        dim,
        variants=lambda q, k, n: {
            "position_ids, bf16 table": lambda i: raw(q[i % n], k[i % n], bf_cos, bf_sin, ids),
            "none": lambda i: raw(q[i % n], k[i % n], cos, sin),
            f"cu_seqlens, {len(few) - 1} documents": lambda i: raw(q[i % n], k[i % n], cos, sin, None, few),
            f"cu_seqlens, {len(many) - 1} documents": lambda i: raw(q[i % n], k[i % n], cos, sin, None, many),
            "per-token bf16 table": lambda i: raw(q[i % n], k[i % n], *gathered, rotary_dim=dim, per_token_table=True),
            "M-RoPE": lambda i: raw(q[i % n], k[i % n], cos, sin, axes, mrope_section=[16, 24, 24]),
            "interleaved": lambda i: raw(q[i % n], k[i % n], cos, sin, ids, interleaved=True),
        },
    )
    batch = 4
    shape = (batch, tokens // batch)
    n = buffers_for(2 * tokens * (hq + hk) * dim * size, device)
    qkv = heads(n, (*shape, hq + 2 * hk, dim), dtype, device)
    position = ids.view(shape)
    yield case(
        f"{line}, bhsd view of bshd",
        tokens,
        hq,
        hk,
        dim,
        make=lambda h: heads(n, (*shape, h, dim), dtype, device, lambda x: x.transpose(1, 2)),
        variants=lambda q, k, n: {"": lambda i: raw(q[i % n], k[i % n], cos, sin, position, layout="bhsd")},
    )
    yield case(
        f"{line}, bhsd contiguous",
        tokens,
        hq,
        hk,
        dim,
        make=lambda h: heads(n, (batch, h, tokens // batch, dim), dtype, device),
        variants=lambda q, k, n: {
            "": lambda i: raw(q[i % n], k[i % n], cos, sin, position, layout="bhsd"),
            "tokens outer": lambda i: raw(q[i % n], k[i % n], cos, sin, position, layout="bhsd", tuning=[2, 256, 0]),
        },
    )
    yield case(
        f"{line}, slices of qkv",
        tokens,
        hq,
        hk,
        dim,
        make=lambda h: [x[:, :, :hq] if h == hq else x[:, :, hq : hq + hk] for x in qkv],
        variants=lambda q, k, n: {
            "": lambda i: raw(q[i % n], k[i % n], cos, sin, position),
        },
    )
    yield case(
        f"{line}, in place",
        tokens,
        hq,
        hk,
        dim,
        inplace=True,
        variants=lambda q, k, n: {"": lambda i: raw_(q[i % n], k[i % n], cos, sin, ids)},
    )
    short = packops.rope_table(64, tokens, device=device)
    yield case(
        f"{tokens} x 16/4 x 256, 64 rotary, in place",
        tokens,
        16,
        4,
        256,
        rotary=64,
        inplace=True,
        variants=lambda q, k, n: {"": lambda i: raw_(q[i % n], k[i % n], *short, ids)},
    )
    yield case(
        f"{tokens} x 16/4 x 256, 64 rotary",
        tokens,
        16,
        4,
        256,
        rotary=64,
        variants=lambda q, k, n: {"": lambda i: raw(q[i % n], k[i % n], *short, ids)},
    )


def norm_cases(device: str, dtype: torch.dtype) -> Iterable[Case]:
    forward, backward = torch.ops.packops._qk_norm_rope.default, torch.ops.packops._qk_norm_rope_backward.default
    size = torch.tensor([], dtype=dtype).element_size()
    tokens = 16384 if device == "cuda" else 4096
    for hq, hk, dim, across in [(32, 8, 128, False), (16, 8, 256, False), (32, 32, 128, True)]:
        cos, sin = packops.rope_table(dim, tokens, device=device)
        ids = torch.arange(tokens, device=device) % 2048
        one = tokens * (hq + hk) * dim * size
        n = buffers_for(2 * one, device)
        q, k, gq, gk = (heads(n, (tokens, h, dim), dtype, device) for h in (hq, hk, hq, hk))
        wq, wk = (torch.ones((h if across else 1) * dim, device=device, dtype=dtype) for h in (hq, hk))
        name = f"norm + rope {tokens} x {hq}/{hk} x {dim}" + (", across heads" if across else "")
        table = tokens * (dim * 4 + 8)

        def fwd(i, q=q, k=k, wq=wq, wk=wk, cos=cos, sin=sin, ids=ids, n=n):
            return forward(q[i % n], k[i % n], wq, wk, cos, sin, ids, None, 1e-6)

        def bwd(i, q=q, k=k, gq=gq, gk=gk, wq=wq, wk=wk, cos=cos, sin=sin, ids=ids, n=n):
            return backward(gq[i % n], gk[i % n], q[i % n], k[i % n], wq, wk, cos, sin, ids, None, 1e-6)

        yield Case(name + ", forward", 2 * one + table, {"": fwd}, n)
        yield Case(name + ", backward", 3 * one + table, {"": bwd}, n)


def sweep_cases(device: str, dtype: torch.dtype) -> Iterable[Case]:
    raw = torch.ops.packops._rope.default
    configurations = [(u, t, 0) for u in (1, 2, 4) for t in (64, 128, 256, 512)]
    for tokens, hq, hk, dim, bhsd in [
        (16384, 32, 8, 128, False),
        (65536, 32, 8, 128, False),
        (4096, 32, 8, 128, False),
        (16384, 16, 16, 64, False),
        (16384, 32, 8, 128, True),
    ]:
        cos, sin = packops.rope_table(dim, 4096, device=device)
        ids = (torch.arange(tokens, device=device) % 2048)[None]
        moved = 4 * tokens * (hq + hk) * dim + tokens * (dim * 4 + 8)
        n = buffers_for(moved, device)
        q, k = (heads(n, (1, h, tokens, dim) if bhsd else (1, tokens, h, dim), dtype, device) for h in (hq, hk))
        layout = "bhsd" if bhsd else "bshd"
        all_configurations = configurations + ([(u, t, 1) for u in (1, 2, 4) for t in (128, 256, 512)] if bhsd else [])
        variants = {
            f"unroll {c[0]}, {c[1]} threads{', tokens inner' if c[2] else ''}": (
                lambda i, c=c, q=q, k=k, cos=cos, sin=sin, ids=ids, n=n, layout=layout: raw(
                    q[i % n], k[i % n], cos, sin, ids, layout=layout, tuning=list(c)
                )
            )
            for c in all_configurations
        }
        yield Case(f"{tokens} x {hq}/{hk} x {dim}{', bhsd contiguous' if bhsd else ''}", moved, variants, n)


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def eager(q, k, cos, sin):
    """Hugging Face's formula, with its gathered table (tokens, rotary_dim)."""
    cos, sin = cos[:, None], sin[:, None]
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def peer_functions(q, k, cos, sin, ids, cu_seqlens, length, device) -> dict[str, Callable[[int], Any]]:
    """Every peer that can be imported, on (tokens, heads, dim) buffers. cos, sin: half-width fp32 tables."""
    dtype, n = q[0].dtype, len(q)
    half_cos, half_sin = cos.to(dtype), sin.to(dtype)
    full_cos, full_sin = (torch.cat([t, t], -1).contiguous() for t in (half_cos, half_sin))
    token_cos, token_sin = full_cos[ids], full_sin[ids]
    found: dict[str, Callable[[int], Any]] = {}
    found["packops"] = lambda i: packops.apply_rope(q[i % n], k[i % n], cos, sin, position_ids=ids)
    found["eager"] = lambda i: eager(q[i % n], k[i % n], token_cos, token_sin)
    compiled = torch.compile(eager, dynamic=False)
    if device == "cuda":
        found["torch.compile"] = lambda i: compiled(q[i % n], k[i % n], token_cos, token_sin)

    def heads_first(x):
        return x[None].transpose(1, 2)

    def liger():
        from liger_kernel.ops.rope import LigerRopeFunction

        return lambda i: LigerRopeFunction.apply(heads_first(q[i % n]), heads_first(k[i % n]), token_cos[None], token_sin[None])

    def unsloth():
        from unsloth.kernels.rope_embedding import fast_rope_embedding

        index = ids.int()
        return lambda i: fast_rope_embedding(heads_first(q[i % n]), heads_first(k[i % n]), full_cos, full_sin, index)

    def flash_attention():
        from flash_attn.layers.rotary import apply_rotary_emb

        options = {"cu_seqlens": cu_seqlens, "max_seqlen": length}
        return lambda i: [apply_rotary_emb(x[i % n], half_cos, half_sin, **options) for x in (q, k)]

    def quack():
        from quack.rotary import apply_rotary_emb

        options = {"cu_seqlens": cu_seqlens, "max_seqlen": length}
        return lambda i: [apply_rotary_emb(x[i % n], half_cos, half_sin, **options) for x in (q, k)]

    for name, make in [
        ("Liger", liger),
        ("Unsloth, indices", unsloth),
        ("flash-attn, varlen", flash_attention),
        ("QuACK, varlen", quack),
    ]:
        if device == "cpu":
            break
        try:
            call = make()
            call(0)
            found[name] = call
        except Exception as error:
            print(f"{name}: not measured ({type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''})")
    return found


def peer_cases(device: str, dtype: torch.dtype) -> Iterable[Case]:
    length = 2048
    shapes = [(4096, 32, 8, 128), (16384, 32, 8, 128), (16384, 64, 8, 128), (16384, 16, 16, 64), (65536, 32, 8, 128)]
    for tokens, hq, hk, dim in shapes if device == "cuda" else shapes[:1]:
        cos, sin = packops.rope_table(dim, 4096, device=device)
        ids, cu_seqlens = torch.arange(tokens, device=device) % length, documents(tokens, length, device)
        size = torch.tensor([], dtype=dtype).element_size()
        moved = 2 * size * tokens * (hq + hk) * dim + tokens * (dim * 4 + 8)
        n = buffers_for(moved, device)
        q, k = (heads(n, (tokens, h, dim), dtype, device) for h in (hq, hk))
        with torch.no_grad():
            yield Case(
                f"peers {tokens} x {hq}/{hk} x {dim}", moved, peer_functions(q, k, cos, sin, ids, cu_seqlens, length, device), n
            )


def run(cases: Iterable[Case], device: str, rounds: int, *, with_host: bool) -> list[Result]:
    results = []
    for case in cases:
        half = case.bytes // 4
        source, target = (torch.empty(case.buffers, half, device=device, dtype=torch.bfloat16) for _ in range(2))
        case.variants = {
            "copy": lambda i, s=source, t=target, n=case.buffers: t[i % n].copy_(s[i % n]),
            **case.variants,
        }
        times = timed(case, device, rounds)
        for name, microseconds in times.items():
            result = Result(case.name, name, microseconds, case.bytes, times["copy"] / microseconds)
            results.append(result)
            print_line(result)
        del source, target, case
        if device == "cuda":
            torch.cuda.empty_cache()
    if with_host:
        results += host_results(device)
    return results


def host_results(device: str) -> list[Result]:
    q, k = (torch.randn(1, h, 64, device=device, dtype=torch.bfloat16) for h in (4, 1))
    cos, sin = packops.rope_table(64, 8, device=device)
    ids = torch.zeros(1, device=device, dtype=torch.int64)
    raw = torch.ops.packops._rope.default
    leaf = q.clone().requires_grad_()
    calls = {
        "raw op": lambda i: raw(q, k, cos, sin, ids),
        "apply_rope, no gradient": lambda i: packops.apply_rope(q, k, cos, sin, position_ids=ids),
        "apply_rope, gradient": torch.enable_grad()(lambda i: packops.apply_rope(leaf, k, cos, sin, position_ids=ids)),
        "apply_rope, in place": lambda i: packops.apply_rope(q, k, cos, sin, position_ids=ids, inplace=True),
        "ops.packops.rope": lambda i: torch.ops.packops.rope(q, k, cos, sin, ids),
    }
    results = []
    for name, call in calls.items():
        cost = host_cost(call, device)
        results.append(Result("host cost of a call", name, cost, 0, host_microseconds=cost))
        print_line(results[-1])
    return results


def print_line(result: Result) -> None:
    share = "" if result.fraction_of_copy != result.fraction_of_copy else f"{result.fraction_of_copy:6.3f}"
    speed = f"{result.terabytes_per_second:6.3f}" if result.bytes else ""
    print(
        f"{result.case:52s} {result.variant:34s} {result.microseconds:9.1f} us {speed:>7s} TB/s {share:>7s} of copy", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sweep", action="store_true", help="kernel configurations instead of the table")
    parser.add_argument("--peers", action="store_true", help="other libraries instead of the table")
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    if arguments.sweep:
        cases = sweep_cases(device, dtype)
    elif arguments.peers:
        cases = peer_cases(device, dtype)
    else:
        cases = itertools.chain(rope_cases(device, dtype, arguments.quick), norm_cases(device, dtype))
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, packops {packops.__version__}, {arguments.dtype}")
    with torch.no_grad():
        results = run(cases, device, arguments.rounds, with_host=not (arguments.sweep or arguments.peers))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"device": name, "torch": torch.__version__, "packops": packops.__version__, "dtype": arguments.dtype}
        arguments.json.write_text(json.dumps({**report, "results": [asdict(r) for r in results]}, indent=1))
    print(f"\n{name}, {arguments.dtype}: us (TB/s, share of copy)")
    for case in dict.fromkeys(r.case for r in results):
        print(case)
        for r in (r for r in results if r.case == case):
            figures = f" ({r.terabytes_per_second:.2f}, {r.fraction_of_copy:.3f})" if r.bytes else ""
            print(f"    {r.variant or 'packops':34s} {r.microseconds:9.1f}{figures}")


if __name__ == "__main__":
    main()
