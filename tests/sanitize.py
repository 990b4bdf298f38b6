"""Runs every CUDA kernel on small, nasty inputs under NVIDIA's compute-sanitizer, and puts the result into the GPU record.

    python tests/sanitize.py                    all tools
    python tests/sanitize.py memcheck           one tool; the record keeps what the others said of these sources
    python tests/sanitize.py --only rope        these cases alone
    python tests/sanitize.py --cases            the cases without a sanitizer (it then needs a GPU, but no sanitizer)
    python tests/sanitize.py --warm-up          the same in many processes: the driver compiles all PTX and keeps the results

memcheck: accesses out of bounds. racecheck: shared-memory races. synccheck: divergent barriers. initcheck: reads of memory that
nobody wrote. The allocator's cache is off, because inside its big blocks an overrun looks legal. Each tool must find the errors
that are planted for it (``sanitizer.py``): one that cannot on this machine has nothing to say about the kernels.

Under each tool the cases are dealt to several processes, each with a time limit. The record is written after each of them, so a
run that is cut short leaves what it has seen, and says what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gpu_record
import packops
from gpu_record import TOOLS
from packops.ops.lm_head import Product
from packops.ops.scaled_rows import scaled_rows_
from sanitizer import PLANTED, TOOL, compile_planted, findings, found_planted, read_log, run_planted, run_sanitizer

Case = Callable[[torch.device], Iterator[str]]
CASES: list[Case] = []


def cases(function: Case) -> Case:
    """Registers a generator that runs one small case after the other and yields the name of each."""
    CASES.append(function)
    return function


# --------------------------------------------------------------------------------------------------------------------------------
# Cases: small, but with odd sizes, rows that are not 16-byte aligned, and labels, positions and boundaries out of range. They run
# on the CPU too (tests/test_sanitize.py), where bad ids are errors.

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@contextlib.contextmanager
def bad_ids(device: torch.device) -> Iterator[None]:
    """CUDA has to survive ids out of range; the CPU refuses them."""
    try:
        yield
    except (IndexError, ValueError):
        if device.type == "cuda":
            raise
    else:
        if device.type == "cpu":
            raise AssertionError("the CPU took ids out of range")


def backward(loss: Tensor, *inputs: Tensor) -> None:
    """With an expanded gradient, as sum() gives it."""
    torch.autograd.grad(loss, inputs, torch.ones((), dtype=loss.dtype, device=loss.device).expand(loss.shape))


def loss_problem(device: torch.device, dtype: torch.dtype, rows: int, vocab: int, offset: int = 0, gap: int = 0):
    """Logits whose rows lie ``gap`` elements apart in a buffer that begins ``offset`` elements late, and labels."""
    buffer = torch.randn(offset + rows * (vocab + gap), device=device).to(dtype)
    logits = buffer[offset:].view(rows, vocab + gap)[:, :vocab].requires_grad_()
    labels = torch.randint(0, vocab, (rows,), device=device)
    labels[rows // 2] = -100
    return logits, labels


@cases
def cross_entropy_shapes(device: torch.device) -> Iterator[str]:
    """Every way to run: rows of one vector and less, streamed, kept by one block, and by clusters of 2, 4 and 8."""
    for dtype in FLOATS:
        for vocab, offset, gap in ((1, 0, 0), (7, 1, 0), (1000, 0, 0), (1000, 3, 5), (5003, 0, 0), (32000, 0, 0)):
            logits, labels = loss_problem(device, dtype, 3, vocab, offset, gap)
            for reduction in ("none", "mean"):
                backward(packops.cross_entropy(logits, labels, reduction=reduction), logits)
            yield f"{dtype} vocab {vocab} offset {offset} gap {gap}"
    for vocab in (50257, 65536, 128256, 262144):
        logits, labels = loss_problem(device, torch.bfloat16, 2, vocab)
        backward(packops.cross_entropy(logits, labels), logits)
        packops.cross_entropy(logits.detach(), labels)
        yield f"bfloat16 vocab {vocab}"
    for rows in (0, 1, 300):
        logits, labels = loss_problem(device, torch.float32, max(rows, 1), 33)
        backward(packops.cross_entropy(logits[:rows], labels[:rows]), logits)
        yield f"{rows} rows"


@cases
def cross_entropy_options(device: torch.device) -> Iterator[str]:
    cu_seqlens = torch.tensor([0, 3, 3, 11, 15], dtype=torch.int32, device=device)
    rows, vocab = 17, 129
    weights = {"token_weight": torch.rand(rows, device=device), "class_weight": torch.rand(vocab, device=device)}
    for reduction in ("none", "sum", "mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        logits, labels = loss_problem(device, torch.float32, rows, vocab)
        for shift in (False, True):
            options = {"reduction": reduction, "shift": shift, "cu_seqlens": cu_seqlens}
            backward(packops.cross_entropy(logits, labels, **options), logits)
            _, stats = packops.cross_entropy(logits, labels.int(), return_stats=True, **options)
            assert stats.num_tokens.shape == ()
            if reduction not in ("none", "sum"):
                count = torch.tensor(40, device=device)
                backward(packops.cross_entropy(logits, labels, num_items=count, **options), logits)
        yield reduction
    for options in ({"label_smoothing": 0.1}, {"z_loss": 1e-3}, {"softcap": 5.0, "logit_scale": 0.5}, weights):
        logits, labels = loss_problem(device, torch.bfloat16, rows, vocab)
        backward(packops.cross_entropy(logits, labels, **options), logits)
        yield ", ".join(options)
    for dtype in FLOATS:
        logits, labels = loss_problem(device, dtype, rows, 4099)
        copy = logits.detach().clone().requires_grad_()
        backward(packops.cross_entropy(copy * 1, labels, inplace=True), copy)
        yield f"inplace {dtype}"


@cases
def linear_cross_entropy(device: torch.device) -> Iterator[str]:
    """Rows prepared without logits, chunks with a rest, compaction by an exact and by a wrong count, an odd vocabulary."""
    for dtype in FLOATS:
        for reduction in ("none", "mean", "seq-mean-token-mean"):
            hidden, weight = (torch.randn(n, 24, device=device).to(dtype).requires_grad_() for n in (17, 1031))
            labels = torch.randint(0, 1031, (17,), device=device)
            labels[5] = -100
            cu_seqlens = torch.tensor([0, 3, 3, 11, 15], dtype=torch.int32, device=device)
            options = {"reduction": reduction, "cu_seqlens": cu_seqlens, "shift": True}
            main_grad = torch.zeros(weight.shape, device=device)
            for num_valid in (None, 11, 14):
                loss = packops.linear_cross_entropy(hidden, weight, labels, num_valid=num_valid, chunk_tokens=4, **options)
                backward(loss, hidden, weight)
                loss = packops.linear_cross_entropy(hidden, weight, labels, num_valid=num_valid, main_grad=main_grad, **options)
                backward(loss, hidden)
            backward(packops.linear_cross_entropy(hidden, weight, labels, **options), hidden, weight)
            yield f"{dtype} {reduction}"
    hidden, weight = (torch.randn(n, 24, device=device).requires_grad_() for n in (2500, 33))
    labels = torch.randint(0, 33, (2500,), device=device)
    backward(packops.linear_cross_entropy(hidden, weight, labels), hidden, weight)
    yield "more rows than one block prepares"
    with bad_ids(device):
        backward(packops.linear_cross_entropy(hidden, weight, labels, num_valid=100), hidden, weight)
    for label in (-1, 33, 2**40):
        labels[7] = label
        with bad_ids(device):
            backward(packops.linear_cross_entropy(hidden, weight, labels, reduction="none"), hidden, weight)
        yield f"label {label}"


@cases
def linear_log_probs(device: torch.device) -> Iterator[str]:
    """Chunks with a rest, compaction by an exact and by a wrong count, an odd vocabulary; sums of documents, some malformed."""
    for dtype in FLOATS:
        hidden, weight = (torch.randn(n, 24, device=device).to(dtype).requires_grad_() for n in (17, 1031))
        labels = torch.randint(0, 1031, (17,), device=device)
        labels[5] = -100
        cu_seqlens = torch.tensor([0, 3, 3, 11, 15], dtype=torch.int32, device=device)
        options = {"cu_seqlens": cu_seqlens, "shift": True, "chunk_tokens": 4, "softcap": 5.0}
        for num_valid in (None, 11, 14):
            ours = packops.linear_log_probs(hidden, weight, labels, num_valid=num_valid, **options)
            backward(packops.document_sums(ours.log_probs + ours.entropy, cu_seqlens), hidden, weight)
        yield f"{dtype}"
    values = torch.randn(17, device=device)
    for bounds in ([0], [0, 17], [5, 3, 40], [-7, 2**31 - 1, 4]):
        with bad_ids(device) if bounds[0] else contextlib.nullcontext():
            packops.document_sums(values, torch.tensor(bounds, device=device))
        yield f"sums of {bounds}"


@cases
def vocab_parallel(device: torch.device) -> Iterator[str]:
    """Shards that are empty, of one class, streamed and resident; targets before, in and after each."""
    from test_vocab_parallel import sharded

    for dtype in FLOATS:
        for sizes in ([0, 1, 40], [1000, 5003, 7], [32000, 257]):
            logits, labels = loss_problem(device, dtype, 5, sum(sizes), offset=3)
            logits = logits.detach()
            for options in (
                {},
                {"label_smoothing": 0.1, "class_weight": torch.rand(sum(sizes), device=device)},
                {"softcap": 5.0},
            ):
                sharded(logits, labels, sizes, **options)
                sharded(logits, labels, sizes, inplace=True, reduction="none", **options)
            yield f"{dtype} {sizes}"
    logits, labels = loss_problem(device, torch.bfloat16, 2, 2 * 128256)
    sharded(logits.detach(), labels, [128256, 128256])
    yield "clusters"
    sharded(logits.detach()[:0], labels[:0], [128256, 128256])
    yield "no rows"
    for label in (-1, 2 * 128256, 2**40):
        labels[0] = label
        with bad_ids(device):
            sharded(logits.detach(), labels, [128256, 128256])
        yield f"label {label}"


@cases
def cross_entropy_bad_ids(device: torch.device) -> Iterator[str]:
    for label in (-1, 129, 2**31, 2**40, -(2**62)):
        logits, labels = loss_problem(device, torch.float32, 5, 129)
        labels[1] = label
        with bad_ids(device):
            backward(packops.cross_entropy(logits, labels, reduction="none"), logits)
        yield f"label {label}"
    for bounds in ([1, 5], [0, 4, 2, 5], [0, 6], [0, -3, 5], [0, 2**31 - 1], [-(2**31), 2**31 - 1]):
        for reduction in ("mean", "seq-mean-token-mean"):
            logits, labels = loss_problem(device, torch.float32, 5, 129)
            cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
            with bad_ids(device):
                backward(packops.cross_entropy(logits, labels, cu_seqlens=cu_seqlens, shift=True, reduction=reduction), logits)
            yield f"cu_seqlens {bounds} {reduction}"


@cases
def metadata(device: torch.device) -> Iterator[str]:
    for dtype in (torch.int32, torch.int64):
        for bounds, tokens in (([0], 0), ([0, 0], 3), ([0, 3, 3, 7], 9), (list(range(0, 1000, 3)), 1001)):
            cu_seqlens = torch.tensor(bounds, dtype=dtype, device=device)
            packops.packed_metadata(cu_seqlens, tokens)
            labels = torch.randint(0, 9, (tokens,), device=device).to(dtype)
            for shift in (False, True):
                packops.packed_labels(labels, cu_seqlens, shift=shift)
            yield f"{dtype} {len(bounds) - 1} documents, {tokens} tokens"
    for bounds in ([1, 5], [0, 4, 2, 5], [0, 2**31 - 1], [0, -3, 5], [-(2**31), 2**31 - 1]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
        with bad_ids(device):
            packops.packed_metadata(cu_seqlens, 5)
        with bad_ids(device):
            packops.packed_labels(torch.arange(5, device=device), cu_seqlens)
        yield f"cu_seqlens {bounds}"


def rope_problem(device: torch.device, dtype: torch.dtype, head_dim: int, rotary_dim: int):
    cos, sin = packops.rope_table(rotary_dim, 50, device=device)
    fused = torch.randn(13, 9, head_dim, device=device).to(dtype)
    return fused[:, :5].requires_grad_(), fused[:, 5:7].requires_grad_(), cos, sin  # slices of a fused qkv tensor


@cases
def rope(device: torch.device) -> Iterator[str]:
    cu_seqlens = torch.tensor([0, 4, 4, 11], dtype=torch.int32, device=device)
    for dtype in FLOATS:
        for head_dim, rotary_dim, offset in ((64, 64, 0), (64, 32, 0), (64, 32, 32), (6, 2, 1), (30, 10, 4)):
            q, k, cos, sin = rope_problem(device, dtype, head_dim, rotary_dim)
            for interleaved in (False, True):
                options = {"cu_seqlens": cu_seqlens, "interleaved": interleaved, "rotary_offset": offset}
                backward(torch.cat([x.flatten() for x in packops.apply_rope(q, k, cos, sin, **options)]), q, k)
                packops.apply_rope(q.detach().clone(), None, cos, sin, inplace=True, **options)
            yield f"{dtype} head_dim {head_dim} rotary_dim {rotary_dim} offset {offset}"
    for layout in ("bshd", "bhsd"):
        shape = (2, 7, 3, 32) if layout == "bshd" else (2, 3, 7, 32)
        cos, sin = packops.rope_table(32, 50, device=device)
        q = torch.randn(shape, device=device, requires_grad=True)
        position_ids = torch.randint(0, 50, (1, 7), device=device)
        backward(packops.apply_rope(q, None, cos, sin, position_ids=position_ids, layout=layout)[0], q)
        yield layout
    q, k, cos, sin = rope_problem(device, torch.bfloat16, 64, 64)
    packops.apply_rope(q, k, cos, sin, position_ids=torch.randint(0, 50, (3, 13), device=device), mrope_section=[8, 12, 12])
    yield "mrope"


@cases
def rope_bad_ids(device: torch.device) -> Iterator[str]:
    for position in (-1, 50, 2**31, -(2**62)):
        q, k, cos, sin = rope_problem(device, torch.bfloat16, 64, 64)
        position_ids = torch.arange(13, device=device)
        position_ids[6] = position
        with bad_ids(device):
            rotated, _ = packops.apply_rope(q, k, cos, sin, position_ids=position_ids)
            backward(rotated, q)
        yield f"position {position}"
    for bounds in ([1, 5], [0, 9, 2, 13], [0, 2**31 - 1], [0, -3, 5], [-(2**31), 2**31 - 1]):
        q, k, cos, sin = rope_problem(device, torch.float32, 64, 64)
        with bad_ids(device):
            packops.apply_rope(q, k, cos, sin, cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device))
        yield f"cu_seqlens {bounds}"


@cases
def rope_misaligned(device: torch.device) -> Iterator[str]:
    """Rows that start at any element, every kind of position, and blocks of every kernel configuration."""
    cos, sin = packops.rope_table(24, 30, device=device)
    ids = torch.randint(0, 30, (23,), device=device)
    kinds = {
        "ids": {"position_ids": ids},
        "documents": {"cu_seqlens": torch.tensor([0, 4, 4, 19], dtype=torch.int32, device=device)},
        "mrope": {"position_ids": torch.stack([ids, ids, ids]), "mrope_section": [4, 5, 3]},
    }
    for dtype in FLOATS:
        for shift in (1, 2, 4):
            q = (
                torch.randn(23 * 3 * 36 + 8, device=device)
                .to(dtype)[shift : shift + 23 * 3 * 36]
                .view(23, 3, 36)
                .requires_grad_()
            )
            for name, options in kinds.items():
                for interleaved in (False, True):
                    backward(packops.apply_rope(q, None, cos, sin, rotary_offset=6, interleaved=interleaved, **options)[0], q)
                yield f"{dtype} shifted by {shift}, {name}"
    table = packops.rope_table(64, 8701, device=device)
    for tokens in (2201, 8701):  # enough work for two heads per thread, and for four (rope_launch.h)
        for layout, shape in (("bshd", (1, tokens, 63, 64)), ("bhsd", (1, 63, tokens, 64))):
            q = torch.ones(shape, device=device, dtype=torch.bfloat16)
            packops.apply_rope(q, q[..., :1, :] if layout == "bshd" else q[:, :1], *table, layout=layout)
            yield f"{tokens} tokens, {layout}"


@cases
def qk_norm_rope(device: torch.device) -> Iterator[str]:
    """A norm in the registers of a few threads, by a whole block, and across heads; weight gradients."""
    cu_seqlens = torch.tensor([0, 4, 4, 11], dtype=torch.int32, device=device)
    for dtype in FLOATS:
        for head_dim, rotary_dim in ((64, 64), (80, 32), (36, 12), (30, 10), (512, 512)):
            q, k, cos, sin = rope_problem(device, dtype, head_dim, rotary_dim)
            for heads in ((1, 1), (5, 2)):
                weights = [torch.rand(h * head_dim, device=device, requires_grad=True) for h in heads]
                for interleaved in (False, True):
                    out = packops.apply_qk_norm_rope(
                        q, k, *weights, cos, sin, eps=1e-6, rotary_dim=rotary_dim, cu_seqlens=cu_seqlens, interleaved=interleaved
                    )
                    backward(torch.cat([x.flatten() for x in out]), q, k, *weights)
                yield f"{dtype} head_dim {head_dim} rotary_dim {rotary_dim}, weights of {heads} heads"
    for position in (-1, 50, 2**31, -(2**62)):
        q, k, cos, sin = rope_problem(device, torch.bfloat16, 64, 64)
        weight = torch.rand(64, device=device, requires_grad=True)
        position_ids = torch.arange(13, device=device)
        position_ids[6] = position
        with bad_ids(device):
            out, _ = packops.apply_qk_norm_rope(q, k, weight, weight, cos, sin, eps=1e-6, position_ids=position_ids)
            backward(out, q, weight)
        yield f"position {position}"


@cases
def gated_linear(device: torch.device) -> Iterator[str]:
    """Whole vectors and rests, several rows in a block, rows and tensors off the alignment, outputs that nobody wants."""
    for dtype in FLOATS:
        for rows, columns, offset in ((3, 1031, 0), (5, 40, 0), (7, 33, 1), (300, 1, 0), (2, 2100, 3), (0, 8, 0)):
            buffer = torch.randn(offset + rows * 2 * columns, device=device).to(dtype)
            gate, up = buffer[offset:].view(rows, 2 * columns).requires_grad_().chunk(2, dim=-1)
            weight = torch.randn(5, columns, device=device).to(dtype).requires_grad_()
            for activation in ("silu", "gelu_tanh", "gelu"):
                backward(packops.gated_linear(gate, up, weight, activation=activation), gate, up, weight)
                backward(packops.gated_activation(gate, up.detach().contiguous(), activation=activation), gate)
            yield f"{dtype} {rows} rows of {columns}, offset {offset}"


@cases
def gated_mlp(device: torch.device) -> Iterator[str]:
    """The products of Hopper: sizes that fill no tile, several turns of each consumer, results that nobody wants. What they write
    is not read: initcheck does not see tensor copies."""
    ops = torch.ops.packops
    for dtype in (torch.bfloat16, torch.float16) if device.type == "cuda" else ():
        for tokens, features, columns in ((1, 8, 8), (129, 72, 200), (300, 136, 1000)):
            x, grad = torch.randn(2, tokens, features, device=device).to(dtype)
            gate_weight, up_weight = torch.randn(2, columns, features, device=device).to(dtype)
            down_weight = torch.randn(features, columns, device=device).to(dtype)
            for activation in ("silu", "gelu_tanh"):
                gate, up, _ = ops._gated_mlp_products(x, gate_weight, up_weight, activation)
                ops._gated_mlp_products(x, gate_weight, up_weight, activation, False)
                if gate is not None:  # the code that is loaded has them
                    for with_product in (False, True):
                        ops._gated_mlp_products_backward(grad, down_weight, gate, up, activation, with_product)
            yield f"{dtype} {tokens} tokens, {features} features, {columns} columns"
    inputs = [torch.randn(*shape, device=device).requires_grad_() for shape in ((5, 8), (12, 8), (12, 8), (6, 12))]
    backward(packops.gated_mlp(*inputs), *inputs)
    yield "without products"


def attention_problem(
    device: torch.device, dtype: torch.dtype, lengths: list[int], heads: tuple[int, int], head_dim: int, padding: int = 0
):
    """q, k and v, slices of one projection, and where documents begin."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    qkv = torch.randn(bounds[-1] + padding, heads[0] + 2 * heads[1], head_dim, device=device).to(dtype).requires_grad_()
    return *qkv.split([heads[0], heads[1], heads[1]], 1), torch.tensor(bounds, dtype=torch.int32, device=device)


