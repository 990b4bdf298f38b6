"""Several processes: a vocabulary split over them, and data parallel training; over gloo everywhere, over NCCL where GPUs are.

Processes take seconds to start, so that a world is started once and goes through many checks; a failure names its own.
"""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import packops
import packops.hf
from cuda_streams import capture, no_host_sync
from packops import PackedBatch, PackedBatchSampler, PackingCollator, reference
from packops.ops import lm_head
from ranks import fabrics, run_ranks, this_device
from test_ce_loss import EPS, OPTIONS, assert_close, options_on, problem

# ---- a vocabulary over ranks -------------------------------------------------------------------------------------------------

SIZES = {2: [131, 72], 4: [64, 0, 77, 62]}  # classes of each rank
LINEAR_SIZES = {2: [131, 72], 4: [64, 1, 76, 62]}  # a matrix product wants at least one
VOCAB = 203


def begins(sizes):
    return [0, *itertools.accumulate(sizes)][:-1]


class World:
    """One rank's view: everything of full size is the same on every rank, its shard is a strided slice of that."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size, self.device = rank, world_size, this_device()
        self.sizes = SIZES[world_size]
        self.begin = begins(self.sizes)[rank]
        self.here = slice(self.begin, self.begin + self.sizes[rank])

    def same_bits(self, x):
        """``x`` of this rank, once it is known to be every rank's."""
        bits = x.detach().contiguous().reshape(-1).view(torch.uint8)
        of_all = [torch.empty_like(bits) for _ in range(self.world_size)]
        dist.all_gather(of_all, bits)
        assert all(torch.equal(bits, other) for other in of_all), "ranks have different bits"
        return x.detach()

    def loss_and_grad(self, logits, labels, grad_output=None, computed=False, **options):
        shard = logits[..., self.here].detach().requires_grad_()
        of_loss = shard * 1 if computed else shard
        loss = packops.vocab_parallel_cross_entropy(of_loss, labels, shard_sizes=self.sizes, **options)
        loss.backward(torch.ones_like(loss) if grad_output is None else grad_output)
        return self.same_bits(loss), shard.grad

    def check(self, logits, labels, grad_output=None, **options):
        loss, grad = self.loss_and_grad(logits, labels, grad_output, **options)
        exact = logits.detach().double().requires_grad_()
        expected = reference.cross_entropy(exact, labels, **options)
        expected.backward(torch.ones_like(expected) if grad_output is None else grad_output.double())
        if grad.numel():
            # Rounding noise is relative to the row's largest gradient, which may be another shard's.
            whole = exact.grad.to(logits.dtype)
            whole[..., self.here] = grad
            assert_close(loss, expected.detach(), whole, exact.grad, logits.dtype)


