"""The same bits: alone and packed, in whatever company, and at every repetition.

Two kinds of test. Thousands of random packings of short documents: what a document gets depends on nothing but the document.
And large problems, repeated while other streams keep the GPU and its memory busy: a wait or a fence that is missing changes the
result only now and then, when a copy or a product comes late.
"""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import pytest
import torch
from torch import Tensor

import packops
from packops import reference

REPETITIONS = 60


def bits(x: Tensor) -> Tensor:
    """As integers: -0 is not 0, and NaN is NaN."""
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


class Pool:
    """Documents to pack, what each gives alone, and how often a packing gave anything else (counted on the device)."""

    def __init__(self, lengths: list[int], device: torch.device):
        self.lengths = np.array(lengths)
        self.begins = np.concatenate([[0], np.cumsum(lengths)])
        self.device = device
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)
        self.results: tuple[Tensor, ...] = ()

    def boundaries(self, documents: np.ndarray) -> Tensor:
        ends = np.concatenate([[0], np.cumsum(self.lengths[documents])])
        return torch.from_numpy(ends.astype(np.int32)).to(self.device)

    def tokens(self, documents: np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate([np.arange(self.begins[d], self.begins[d + 1]) for d in documents])).to(
            self.device
        )

    def run(self, packed: np.ndarray, index: Tensor, padding: int) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def learn(self) -> None:
        """Each document alone."""
        alone = [self.run(np.array([d]), self.tokens(np.array([d])), 0) for d in range(len(self.lengths))]
        self.results = tuple(torch.cat(parts) for parts in zip(*alone, strict=True))

    def check(self, random: np.random.Generator, most: int) -> None:
        """One random packing: any documents in any order, one of them twice perhaps, and padding."""
        documents = random.integers(0, len(self.lengths), random.integers(1, most + 1))
        index = self.tokens(documents)
        got = self.run(documents, index, int(random.integers(0, 3)) * 8)
        for x, alone in zip(got, self.results, strict=True):
            self.wrong += (bits(x) != bits(alone[index])).sum()


class Losses(Pool):
    """Token losses and the gradients of logits, of labels shifted within their document, every kind of token weight."""

    def __init__(self, lengths, device, vocab):
        super().__init__(lengths, device)
        total = int(self.begins[-1])
        self.logits = torch.randn(total, vocab, device=device, dtype=torch.bfloat16) * 3
        self.labels = torch.randint(0, vocab, (total,), device=device)
        self.weight = torch.rand(total, device=device)
        self.gradient = torch.rand(total, device=device)

    def run(self, documents, index, padding):
        rows = torch.nn.functional.pad(self.logits[index], (0, 0, 0, padding)).requires_grad_()
        labels, weight, gradient = (
            torch.nn.functional.pad(x[index], (0, padding)) for x in (self.labels, self.weight, self.gradient)
        )
        loss = packops.cross_entropy(
            rows,
            labels,
            cu_seqlens=self.boundaries(documents),
            shift=True,
            reduction="none",
            token_weight=weight,
            label_smoothing=0.1,
        )
        (grad,) = torch.autograd.grad(loss, rows, gradient)
        return loss.detach()[: len(index)], grad[: len(index)]


class Sums(Losses):
    """The gradients of a sum over a batch's documents, divided by a count of the whole batch."""

    def run(self, documents, index, padding):
        rows = torch.nn.functional.pad(self.logits[index], (0, 0, 0, padding)).requires_grad_()
        labels = torch.nn.functional.pad(self.labels[index], (0, padding), value=-100)
        bounds = self.boundaries(documents)
        loss = packops.cross_entropy(rows, labels, cu_seqlens=bounds, shift=True, reduction="mean", num_items=1000)
        (grad,) = torch.autograd.grad(loss, rows)
        return (grad[: len(index)],)