@cases
def attention(device: torch.device) -> Iterator[str]:
    """Documents about as long as tiles, every team of warps, every rule, and tiles of documents that overlap."""
    half, bfloat = torch.float16, torch.bfloat16
    for dtype, lengths, heads, head_dim, padding in (
        (half, [1, 0, 63, 64, 65], (4, 1), 64, 7),
        (bfloat, [129, 0, 2], (7, 1), 64, 0),  # teams with heads more and fewer
        (bfloat, [65], (2, 1), 64, 64),
        (half, [0, 63, 1], (2, 2), 128, 1),
        (bfloat, [65, 66], (4, 2), 128, 0),
        (half, [65, 2], (2, 1), 256, 0),
        (bfloat, [1, 0, 64], (4, 1), 256, 65),
        (bfloat, [65, 2], (4, 2), 40, 1),
        (half, [1, 64], (2, 1), 192, 65),
    ):
        q, k, v, cu_seqlens = attention_problem(device, dtype, lengths, heads, head_dim, padding)
        backward(packops.attention(q, k, v, cu_seqlens), q, k, v)
        yield f"{dtype} lengths {lengths}, padding {padding}, heads {heads} of {head_dim}"
    for dtype, head_dim, rule in (
        (bfloat, 64, {"window": 1}),
        (half, 128, {"window": 65}),
        (half, 64, {"softcap": 5.0, "window": 64}),
        (bfloat, 256, {"softcap": 5.0}),
        (bfloat, 64, {"causal": False}),
        (half, 128, {"causal": False, "softcap": 5.0}),
        (bfloat, 80, {"window": 65}),
    ):
        q, k, v, cu_seqlens = attention_problem(device, dtype, [2, 130], (2, 1), head_dim, padding=3)
        backward(packops.attention(q, k, v, cu_seqlens.long(), **rule), q, k, v)
        yield f"{dtype} head_dim {head_dim}, {rule}"
    long = 1 if device.type == "cpu" else 50  # there they have no kernels of their own
    for dtype, head_dim, lengths, rule in (
        (bfloat, 64, [42 * long, 20], {}),
        (half, 128, [70, 26 * long], {"window": 26 * long - 1}),
        (bfloat, 256, [21 * long], {"softcap": 5.0}),
        (half, 80, [70, 21 * long], {}),
        (bfloat, 192, [21 * long], {}),
    ):
        q, k, v, cu_seqlens = attention_problem(device, dtype, lengths, (1, 1), head_dim, padding=3)
        backward(packops.attention(q, k, v, cu_seqlens, **rule), q, k, v)
        yield f"{dtype} head_dim {head_dim}, lengths {lengths}, {rule}"
    for padding, lengths in ((0, []), (3, []), (70, [0, 0])):
        q, k, v, cu_seqlens = attention_problem(device, bfloat, lengths, (2, 1), 64, padding)
        backward(packops.attention(q, k, v, cu_seqlens), q, k, v)
        yield f"padding {padding} alone, lengths {lengths}"
    # Tokens before the first boundary are not written; the last has more tiles than there is room for.
    for bounds in ([1, 200], [0, 500], [-7, 50, 3, 90], [-(2**31), 2**31 - 1], [60, 0, 200], [0, 200] * 8):
        q, k, v, _ = attention_problem(device, bfloat, [200], (2, 1), 64)
        for dtype in (torch.int32, torch.int64):
            with bad_ids(device):
                backward(packops.attention(q, k, v, torch.tensor(bounds, dtype=dtype, device=device)), q, k, v)
        yield f"cu_seqlens {bounds}"