def vocab_parallel(rank, world_size):
    torch.manual_seed(0)  # the same numbers on every rank
    world = World(rank, world_size)
    device, sizes = world.device, world.sizes

    fp32 = itertools.product([torch.float32], OPTIONS, reference.REDUCTIONS)
    for dtype, name, reduction in [*fp32, *itertools.product([torch.bfloat16], OPTIONS, ["mean"])]:
        logits, labels, arguments = problem(device, dtype, VOCAB, reduction)
        shape = (2, 13) if reduction == "none" else ()
        world.check(logits, labels, torch.randn(shape, device=device), **arguments, **options_on(name, VOCAB, device))
    logits, labels, arguments = problem(device, torch.float16, VOCAB)
    world.check(logits, labels, torch.tensor(0.5, device=device), z_loss=1e-3, **arguments)
    if device.type == "cpu":
        logits, labels, arguments = problem(device, torch.float64, VOCAB)
        loss, grad = world.loss_and_grad(logits, labels, label_smoothing=0.1, **arguments)
        exact = logits.requires_grad_()
        expected = reference.cross_entropy(exact, labels, label_smoothing=0.1, **arguments)
        expected.backward()
        # Smoothing's own factor is fp32 in every kernel.
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-7, atol=0)
        torch.testing.assert_close(grad, exact.grad[..., world.here], rtol=1e-6, atol=1e-9)

    logits, labels, arguments = problem(device, torch.float32, VOCAB)
    for num_items in (7.5, torch.tensor(7.5, device=device), torch.tensor(12)):
        for reduction in ("mean", "seq-mean-token-mean"):
            world.check(logits, labels, **{**arguments, "reduction": reduction, "num_items": num_items})

    # A whole shard of -inf, a target in it, and rows that do not count holding NaN.
    logits[..., : sizes[0]] = -torch.inf
    labels = labels.clamp(min=sizes[0])
    labels[0, 3] = labels[1, 1] = -100
    logits[0, 3] = torch.nan
    world.check(logits, labels)
    logits[0, 3] = 0.0
    world.check(logits, labels, z_loss=0.1)
    labels[0, 0] = 5
    loss, grad = world.loss_and_grad(logits, labels, reduction="none")
    assert loss[0, 0] == torch.inf
    assert loss.isinf().sum() == 1
    assert grad.isfinite().all()

    # A confident row: p - 1 to the last digit that the dtype has.
    logits = torch.randn(6, VOCAB, device=device).bfloat16()
    labels = torch.tensor([0, 63, 70, 141, 150, VOCAB - 1], device=device)
    logits[torch.arange(6, device=device), labels] = torch.tensor([8.0, 10, 12, 13, 14, 15], device=device).bfloat16()
    _, grad = world.loss_and_grad(logits, labels, reduction="sum")
    exact = logits.double().requires_grad_()
    reference.cross_entropy(exact, labels, reduction="sum").backward()
    for row, label in enumerate(labels.tolist()):
        if world.here.start <= label < world.here.stop:
            expected = exact.grad[row, label].item()
            assert grad[row, label - world.begin].item() == pytest.approx(expected, rel=EPS[torch.bfloat16], abs=2.0**-24)

    # Nothing counts; no rows at all.
    loss, grad = world.loss_and_grad(logits, torch.full_like(labels, -100))
    assert loss == 0
    assert (grad == 0).all()
    loss, grad = world.loss_and_grad(logits[:0], labels[:0])
    assert loss == 0
    assert grad.shape == (0, sizes[rank])

    in_place(world)
    bad_input(world)
    subgroup(world)
    linear_form(world)
    if device.type == "cuda":
        replay(world)
        memory(world)


def in_place(world):
    logits, labels, arguments = problem(world.device, torch.float32, VOCAB)
    for reduction in ("mean", "none"):
        grad_output = torch.randn((2, 13) if reduction == "none" else (), device=world.device)
        options = {**arguments, "reduction": reduction}
        # Both from the same layout: by their alignment, the vectors of a row are summed in another order.
        expected, result = (
            world.loss_and_grad(logits, labels, grad_output, computed=True, inplace=inplace, **options)
            for inplace in (False, True)
        )
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1], expected[1])
    leaf = logits[..., world.here].clone().requires_grad_()
    with pytest.raises(ValueError, match="inplace=True would overwrite a leaf"):
        packops.vocab_parallel_cross_entropy(leaf, labels, shard_sizes=world.sizes, inplace=True)

    computed = leaf * 1
    if computed.numel():
        loss = packops.vocab_parallel_cross_entropy(computed, labels, shard_sizes=world.sizes, inplace=True)
        kept = computed.detach().clone()
        (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert torch.equal(computed, kept)  # the graph is kept, and so is what it needs
        (second,) = torch.autograd.grad(loss, leaf)
        assert torch.equal(first, second)
        assert torch.equal(computed, second)
    else:
        packops.vocab_parallel_cross_entropy(computed, labels, shard_sizes=world.sizes, inplace=True)
    with torch.no_grad():
        packops.vocab_parallel_cross_entropy(leaf, labels, shard_sizes=world.sizes, inplace=True)


def bad_input(world):
    device, sizes = world.device, world.sizes
    shard, labels = torch.randn(3, sizes[world.rank], device=device), torch.tensor([3, VOCAB, 4], device=device)
    loss = packops.vocab_parallel_cross_entropy
    if device.type == "cpu":
        with pytest.raises(
            IndexError, match=rf"vocab_parallel_cross_entropy: label {VOCAB} at position 1 is outside \[0, {VOCAB}\)"
        ):
            loss(shard, labels, shard_sizes=sizes)
    else:
        assert loss(shard, labels, shard_sizes=sizes, reduction="none").isnan().tolist() == [False, True, False]
        packops.checks(True)
        with pytest.raises(IndexError, match=f"label {VOCAB} at position 1"):
            loss(shard, labels, shard_sizes=sizes)
        packops.checks(False)
    # Widths that nobody said are unequal: every rank notices.
    uneven, small = torch.randn(3, 5 + world.rank, device=device), labels.clamp(max=4)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"do not line up.*shards that differ in width need shard_sizes"):
            loss(uneven, small)
    else:
        assert loss(uneven, small).isnan()
        packops.checks(True)
        with pytest.raises(ValueError, match="do not line up"):
            loss(uneven, small)
        packops.checks(False)
    with pytest.raises(ValueError, match=rf"one entry per rank \({world.world_size}\), got 1"):
        loss(shard, labels, shard_sizes=sizes[:1])
    with pytest.raises(ValueError, match="must hold this rank's width"):
        loss(shard, labels, shard_sizes=[size + 1 for size in sizes])
    with pytest.raises(ValueError, match="0-d tensor"):
        loss(shard.sum(), labels)
    with pytest.raises(ValueError, match="vocab_parallel_cross_entropy: reduction must be none"):
        loss(shard, labels, shard_sizes=sizes, reduction="avg")