class Attention(Pool):
    """The output and all gradients."""

    def __init__(self, lengths, device, head_dim, **options):
        super().__init__(lengths, device)
        self.options = options
        total = int(self.begins[-1])
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.q = torch.randn(total, 4, head_dim, device=device, dtype=dtype)
        self.k, self.v = (torch.randn(total, 2, head_dim, device=device, dtype=dtype) for _ in range(2))
        self.gradient = torch.randn(total, 4, head_dim, device=device, dtype=dtype)

    def run(self, documents, index, padding):
        def rows(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x[index], (0, 0, 0, 0, 0, padding))

        q, k, v = (rows(x).requires_grad_() for x in (self.q, self.k, self.v))
        out = packops.attention(q, k, v, self.boundaries(documents), **self.options)
        grads = torch.autograd.grad(out, (q, k, v), rows(self.gradient))
        return tuple(x.detach()[: len(index)] for x in (out, *grads))


class Rope(Pool):
    """Heads that are normed and turned by their position in the document."""

    def __init__(self, lengths, device):
        super().__init__(lengths, device)
        total = int(self.begins[-1])
        self.q, self.gradient = (torch.randn(total, 3, 64, device=device, dtype=torch.bfloat16) for _ in range(2))
        self.weight = torch.rand(64, device=device, dtype=torch.bfloat16)
        self.table = packops.rope_table(64, int(self.lengths.max()), device=device)

    def run(self, documents, index, padding):
        q, gradient = (torch.nn.functional.pad(x[index], (0, 0, 0, 0, 0, padding)) for x in (self.q, self.gradient))
        q.requires_grad_()
        bounds = self.boundaries(documents)
        out, _ = packops.apply_qk_norm_rope(q, None, self.weight, None, *self.table, eps=1e-6, cu_seqlens=bounds)
        (grad,) = torch.autograd.grad(out, q, gradient)
        return out.detach()[: len(index)], grad[: len(index)]


LENGTHS = [1, 2, 3, 7, 15, 16, 17, 31, 33, 48, 63, 64, 65, 66, 90, 127, 128, 129, 150]
POOLS = {
    "losses": (lambda device: Losses(LENGTHS, device, 512), 6, 3000),
    "losses of long rows": (lambda device: Losses(LENGTHS[:12], device, 32000), 3, 400),
    "a sum's gradients": (lambda device: Sums(LENGTHS, device, 1024), 6, 1000),
    "attention": (lambda device: Attention(LENGTHS, device, 64), 6, 2600),
    "attention with a window": (lambda device: Attention(LENGTHS, device, 128, window=20), 6, 1000),
    "attention with a softcap": (lambda device: Attention(LENGTHS, device, 64, softcap=3.0), 6, 500),
    "attention both ways": (lambda device: Attention(LENGTHS, device, 128, causal=False), 6, 500),
    "norm and RoPE": (lambda device: Rope(LENGTHS, device), 8, 1000),
}  # 10,000 packings in all, on a GPU