@cases
def shared_prefixes(device: torch.device) -> Iterator[str]:
    """Branches about as long as tiles, trees in trees, windows along a path, and parents that are none."""
    lengths, parents = [70, 1, 63, 64, 0, 130, 3], [-1, 0, 0, 2, 2, 0, -1]
    for dtype, head_dim, rule in (
        (torch.bfloat16, 64, {}),
        (torch.float16, 128, {"window": 66}),
        (torch.bfloat16, 256, {"softcap": 5.0}),
        (torch.float16, 72, {}),
    ):
        q, k, v, cu_seqlens = attention_problem(device, dtype, lengths, (2, 1), head_dim, padding=5)
        for index in (torch.int32, torch.int64):
            above = torch.tensor(parents, dtype=index, device=device)
            packops.packed_metadata(cu_seqlens, len(q), above)
            backward(packops.attention(q, k, v, cu_seqlens, above, **rule), q, k, v)
        yield f"{dtype} head_dim {head_dim}, {rule}"
    long = 1 if device.type == "cpu" else 50  # there a long prefix has no kernels of its own
    for dtype, head_dim, prefix, rule in (
        (torch.bfloat16, 64, 42, {}),
        (torch.float16, 128, 26, {}),
        (torch.float16, 128, 26, {"window": 26 * long - 1}),
        (torch.bfloat16, 256, 21, {}),
    ):
        branches = [20, prefix * long, 130, 70, 1]
        q, k, v, cu_seqlens = attention_problem(device, dtype, branches, (2, 1), head_dim, padding=5)
        backward(packops.attention(q, k, v, cu_seqlens, torch.tensor([-1, -1, 1, 2, 1], device=device), **rule), q, k, v)
        yield f"{dtype} head_dim {head_dim}, branches of a long prefix, {rule}"
    many = 1 if device.type == "cpu" else 8  # then blocks share out the queries that see the prefix
    for dtype, head_dim in ((torch.bfloat16, 64), (torch.float16, 128), (torch.bfloat16, 256)):
        q, k, v, cu_seqlens = attention_problem(device, dtype, [3, 65, *[70] * many], (8, 1), head_dim, padding=5)
        backward(packops.attention(q, k, v, cu_seqlens, torch.tensor([-1, -1, *[1] * many], device=device)), q, k, v)
        yield f"{dtype} head_dim {head_dim}, many branches of a short prefix"
    for parents in ([5] * 7, list(range(7)), [-9, 2**31 - 1, -1, 0, 1, 1, 1]):
        q, k, v, cu_seqlens = attention_problem(device, torch.bfloat16, lengths, (2, 1), 64)
        with bad_ids(device):
            backward(packops.attention(q, k, v, cu_seqlens, torch.tensor(parents, device=device)), q, k, v)
        yield f"parents {parents}"