def subgroup(world):
    """Two groups at once, each with a vocabulary of its own; and a group of one."""
    halves = [dist.new_group(list(range(half, world.world_size, 2))) for half in range(2)]
    group = halves[world.rank % 2]
    members = world.world_size // 2
    torch.manual_seed(1 + world.rank % 2)
    logits = torch.randn(9, 14 * members, device=world.device)
    labels = torch.randint(0, 14 * members, (9,), device=world.device)
    place = world.rank // 2
    shard = logits[:, 14 * place : 14 * (place + 1)].detach().requires_grad_()
    loss = packops.vocab_parallel_cross_entropy(shard, labels, group=group)
    loss.backward()
    whole = logits.detach().requires_grad_()
    expected = packops.cross_entropy(whole, labels)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(shard.grad, whole.grad[:, 14 * place : 14 * (place + 1)])
    other = halves[1 - world.rank % 2]
    with pytest.raises(ValueError, match="this process is not in group"):
        packops.vocab_parallel_cross_entropy(shard, labels, group=other)
    torch.manual_seed(2)


def linear_form(world):
    """Against the logits made whole, and the hidden states' gradient the same on every rank."""
    sizes = LINEAR_SIZES[world.world_size]
    begin = begins(sizes)[world.rank]
    here = slice(begin, begin + sizes[world.rank])
    cases = itertools.product(
        [torch.float32, torch.bfloat16],
        ["plain", "class_weight+smoothing", "z_loss+softcap+scale"],
        ["seq-mean-token-mean", "none"],
        [None, 7],
    )
    for number, (dtype, name, reduction, chunk_tokens) in enumerate(cases):
        _, labels, options = problem(world.device, dtype, VOCAB)
        if number % 2:
            options["num_valid"] = 20
        options.update(options_on(name, VOCAB, world.device), reduction=reduction)
        full = {
            "hidden": torch.randn(2, 13, 24, device=world.device).to(dtype),
            "weight": torch.randn(VOCAB, 24, device=world.device).to(dtype) / 2,
            "bias": torch.randn(VOCAB, device=world.device).to(dtype),
        }
        local = {"hidden": full["hidden"].clone(), "weight": full["weight"][here].clone(), "bias": full["bias"][here].clone()}
        whole = {key: x.clone() for key, x in full.items()}
        for x in (*local.values(), *whole.values()):
            x.requires_grad_()
        loss = packops.vocab_parallel_linear_cross_entropy(
            local["hidden"],
            local["weight"],
            labels,
            local_bias=local["bias"],
            shard_sizes=sizes,
            chunk_tokens=chunk_tokens,
            **options,
        )
        expected = packops.linear_cross_entropy(whole["hidden"], whole["weight"], labels, bias=whole["bias"], **options)
        grad_output = torch.randn_like(loss)
        loss.backward(grad_output)
        expected.backward(grad_output)
        world.same_bits(loss)
        world.same_bits(local["hidden"].grad)
        tolerance = {"rtol": 2e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-3}
        torch.testing.assert_close(loss, expected, rtol=1e-5 if dtype == torch.float32 else 5e-3, atol=1e-5)
        for key, x in local.items():
            theirs = whole[key].grad if key == "hidden" else whole[key].grad[here]
            torch.testing.assert_close(x.grad, theirs, **tolerance)

    # Ranks of unequal width go through chunks of equal length, or they would wait for each other: their own widths would make
    # these chunks of 8 and of 4 rows.
    hidden, weight = full["hidden"].float(), full["weight"][here].float()
    with mock.patch.multiple(lm_head, MIN_ROWS=4, LOGITS_SHARE=0.408):
        packops.vocab_parallel_linear_cross_entropy(hidden, weight, labels, shard_sizes=sizes)

    # Frozen halves; under autocast; without a gradient.
    _, labels, _ = problem(world.device, torch.float32, VOCAB)
    plain = packops.linear_cross_entropy(hidden, full["weight"].float(), labels)
    for frozen in (0, 1, 2):
        h, w = hidden.clone().requires_grad_(frozen != 0), weight.clone().requires_grad_(frozen != 1)
        loss = packops.vocab_parallel_linear_cross_entropy(h, w, labels, shard_sizes=sizes)
        loss.backward()
        assert (h.grad is None) == (frozen == 0)
        assert (w.grad is None) == (frozen == 1)
        torch.testing.assert_close(loss.detach(), plain)
    with torch.no_grad(), torch.autocast(world.device.type, torch.bfloat16):
        loss = packops.vocab_parallel_linear_cross_entropy(hidden, weight, labels, shard_sizes=sizes)
    torch.testing.assert_close(loss, plain, rtol=2e-2, atol=0)
    # A weight that one rank alone trains, and the gradient of each token on its own.
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(world.rank == 0)
    losses = packops.vocab_parallel_linear_cross_entropy(h, w, labels, shard_sizes=sizes, reduction="none")
    losses.backward(torch.ones_like(losses))
    world.same_bits(h.grad)
    # Without gradients nobody adds them up, whatever a tensor would need: the next thing to be added up is what comes next.
    with torch.no_grad():
        h = hidden.clone().requires_grad_(world.rank == 0)
        packops.vocab_parallel_linear_cross_entropy(h, weight, labels, shard_sizes=sizes)
        ones = torch.ones_like(hidden)
        dist.all_reduce(ones)
        assert (ones == world.world_size).all()
    # Ranks without classes.
    everything_here = [VOCAB] + [0] * (world.world_size - 1)
    for dtype, reduction in itertools.product([torch.float32, torch.bfloat16], ["mean", "none"]):
        h, whole, of_whole = (x.detach().clone().to(dtype).requires_grad_() for x in (hidden, full["weight"], hidden))
        local = whole.detach()[: everything_here[world.rank]].clone().requires_grad_()
        options = {"reduction": reduction, "label_smoothing": 0.1}
        loss = packops.vocab_parallel_linear_cross_entropy(h, local, labels, shard_sizes=everything_here, **options)
        expected = packops.linear_cross_entropy(of_whole, whole, labels, **options)
        torch.testing.assert_close(loss, expected, rtol=1e-5 if dtype == torch.float32 else 5e-3, atol=1e-5)
        got = torch.autograd.grad(loss.sum(), (h, local))
        want = torch.autograd.grad(expected.sum(), (of_whole, whole))
        tolerance = {"rtol": 2e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-3}
        torch.testing.assert_close(got[0], want[0], **tolerance)
        torch.testing.assert_close(got[1], want[1][: len(local)], **tolerance)