@pytest.mark.parametrize("pool", POOLS)
def test_alone_and_packed(pool, device, one_thread):
    make, most, count = POOLS[pool]
    documents = make(device)
    documents.learn()
    random = np.random.default_rng(7)
    for _ in range(count if device.type == "cuda" else max(4, count // 200)):
        documents.check(random, most)
    assert int(documents.wrong) == 0


def test_the_pool_sees_one_wrong_bit(one_thread):
    documents = Losses(LENGTHS, torch.device("cpu"), 64)
    documents.learn()
    loss, _ = documents.results
    bits(loss)[40] ^= 1
    random = np.random.default_rng(7)
    for _ in range(40):
        documents.check(random, 6)
    assert int(documents.wrong) > 0


# --------------------------------------------------------------------------------------------------------------------------------
# Repetitions


@functools.cache
def own_block() -> Tensor:
    """Allocated once and kept. Memory that was just freed may still be in use by kernels of the current stream, for which the
    other streams do not wait."""
    torch.cuda.synchronize()
    return torch.empty(1 << 24, device="cuda")


@contextlib.contextmanager
def disturbance(number: int):
    """Other work on the GPU while the block runs: of another kind and length each time, and sometimes none."""
    streams = [torch.cuda.Stream() for _ in range(number % 3)]
    block = own_block()
    for i, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            for j in range(2 + number % 5):
                if (i + j + number) % 2:
                    torch.cuda._sleep(2000 * (1 + (number * 7 + j * 3) % 11))  # clocks: the multiprocessor is taken for so long
                block.mul_(1.0)
    yield
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)


def losses_of(rows: int, vocab: int, dtype: torch.dtype = torch.bfloat16, **options):
    def make():
        logits = (torch.randn(rows, vocab, device="cuda") * 3).to(dtype)
        labels = torch.randint(0, vocab, (rows,), device="cuda")
        labels[::7] = -100

        def run() -> list[Tensor]:
            x = logits.detach().requires_grad_()
            loss = packops.cross_entropy(x, labels, **options)
            (grad,) = torch.autograd.grad(loss, x)
            _, stats = packops.cross_entropy(logits, labels, return_stats=True, **options)
            return [loss.detach().view(1), stats.lse, grad, packops.cross_entropy(logits, labels, reduction="none", **options)]

        def expected(results: list[Tensor]) -> None:
            some = slice(0, rows, max(1, rows // 64))
            x = logits[some].float().requires_grad_()
            torch.testing.assert_close(
                results[1][some][labels[some] >= 0], x.logsumexp(-1)[labels[some] >= 0], rtol=1e-5, atol=1e-5
            )
            per_token = torch.nn.functional.cross_entropy(x, labels[some], reduction="sum") / (labels >= 0).sum()
            (grad,) = torch.autograd.grad(per_token, x)
            torch.testing.assert_close(results[2][some].float(), grad, rtol=2e-2, atol=1e-7)

        return run, expected

    return make


def attention_of(lengths: list[int], heads: tuple[int, int], head_dim: int, dtype: torch.dtype = torch.bfloat16, **options):
    def make():
        bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda")
        q = torch.randn(sum(lengths), heads[0], head_dim, device="cuda", dtype=dtype)
        k, v = (torch.randn(sum(lengths), heads[1], head_dim, device="cuda", dtype=dtype) for _ in range(2))
        gradient = torch.randn_like(q)

        def run() -> list[Tensor]:
            mine = [x.detach().requires_grad_() for x in (q, k, v)]
            out = packops.attention(*mine, bounds, **options)
            return [out.detach(), *torch.autograd.grad(out, mine, gradient)]

        def expected(results: list[Tensor]) -> None:
            # Two documents; not one of a single token, whose gradients of q and k are 0 but for rounding.
            for i in [i for i, length in enumerate(lengths) if length > 1][:2]:
                begin, end = sum(lengths[:i]), sum(lengths[: i + 1])
                mine = [x[begin:end].transpose(0, 1).float()[None].requires_grad_() for x in (q, k, v)]
                wide = [x.repeat_interleave(heads[0] // x.shape[1], 1) for x in mine]
                out = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=options.get("causal", True))
                grads = torch.autograd.grad(out, mine, gradient[begin:end].transpose(0, 1).float()[None])
                for got, want in zip(results, (out, *grads), strict=True):
                    want = want[0].transpose(0, 1).detach()
                    error = (got[begin:end].float() - want).norm() / want.norm()
                    assert error < 2e-2, error

        return run, expected

    return make


def log_probs_of(rows: int, width: int, vocab: int, dtype: torch.dtype = torch.bfloat16, **options):
    def make():
        hidden = torch.randn(rows, width, device="cuda").to(dtype)
        weight = (torch.randn(vocab, width, device="cuda") * 1.5 / width**0.5).to(dtype)
        labels = torch.randint(0, vocab, (rows,), device="cuda")
        labels[::7] = -100
        gradients = torch.randn(2, rows, device="cuda")

        def run() -> list[Tensor]:
            mine = [x.detach().requires_grad_() for x in (hidden, weight)]
            ours = packops.linear_log_probs(*mine, labels, **options)
            return [
                ours.log_probs.detach(),
                ours.entropy.detach(),
                *torch.autograd.grad([ours.log_probs, ours.entropy], mine, list(gradients)),
            ]

        def expected(results: list[Tensor]) -> None:
            some = torch.arange(1, rows, max(1, rows // 64), device="cuda")
            mine = [x.double().requires_grad_() for x in (hidden[some], weight)]
            theirs = reference.linear_log_probs(*mine, labels[some], **options)
            for got, want in zip(results, (theirs[0], theirs[1]), strict=False):
                torch.testing.assert_close(got[some].double(), want, rtol=1e-5, atol=2e-5)
            (grad,) = torch.autograd.grad(theirs[:2], mine[:1], [g[some].double() for g in gradients])
            error = (results[2][some].double() - grad).norm() / grad.norm()
            assert error < 1e-2, error

        return run, expected

    return make


def linear_losses_of(rows: int, width: int, vocab: int, **options):
    def make():
        hidden = torch.randn(rows, width, device="cuda").bfloat16()
        weight = (torch.randn(vocab, width, device="cuda") * 1.5 / width**0.5).bfloat16()
        labels = torch.randint(0, vocab, (rows,), device="cuda")
        labels[::7] = -100

        def gradients(loss_of, *operands: Tensor, **options) -> list[Tensor]:
            mine = [x.detach().requires_grad_() for x in operands]
            loss = loss_of(*mine, labels, **options)
            return [loss.detach(), *torch.autograd.grad(loss, mine)]

        def run() -> list[Tensor]:
            return gradients(packops.linear_cross_entropy, hidden, weight, **options)

        def expected(results: list[Tensor]) -> None:
            for got, want in zip(
                results, gradients(reference.linear_cross_entropy, hidden.double(), weight.double()), strict=True
            ):
                error = (got.double() - want).norm() / want.norm()
                assert error < 1e-2, error

        return run, expected

    return make


LARGE = {
    "loss, clusters of 8": losses_of(1200, 262144),
    "loss, clusters of 4": losses_of(2000, 128256),
    "loss, odd vocabulary": losses_of(2000, 50257),
    "loss, one block a row": losses_of(6000, 32000),
    "loss, fp16": losses_of(3000, 65536, torch.float16),
    "loss, fp32": losses_of(1500, 128256, torch.float32),
    "log-probabilities": log_probs_of(4000, 1024, 32000),
    "log-probabilities, softcap, odd vocabulary": log_probs_of(1500, 896, 50257, torch.float16, softcap=20.0),
    "linear loss, logits kept": linear_losses_of(3000, 1024, 16001),
    "linear loss, accumulated over chunks": linear_losses_of(3000, 520, 16001, chunk_tokens=1000),
    "attention, head_dim 64": attention_of([3000, 1, 517, 1200], (8, 2), 64),
    "attention, head_dim 128": attention_of([2100, 640, 65, 1500], (8, 2), 128),
    "attention, head_dim 128, fp16": attention_of([2100, 640, 65, 1500], (4, 4), 128, torch.float16),
    "attention, head_dim 256": attention_of([1300, 64, 777], (4, 2), 256),
    "attention, both ways": attention_of([1500, 333, 900], (8, 2), 64, causal=False),
    "attention, short documents": attention_of([70, 130, *range(1, 120)], (8, 2), 128),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE)
def test_repeated_under_disturbance(case):
    """The first result is right, and all that follow are its equal to the bit, whatever else the GPU does meanwhile."""
    run, expected = LARGE[case]()
    first = [x.clone() for x in run()]
    expected(first)
    wrong = torch.zeros(REPETITIONS, dtype=torch.int64, device="cuda")
    for number in range(REPETITIONS):
        with disturbance(number):
            for got, want in zip(run(), first, strict=True):
                wrong[number] += (bits(got) != bits(want)).sum()
    assert not wrong.any(), f"repetitions with other bits: {wrong.nonzero().flatten().tolist()}"