@cases
def rms_norm(device: torch.device) -> Iterator[str]:
    """Teams of one warp to eight, vectors that are not there, rows fewer than teams and more than blocks, off the alignment."""
    for dtype in FLOATS:
        for rows, columns, offset in ((1, 8, 0), (5, 1032, 0), (700, 64, 3), (3, 2304, 0), (2, 4096, 1), (0, 64, 0)):
            buffer = torch.randn(offset + rows * 2 * columns, device=device).to(dtype)
            x = buffer[offset:].view(rows, 2 * columns)[:, :columns].requires_grad_()
            weight = torch.randn(columns, device=device).to(dtype).requires_grad_()
            for zero_centered in (False, True):
                backward(packops.rms_norm(x, weight, eps=1e-6, zero_centered=zero_centered), x, weight)
                for residual in (None, torch.randn(x.shape, device=device).to(dtype).requires_grad_()):
                    made = packops.add_rms_norm(x, residual, weight, eps=1e-6, zero_centered=zero_centered)
                    backward(sum(made), x, weight)
            yield f"{dtype} {rows} rows of {columns}, offset {offset}"


@cases
def scaled_rows(device: torch.device) -> Iterator[str]:
    """Vectors and single elements, rows of their own, rows from elsewhere, and in place."""
    for dtype in FLOATS:
        for columns, late in ((7, 0), (72, 0), (72, 1), (896, 0), (5003, 0)):
            x = torch.randn(late + 9 * columns, device=device).to(dtype)[late:].view(9, columns)
            index = torch.arange(8, -1, -1, device=device)
            target = torch.arange(-1, 8, dtype=torch.int32, device=device)
            for to in FLOATS:
                out = torch.zeros(9, columns, dtype=to, device=device)
                scaled_rows_(out, x, torch.full((), 0.5, device=device), add=True)
                scaled_rows_(out, x, torch.rand(9, device=device), index=index, target=target)
            scaled_rows_(x, x, torch.full((), 0.5, device=device))
        yield f"{dtype}"