def replay(world):
    """The whole of it, collective included, in a CUDA graph, replayed on other data."""
    size = 4000
    shard = torch.randn(64, size, device=world.device, requires_grad=True)
    labels = torch.randint(0, size * world.world_size, (64,), device=world.device)

    def step():
        loss = packops.vocab_parallel_cross_entropy(shard, labels, label_smoothing=0.1)
        return loss, *torch.autograd.grad(loss, shard)

    for _ in range(2):
        step()
    with no_host_sync():
        step()
    graph, captured = capture(step, capture_error_mode="thread_local")  # NCCL's watchdog asks for events meanwhile
    with torch.no_grad():
        shard.copy_(torch.randn_like(shard))
    labels.copy_(torch.randint_like(labels, 0, size * world.world_size))
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        assert torch.equal(one, other)


def memory(world):
    """No gathered logits: the loss takes a few numbers per row, the backward the gradient and nothing else."""
    rows, size = 2048, 32768
    shard = torch.randn(rows, size, device=world.device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, size * world.world_size, (rows,), device=world.device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = packops.vocab_parallel_cross_entropy(shard, labels)
    assert torch.cuda.max_memory_allocated() - before < 200 * rows * world.world_size
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 1.01 * shard.numel() * 2 + 200 * rows * world.world_size


@fabrics(2, 4, gpus=(2, 4))
def test_vocab_parallel(backend, world_size, tmp_path):
    run_ranks(world_size, tmp_path, vocab_parallel, world_size, backend=backend)


def test_without_a_group():
    with pytest.raises(RuntimeError, match=r"vocab_parallel_cross_entropy: torch\.distributed is not initialised"):
        packops.vocab_parallel_cross_entropy(torch.randn(3, 5), torch.tensor([1, 2, 3]))


# ---- data parallel -----------------------------------------------------------------------------------------------------------

LENGTHS = [3, 17, 1, 9, 30, 2, 2, 25, 11, 6, 1, 14, 8, 5, 21, 32, 4, 19, 7, 28, 12, 1, 16, 3]
ACCUMULATED = 2  # micro-batches of a step
TOKENS = 61


def make_documents():
    generator = torch.Generator().manual_seed(0)
    documents = [{"input_ids": torch.randint(0, TOKENS, (n,), generator=generator).tolist()} for n in LENGTHS]
    documents[4]["labels"] = [-100] * 25 + documents[4]["input_ids"][25:]
    return documents


def make_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).to(this_device())
    return model.double() if this_device().type == "cpu" else model