@cases
def every_option(device: torch.device) -> Iterator[str]:
    """The ops as ``torch.ops.packops`` has them, each with each of its options, on rows off the alignment; in place, too."""
    from op_table import OPS, calls, moved, plainly, run
    from test_strides import rows_apart, shifted

    for name, op in OPS.items():
        if op.op is None:
            continue
        arguments = {argument.name for argument in op.op.default._schema.arguments}
        pairs = {option: pair for option, pair in calls(op).items() if not option or option in arguments}
        move = moved(op, device)
        which = [with_it for _, with_it in pairs.values()]
        # Without a gradient the op goes another way.
        for layout, way in ((rows_apart, contextlib.nullcontext()), (shifted, torch.no_grad())):

            def place(argument: str, x: Tensor, layout=layout, op=op, move=move) -> Tensor:
                return move(x) if argument in op.contiguous else layout(move(x), 3)

            with way:
                run(op, plainly(op.op), which, place=place)
        yield name
    q, k, cos, sin = rope_problem(device, torch.bfloat16, 64, 64)
    torch.ops.packops.rope_(q.detach().clone(), k.detach().clone(), cos, sin)
    yield "rope_"


# --------------------------------------------------------------------------------------------------------------------------------
# The driver.


def run_cases(device: torch.device, functions: list[Case] | None = None) -> int:
    """Run them all, or those of some functions; the exit status."""
    torch.manual_seed(0)
    count = 0
    with cleared_outputs() if os.environ.get(TOOL) == "initcheck" else contextlib.nullcontext():
        for function in functions or CASES:
            started = time.monotonic()
            for name in function(device):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                print(f"case {function.__name__}: {name} [{time.monotonic() - started:.1f} s]", flush=True)
                started = time.monotonic()
                count += 1
    where = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
    print(f"{count} cases ran on {where}", flush=True)
    return 0 if count else 1