def loss_of(model, batch: PackedBatch, reduction, num_items=None):
    mask = batch.attention_mask("4d", dtype=torch.float64 if batch.device.type == "cpu" else torch.float32)
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False).logits
    return packops.cross_entropy(
        logits, batch.labels, cu_seqlens=batch.cu_seqlens, shift=True, reduction=reduction, num_items=num_items
    )


def steps_of(rank, world_size):
    """The documents of every micro-batch of every step of a rank."""
    micro_batches = list(PackedBatchSampler(LENGTHS, 32, balance="none", rank=rank, world_size=world_size))
    return [micro_batches[i : i + ACCUMULATED] for i in range(0, len(micro_batches), ACCUMULATED)]


def collate(micro_batch):
    documents = make_documents()
    return PackingCollator()([documents[i] for i in micro_batch]).to(this_device())


def optimizer_of(model):
    # Not Adam: it would forgive gradients of a wrong scale.
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def trained_by_one(world_size, reduction):
    """Weights after the same steps, each with all documents of all ranks in one pack of one process."""
    model = make_llama()
    optimizer = optimizer_of(model)
    for step in zip(*(steps_of(rank, world_size) for rank in range(world_size)), strict=True):
        everything = [document for micro_batches in step for micro_batch in micro_batches for document in micro_batch]
        loss_of(model, collate(everything), reduction).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def trained_by_ranks(rank, world_size, reduction, wrap, set_sync, normalise=True, applied=False):
    model = make_llama()
    if applied:
        packops.hf.apply(model, attention="packops_varlen", reduction=reduction)
    parallel = wrap(model)
    optimizer = optimizer_of(model)
    for step in steps_of(rank, world_size):
        batches = [collate(micro_batch) for micro_batch in step]
        num_items = packops.loss_normalizer(batches, reduction=reduction) if normalise else None
        for number, batch in enumerate(batches):
            set_sync(parallel, number == len(batches) - 1)
            if applied:
                loss = parallel(**batch.to_hf(), num_items_in_batch=num_items).loss
            else:
                loss = loss_of(parallel, batch, reduction, num_items)
            (loss if normalise else loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def wrap_ddp(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def sync_ddp(parallel, on):
    parallel.require_backward_grad_sync = on


def wrap_fsdp(model):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(this_device().type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def wrap_fsdp_finely(model):
    """Also what packops reads the weights of without calling it, each on its own: gathered by nobody but its own hooks."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        for module in (layer.mlp.down_proj, layer.self_attn, layer.input_layernorm):
            fully_shard(module)
    fully_shard([model.model.norm, model.lm_head])
    return wrap_fsdp(model)


def sync_fsdp(parallel, on):
    parallel.set_requires_gradient_sync(on)


def tolerance():
    # Llama's norms are fp32 even in a double model.
    return {"rtol": 1e-6, "atol": 1e-7} if this_device().type == "cpu" else {"rtol": 1e-4, "atol": 2e-6}


def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def data_parallel(rank, world_size):
    scored = torch.tensor([sum(collate(m).num_items for m in step) for step in steps_of(rank, world_size)])
    of_ranks = [torch.empty_like(scored) for _ in range(world_size)]
    dist.all_gather_object(of_ranks, scored)
    assert all((a != b).any() for a, b in itertools.pairwise(of_ranks)), "ranks must differ for this test to mean something"
    for reduction in ("mean", "seq-mean-token-mean"):
        expected = trained_by_one(world_size, reduction)
        for wrap, set_sync in ((wrap_ddp, sync_ddp), (wrap_fsdp, sync_fsdp)):
            model = trained_by_ranks(rank, world_size, reduction, wrap, set_sync)
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(
                    whole(parameter).detach(), expected[name].detach(), **tolerance(), msg=lambda m, n=name: f"{n}: {m}"
                )
    careless = trained_by_ranks(rank, world_size, "mean", wrap_ddp, sync_ddp, normalise=False).lm_head.weight
    difference = (careless - trained_by_one(world_size, "mean")["lm_head.weight"]).abs().max()
    assert difference > 1e-3, "means of means must show, or the tolerances above mean nothing"


@fabrics(2, gpus=(2, 4))
def test_data_parallel_gives_the_weights_of_one_process(backend, world_size, tmp_path):
    """DDP and FSDP2 with gradient accumulation, ranks of unequal token counts, and loss_normalizer."""
    pytest.importorskip("transformers")
    run_ranks(world_size, tmp_path, data_parallel, world_size, backend=backend)


def data_parallel_of_applied(rank, world_size):
    for reduction in ("mean", "seq-mean-token-mean"):
        expected = trained_by_one(world_size, reduction)
        for wrap, set_sync in ((wrap_ddp, sync_ddp), (wrap_fsdp, sync_fsdp), (wrap_fsdp_finely, sync_fsdp)):
            model = trained_by_ranks(rank, world_size, reduction, wrap, set_sync, applied=True)
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(
                    whole(parameter).detach(),
                    expected[name].detach(),
                    **tolerance(),
                    msg=lambda m, n=f"{wrap.__name__}, {name}": f"{n}: {m}",
                )


@fabrics(2)
def test_data_parallel_of_a_model_that_packops_changed(backend, world_size, tmp_path):
    """``apply`` before DDP and FSDP2: weights that packops reads outside of the module they belong to are there."""
    pytest.importorskip("transformers")
    run_ranks(world_size, tmp_path, data_parallel_of_applied, world_size, backend=backend)


def mixed_precision_of_applied(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    batch, losses = collate([3, 5, 8]), []
    counts = [torch.tensor(1003.0, dtype=torch.float64, device=this_device()), 1003.0]
    for count, casts in ((counts[1], True), (counts[0], False)):
        model = packops.hf.apply(make_llama().float(), attention="packops_varlen")
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=casts)
        fully_shard(model, mesh=dist.init_device_mesh(this_device().type, (dist.get_world_size(),)), mp_policy=policy)
        if casts:
            with pytest.raises(ValueError, match=r"num_items_in_batch must be .*, got torch.bfloat16"):
                model(**batch.to_hf(), num_items_in_batch=counts[0])
        losses.append(model(**batch.to_hf(), num_items_in_batch=count).loss)
        torch.testing.assert_close(losses[-1], model(**batch.to_hf()).loss * batch.num_items / 1003.0)
    assert torch.equal(*losses)


@fabrics(2)
def test_mixed_precision_does_not_round_the_count(backend, world_size, tmp_path):
    """FSDP casts what the model is called with."""
    pytest.importorskip("transformers")
    run_ranks(world_size, tmp_path, mixed_precision_of_applied, backend=backend)


# ---- context parallel --------------------------------------------------------------------------------------------------------


def zig_zag(lengths, ranks):
    """Tokens of a packed axis that each rank has: of every document's 2 * ranks pieces, piece r and the r-th from the end."""
    tokens = [[] for _ in range(ranks)]
    begin = 0
    for length in lengths:
        pieces = torch.arange(begin, begin + length).chunk(2 * ranks)
        for rank in range(ranks):
            tokens[rank] += [pieces[rank], pieces[2 * ranks - 1 - rank]]
        begin += length
    return [torch.cat(pieces) for pieces in tokens]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_on_zig_zag_slices(device, dtype, ranks):
    """A rank of a context-parallel group rotates its slices by ``position_ids``: bit for bit what the whole sequence gets."""
    lengths = [16, 8, 40, 24]
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    q, k = torch.randn(total, 4, 32, device=device).to(dtype), torch.randn(total, 2, 32, device=device).to(dtype)
    cos, sin = packops.rope_table(32, 64, device=device)
    gq, gk = torch.randn_like(q), torch.randn_like(k)

    def rotate(q, k, gq, gk, **positions):
        q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
        rotated = packops.apply_rope(q, k, cos, sin, **positions)
        return *rotated, *torch.autograd.grad(rotated, (q, k), (gq, gk))

    whole = rotate(q, k, gq, gk, cu_seqlens=cu_seqlens)
    position_ids, _ = packops.packed_metadata(cu_seqlens, total)
    slices = zig_zag(lengths, ranks)
    assert torch.cat(slices).sort().values.equal(torch.arange(total))
    for tokens in slices:
        tokens = tokens.to(device)
        parts = rotate(q[tokens], k[tokens], gq[tokens], gk[tokens], position_ids=position_ids[tokens])
        for part, of_whole in zip(parts, whole, strict=True):
            assert torch.equal(part, of_whole[tokens])


class GatherRanks(torch.autograd.Function):
    """The rows of all ranks, each of which has as many."""

    @staticmethod
    def forward(ctx, rows):
        of_ranks = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(of_ranks, rows.contiguous())
        return torch.cat(of_ranks)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def context_parallel(rank, world_size):
    """One layer with everything that mixes tokens, its documents cut over the ranks, against the same in one process."""
    lengths, heads, width, classes = [16, 8, 40, 24], 2, 16, 37
    device, total = this_device(), 88
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, classes, (total,), generator=generator).to(device)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    positions, documents = packops.packed_metadata(cu_seqlens, total)
    labels = torch.where(positions.roll(-1) == 0, -100, ids.roll(-1))
    labels[3:9] = -100
    scored = labels != -100
    counts = torch.zeros(len(lengths), device=device, dtype=torch.float64).index_add_(0, documents.long(), scored.double())
    token_weight = torch.where(scored, 1 / counts[documents.long()], 0.0).float()
    cos, sin = packops.rope_table(width, 64, device=device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
    torch.manual_seed(1)
    shapes = [(classes, heads * width), (heads * width, 3 * heads * width), (heads * width, classes)]
    weights = [torch.randn(shape, device=device, dtype=cos.dtype).div_(4).requires_grad_() for shape in shapes]
    sees = (documents[:, None] == documents) & (positions[:, None] >= positions)

    def loss(tokens, everything, gather, **reduction):
        embedding, projection, head = weights
        q, k, v = (embedding[ids[tokens]] @ projection).view(len(tokens), 3, heads, width).unbind(1)
        q, k = packops.apply_rope(q, k, cos, sin, position_ids=positions[tokens])
        k, v = gather(k), gather(v)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (q, k, v)), attn_mask=sees[tokens][:, everything]
        )
        return packops.cross_entropy(mixed.transpose(0, 1).flatten(1) @ head, labels[tokens], **reduction)

    def gradients(value):
        value.backward()
        found = [weight.grad for weight in weights]
        for weight in weights:
            weight.grad = None
        return found

    every = torch.arange(total, device=device)
    options = {"reduction": "seq-mean-token-mean", "cu_seqlens": cu_seqlens}
    expected_loss = loss(every, every, lambda x: x, **options)
    expected = gradients(expected_loss)

    slices = [tokens.to(device) for tokens in zig_zag(lengths, world_size)]
    mine, everything = slices[rank], torch.cat(slices)
    part = loss(
        mine,
        everything,
        GatherRanks.apply,
        token_weight=token_weight[mine],
        reduction="sum",
    ) / len(lengths)
    found = gradients(part)
    for summed in (total_loss := part.detach().clone(), *found):
        dist.all_reduce(summed)
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if device.type == "cpu" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(total_loss, expected_loss.detach(), **tolerance)
    for of_ranks, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(of_ranks, whole, **tolerance)


@fabrics(2, 4, gpus=(2, 4))
def test_documents_cut_over_ranks_train_as_in_one_process(backend, world_size, tmp_path):
    """Context parallel: RoPE takes ``position_ids``, the loss weighs tokens by their document."""
    run_ranks(world_size, tmp_path, context_parallel, world_size, backend=backend)


# ---- resumption on other ranks -----------------------------------------------------------------------------------------------


def train_some_steps(rank, world_size, folder, name, state, steps):
    """A loader with workers over this rank's share, for so many steps; writes what was trained on and where it stands."""
    sampler = PackedBatchSampler(LENGTHS, 32, seed=3, rank=rank, world_size=world_size)
    if state is not None:
        sampler.load_state_dict(torch.load(folder / state, weights_only=True))
    dataset = [{"input_ids": [1] * length, "number": number} for number, length in enumerate(LENGTHS)]
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=_numbers, num_workers=1)
    trained = []
    for number, documents in enumerate(loader, 1):
        trained += documents
        dist.barrier()  # ranks train a step together
        if number == steps:
            break
    torch.save(trained, folder / f"{name}-{rank}.pt")
    if rank == 0 and steps is not None:
        torch.save(sampler.state_dict(step=steps), folder / name)


def _numbers(documents):
    return [document["number"] for document in documents]


def test_a_run_resumes_on_half_its_ranks(tmp_path):
    """Eight processes stop after a step, four others go on: every document is trained on once."""
    (tmp_path / "first").mkdir(), (tmp_path / "second").mkdir()
    run_ranks(8, tmp_path / "first", train_some_steps, 8, tmp_path, "state", None, 1)
    run_ranks(4, tmp_path / "second", train_some_steps, 4, tmp_path, "rest", "state", None)
    trained = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("*-*.pt"))]
    assert len(trained) == 12
    assert all(trained)
    assert sorted(number for part in trained for number in part) == list(range(len(LENGTHS)))


# ---- refusals ----------------------------------------------------------------------------------------------------------------


def _what_one_rank_cannot_accept(rank):
    def call(op, width=4, sizes=None, labels=LABELS, dtype=torch.float32, rows=5, features=3, needs_gradient=False, **options):
        if op == "vocab_parallel_cross_entropy":
            return packops.vocab_parallel_cross_entropy(
                torch.randn(rows, width).to(dtype), labels, shard_sizes=sizes, reduction="sum", **options
            )
        hidden = torch.randn(rows, 3, requires_grad=needs_gradient)
        weight = torch.randn(width, features).to(dtype)
        return getattr(packops, op)(hidden, weight, labels, shard_sizes=sizes, **options)

    def here(*each):
        return each[rank]

    of_all = {
        "no shard on the last rank": {"width": here(8, 0)},
        "no shard on the first rank": {"width": here(0, 8)},
        "unlike widths that nobody said": {"width": here(8, 4)},
        "a width that is not as said": {"width": here(8, 4), "sizes": [8, 8]},
        "ranks that say different things": {"width": here(8, 4), "sizes": here([8, 4], [4, 4])},
        "one that says too little": {"width": here(8, 4), "sizes": here([8, 4], [8])},
        "rows that are not those of the labels": {"rows": here(5, 6)},
        "as many rows and labels as others have not": {"rows": here(5, 4), "labels": here(LABELS, LABELS[:4])},
        "a dtype that is none": {"dtype": here(torch.int64, torch.float32)},
        "a label that is no class": {"labels": here(LABELS, LABELS + 3)},
        "boundaries beyond the rows": {"cu_seqlens": here(torch.tensor([0, 5]), torch.tensor([0, 6]))},
    }
    of_linear = {
        "another hidden size": {"features": here(3, 4)},
        "another number of turns": {"chunk_tokens": here(2, 3)},
        "rows left out on one rank": {"num_valid": here(5, None)},
        "a gradient that one rank does not want": {"needs_gradient": here(True, False)},
        "main_grad of another shape": {"main_grad": here(None, torch.zeros(4, 2))},
    }
    for op in ("vocab_parallel_cross_entropy", "vocab_parallel_linear_cross_entropy", "vocab_parallel_linear_log_probs"):
        refused = of_all if op == "vocab_parallel_cross_entropy" else of_all | of_linear
        no_rows = {"rows": 0, "labels": LABELS[:0], "cu_seqlens": here(torch.tensor([0, 0]), torch.tensor([0, 1]))}
        refused = refused | {"boundaries beyond no rows": no_rows}
        if op != "vocab_parallel_cross_entropy":
            no_valid = {
                "num_valid": 0,
                "labels": torch.full((5,), -100),
                "cu_seqlens": of_all["boundaries beyond the rows"]["cu_seqlens"],
            }
            refused |= {"boundaries beyond no rows, with a gradient": no_rows | {"needs_gradient": True}}
            refused |= {"boundaries beyond rows of which none counts": no_valid | {"needs_gradient": True}}
        if op != "vocab_parallel_linear_log_probs":
            refused = refused | {"a class_weight of one shard": {"class_weight": here(torch.ones(8), torch.ones(4))}}
        if op == "vocab_parallel_linear_log_probs":  # ranks meet once
            refused = {name: arguments for name, arguments in refused.items() if "chunk_tokens" not in arguments}
            call(op, chunk_tokens=here(2, 3))
        for name, arguments in refused.items():
            with pytest.raises((ValueError, TypeError, IndexError), match=f"packops.{op}: "):
                call(op, **arguments), print(f"{op} accepts {name}")
            dist.barrier()  # nobody is one call ahead
        call(op, here(5, 3), [5, 3])
        call(op, here(0, 8), [0, 8])
        call(op, rows=0, labels=LABELS[:0], needs_gradient=True)


LABELS = torch.tensor([0, 5, 7, 3, 1])


def test_where_one_rank_refuses_its_arguments_all_do(tmp_path):
    """The others would wait for it until the timeout, or take its next call for this one and return a number."""
    run_ranks(2, tmp_path, _what_one_rank_cannot_accept)