@contextlib.contextmanager
def cleared_outputs() -> Iterator[None]:
    """Memory for a chunk of logits, for their gradient and for what products make is set to 0.

    The lm_head's kernels and cuBLAS write it by tensor copies (TMA). initcheck does not see these: for it, whoever reads the
    result reads what nobody wrote.
    """

    def cleared_buffer(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments: make(*arguments).zero_()

    def cleared_product(multiply: Callable[..., None]) -> Callable[..., None]:
        return lambda out, a, b, add: multiply(out if add else out.zero_(), a, b, add)

    loaded = [module for name, module in sys.modules.items() if name.startswith("packops.ops.")]
    with contextlib.ExitStack() as stack:
        for name, wrap in (("logits_buffer", cleared_buffer), ("product_", cleared_product)):
            for module in loaded:
                if hasattr(module, name):
                    kept = getattr(module, name)
                    setattr(module, name, wrap(kept))
                    stack.callback(setattr, module, name, kept)
        kept = Product.weight_gradient_
        stack.callback(setattr, Product, "weight_gradient_", kept)
        Product.weight_gradient_ = lambda self, out, a, b, factor, add: kept(self, out if add else out.zero_(), a, b, factor, add)
        yield


def warm_up() -> None:
    """Every function's cases in a process of its own. Each runs other kernels, so the driver compiles them side by side."""
    started = time.monotonic()
    commands = [[sys.executable, __file__, "--cases", "--only", function.__name__] for function in CASES]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        statuses = list(pool.map(lambda command: subprocess.run(command, **quiet).returncode, commands))
    failed = [function.__name__ for function, status in zip(CASES, statuses, strict=True) if status]
    print(f"warm-up: {time.monotonic() - started:.0f} s" + (f", failed: {', '.join(failed)}" if failed else ""), flush=True)


# --------------------------------------------------------------------------------------------------------------------------------
# Under the tools

GROUPS = 6  # of functions, a process each: most of its time passes before the first case has run
SLOWEST = ("racecheck", "memcheck", "initcheck", "synccheck")


@dataclasses.dataclass
class Job:
    """One process under one tool: a planted error, or the cases of some functions."""

    tool: str
    names: list[str]
    is_planted: bool = False

    def run(self, logs: Path, limit: float) -> Job:
        started = time.monotonic()
        stem = re.sub(r"\W+", "_", f"{self.tool} {self.names[0]}") + ("" if self.is_planted else "_and_others")
        self.log = logs / f"{stem}.log"
        if self.is_planted:
            (logs / stem).mkdir(exist_ok=True)
            arguments = ["--planted", self.names[0], str(compile_planted(self.names[0], logs / stem))]
        else:
            arguments = ["--cases", *(f"--only={name}" for name in self.names)]
        self.status = run_sanitizer(self.tool, self.log, *arguments, limit=limit)
        self.seconds = round(time.monotonic() - started, 1)
        text = self.log.read_text(errors="replace")
        self.found = self.is_planted and found_planted(self.names[0], text, self.status)
        self.result = {} if self.is_planted else read_log(text, self.status)
        if self.status is None:
            self.unfinished: str | None = f"stopped after {limit:.0f} s"
        else:
            self.unfinished = f"exit status {self.status}" if self.result.get("errors") == -1 else None
        return self

    def say(self) -> None:
        if self.is_planted:
            said = f"{'found' if self.found else 'DID NOT FIND'} its planted error: {self.names[0]}"
        else:
            said = f"{self.unfinished or str(self.result['errors']) + ' errors'} in {self.result['cases']} cases"
            excused = sum(self.result.get("excused", {}).values())
            said += (f", {excused} hazards excused" if excused else "") + f": {', '.join(self.names)}"
        print(f"{self.tool} {said}, {self.seconds} s ({self.log})", flush=True)
        if (self.is_planted and not self.found) or self.unfinished or self.result.get("errors"):
            print(findings(self.log.read_text(errors="replace")), flush=True)


def result_of(tool: str, jobs: list[Job], done: list[Job]) -> dict[str, Any]:
    """What a tool has said so far: of its errors, its cases, what is excused, and what has not come to its end."""
    mine = [job for job in jobs if job.tool == tool and not job.is_planted]
    results = [job.result for job in mine if job in done]
    unfinished = {", ".join(job.names): job.unfinished if job in done else "not run" for job in mine}
    excused = sum((Counter(result.get("excused", {})) for result in results), Counter())
    return {
        "errors": sum(max(result["errors"], 0) for result in results),
        "cases": sum(result["cases"] for result in results),
        "seconds": round(sum(job.seconds for job in mine if job in done), 1),
        "unfinished": {names: why for names, why in unfinished.items() if why},
        **({"excused": dict(sorted(excused.items()))} if excused else {}),
    }


def run_tools(tools: list[str], functions: list[str], logs: Path, limit: float, processes: int) -> int:
    """The planted errors and the cases under each tool. What they say goes into the record, unless cases are left out."""
    logs.mkdir(parents=True, exist_ok=True)
    # Those that take longest begin.
    jobs = [Job(tool, functions[i::GROUPS]) for tool in sorted(tools, key=SLOWEST.index) for i in range(GROUPS) if functions[i:]]
    jobs += [Job(planted.tool, [name], is_planted=True) for name, planted in PLANTED.items() if planted.tool in tools]
    print(f"{len(jobs)} runs under {', '.join(tools)}, {processes} at a time, at most {limit:.0f} s each", flush=True)
    is_whole = functions == [function.__name__ for function in CASES]
    environment = gpu_record.environment()
    done: list[Job] = []
    results: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(processes) as pool:  # a sanitizer keeps the host busy, hardly the GPU
        for future in as_completed([pool.submit(job.run, logs, limit) for job in jobs]):
            done.append(future.result())
            done[-1].say()
            results = {tool: result_of(tool, jobs, done) for tool in tools}
            planted = {tool: is_found(tool, done) for tool in tools}
            if is_whole:
                gpu_record.merge_sanitizer(gpu_record.PATH, environment, results, planted)
    for tool, result in results.items():
        print(f"{tool}: {result['errors']} errors in {result['cases']} cases, {result['seconds']} s in all", flush=True)
        if result.get("excused"):
            print("EXCUSED_HAZARDS = " + json.dumps(result["excused"], indent=4, ensure_ascii=False), flush=True)
    clean = all(planted.values()) and not any(result["errors"] or result["unfinished"] for result in results.values())
    if is_whole and set(tools) == set(TOOLS):
        problems = gpu_record.problems(gpu_record.PATH, ("sanitizer",))
        print("\n".join(problems or ["GPU record: the sanitizer's part is good"]), flush=True)
        clean = clean and not problems
    return 0 if clean else 1


def is_found(tool: str, done: list[Job]) -> bool:
    """Whether the tool found all errors that are planted for it."""
    found = {job.names[0] for job in done if job.found}
    return all(name in found for name, planted in PLANTED.items() if planted.tool == tool)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", default=[], metavar="TOOL", help=f"any of {', '.join(TOOLS)}; all by default")
    parser.add_argument("--cases", action="store_true", help="run the cases in this process")
    parser.add_argument("--only", action="append", metavar="FUNCTION", help="these cases alone")
    parser.add_argument("--warm-up", action="store_true", help="run the cases in many processes, whatever comes of it")
    parser.add_argument("--planted", nargs=2, metavar=("NAME", "LIBRARY"), help="run one planted error in this process")
    parser.add_argument("--logs", type=Path, default=Path("build/sanitize"), help="folder of the full logs")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="for each process (default: 300)")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 16), help="how many at a time")
    arguments = parser.parse_args()
    if unknown := set(arguments.tools) - set(TOOLS):
        parser.error(f"unknown tool {', '.join(sorted(unknown))}; choose from {', '.join(TOOLS)}")
    functions = [function for function in CASES if function.__name__ in (arguments.only or [function.__name__])]
    if arguments.cases or arguments.planted:
        status = run_planted(*arguments.planted) if arguments.planted else run_cases(torch.device("cuda"), functions)
        sys.stdout.flush()
        sys.stderr.flush()
        # Under the sanitizer a library's thread now and then aborts the process while the interpreter shuts down.
        os._exit(status)
    if arguments.warm_up:
        warm_up()
        return 0
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on PATH; it comes with the CUDA toolkit", file=sys.stderr)
        return 2
    names = [function.__name__ for function in functions]
    return run_tools(arguments.tools or list(TOOLS), names, arguments.logs, arguments.limit, arguments.processes)


if __name__ == "__main__":
    sys.exit(main())
