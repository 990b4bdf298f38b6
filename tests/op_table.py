"""Every op of packops, its inputs and, for each of its options, a value that must change the result. Tests over all ops share it.

test_options.py asks whether every option arrives in every way to call an op, test_strides.py whether any argument may have
strides of its own. An op that is not here fails test_options.py, and so does an option.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import packops
from packops.ops.op import Composed

ops = torch.ops.packops
T, V, H, D = 9, 37, 8, 16


def rand(*shape: int) -> Tensor:
    """Numbers that bf16 holds exactly, so that a cast changes nothing by itself."""
    return torch.randn(*shape).bfloat16().float()


@dataclasses.dataclass
class Changes:
    """An option, a value that changes the result, and what else the call needs for it to have an effect."""

    value: Any
    beside: dict[str, Any] = dataclasses.field(default_factory=dict)  # options of both calls
    instead_of: Any = inspect.Parameter.empty  # the value it is compared with; by default the option is left out
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # other inputs for both calls


@dataclasses.dataclass
class Refused(Changes):
    """An option that only says how to compute: a value that is refused shows that it arrives."""

    message: str = ""


class Elsewhere(str):
    """An option that a test of its own covers; the text says which."""


@dataclasses.dataclass
class Op:
    """One op: its inputs, in the order of its arguments, and its options."""

    function: Callable[..., Any]
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    op: Any = None  # of torch.ops.packops
    always: dict[str, Any] = dataclasses.field(default_factory=dict)
    lower: tuple[str, ...] = ()  # cast to bf16 by autocast
    wider: tuple[str, ...] = ()  # cast to fp32 by autocast
    cuda_dtype: torch.dtype = torch.float32  # what its CUDA kernels take
    constant: tuple[str, ...] = ()  # floating tensors without a gradient
    contiguous: tuple[str, ...] = ()  # refused unless contiguous
    compared: int | None = None  # so many results of the op; None: all
    plain: Callable[..., Any] | None = None  # for the form over ranks: the function that it agrees with
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)  # ... and the names that differ there


def build() -> dict[str, Op]:
    torch.manual_seed(0)
    labels = torch.randint(0, V, (T,))
    labels[4] = 3
    cu_seqlens = torch.tensor([0, 2, 6, 8], dtype=torch.int32)
    parents = torch.tensor([-1, 0, 0], dtype=torch.int32)

    loss = {
        "cu_seqlens": Changes(cu_seqlens, {"shift": True}),
        "shift": Changes(True),
        "reduction": Changes("sum"),
        "num_items": Changes(torch.tensor(7)),
        "ignore_index": Changes(3),
        "token_weight": Changes(torch.rand(T)),
        "class_weight": Changes(torch.rand(V)),
        "label_smoothing": Changes(0.2),
        "z_loss": Changes(0.1),
        "softcap": Changes(1.5),
        "logit_scale": Changes(0.5),
    }
    hidden = {"hidden": rand(T, H), "weight": rand(V, H), "labels": labels}
    local = {"hidden": hidden["hidden"], "local_weight": hidden["weight"], "labels": labels}
    halves = {name: hidden[name].bfloat16() for name in ("hidden", "weight")}
    chunks = {
        "num_valid": Refused(2, message="num_valid"),
        "chunk_tokens": Refused(0, message="chunk_tokens"),
        "main_grad": Elsewhere("test_main_grad.py"),
    }
    inplace = Elsewhere("test_in_place")
    linear = {
        **loss,
        **chunks,
        "bias": Changes(rand(V)),
        "accum_dtype": Changes(torch.bfloat16, {"chunk_tokens": 2}, tensors=halves),
        "logits_dtype": Changes(torch.float32, tensors=halves),
    }
    log_probs = {
        **{name: loss[name] for name in ("cu_seqlens", "shift", "ignore_index", "softcap", "logit_scale")},
        **chunks,
        "bias": Changes(rand(V)),
        "entropy": Changes(False),
    }
    ranks = {"shard_sizes": Refused([V - 1], message="shard"), "group": Elsewhere("test_distributed.py")}
    over_ranks = {"weight": "local_weight", "bias": "local_bias", "logits": "local_logits"}

    def for_ranks(table: dict[str, Any]) -> dict[str, Any]:
        def renamed(change: Any) -> Any:
            if not isinstance(change, Changes):
                return change
            return dataclasses.replace(change, tensors={over_ranks.get(k, k): x for k, x in change.tensors.items()})

        return {over_ranks.get(name, name): renamed(change) for name, change in table.items()} | ranks

    tables = {"cos": torch.rand(T, D // 2), "sin": torch.rand(T, D // 2)}
    heads = {"q": rand(T, 3, D), "k": rand(T, 2, D)}
    ids = torch.tensor([3, 1, 4, 1, 5, 2, 6, 5, 3])
    axes = torch.stack([ids, ids.flip(0), ids.roll(1)])
    in_batches = {"q": rand(2, 3, 3, D), "k": rand(2, 3, 3, D)}
    half = rand(T, D // 4)
    doubled = {"cos": torch.cat([half, half], 1), "sin": torch.cat([half, half], 1)}
    rope = {
        "position_ids": Changes(ids),
        "cu_seqlens": Changes(cu_seqlens),
        "layout": Changes("bhsd", tensors=in_batches, instead_of="bshd"),
        "interleaved": Changes(True),
        "rotary_dim": Changes(D // 2, tensors=doubled, instead_of=D),
        "rotary_offset": Changes(4, tensors={name: x[:, : D // 4] for name, x in tables.items()}),
        "mrope_section": Changes([2, 4, 2], {"position_ids": axes}, instead_of=[4, 2, 2]),
        "mrope_interleaved": Changes(True, {"position_ids": axes, "mrope_section": [4, 2, 2]}),
        "per_token_table": Changes(True, tensors={**in_batches, "cos": torch.rand(6, D // 2), "sin": torch.rand(6, D // 2)}),
    }
    weights = {"q_weight": rand(D), "k_weight": rand(D)}
    gated = {"gate": rand(T, D), "up": rand(T, D)}
    mlp = {"x": rand(T, H), "gate_weight": rand(D, H), "up_weight": rand(D, H), "down_weight": rand(5, D)}
    mlp |= {"gate_bias": rand(D), "up_bias": rand(D), "down_bias": rand(5)}
    packed = {"q": rand(T, 4, 64), "k": rand(T, 2, 64), "v": rand(T, 2, 64), "cu_seqlens": cu_seqlens}
    logits = {"logits": rand(T, V), "labels": labels}
    return {
        "cross_entropy": Op(
            packops.cross_entropy,
            logits,
            {**loss, "inplace": inplace, "return_stats": Changes(True)},
            ops.cross_entropy,
        ),
        # Its statistics are views of few tensors, which packops.cross_entropy takes apart: the loss is what is compared.
        "cross_entropy_stats": Op(packops.cross_entropy, logits, loss, ops.cross_entropy_stats, compared=1),
        "linear_cross_entropy": Op(
            packops.linear_cross_entropy,
            hidden,
            {**linear, "return_stats": Changes(True)},
            ops.linear_cross_entropy,
            lower=("hidden", "weight", "bias"),
        ),
        "linear_cross_entropy_stats": Op(
            packops.linear_cross_entropy,
            hidden,
            linear,
            ops.linear_cross_entropy_stats,
            compared=1,
            lower=("hidden", "weight", "bias"),
        ),
        "linear_log_probs": Op(
            packops.linear_log_probs, hidden, log_probs, ops.linear_log_probs, lower=("hidden", "weight", "bias")
        ),
        "vocab_parallel_cross_entropy": Op(
            packops.vocab_parallel_cross_entropy,
            {"local_logits": logits["logits"], "labels": labels},
            for_ranks({**loss, "inplace": inplace}),
            plain=packops.cross_entropy,
            renamed=over_ranks,
        ),
        "vocab_parallel_linear_cross_entropy": Op(
            packops.vocab_parallel_linear_cross_entropy,
            local,
            for_ranks(linear),
            plain=packops.linear_cross_entropy,
            renamed=over_ranks,
            lower=("hidden", "local_weight", "local_bias"),
        ),
        "vocab_parallel_linear_log_probs": Op(
            packops.vocab_parallel_linear_log_probs,
            local,
            for_ranks(log_probs),
            plain=packops.linear_log_probs,
            renamed=over_ranks,
            lower=("hidden", "local_weight", "local_bias"),
        ),
        "rope": Op(packops.apply_rope, {**heads, **tables}, {**rope, "inplace": inplace}, ops.rope, constant=("cos", "sin")),
        "qk_norm_rope": Op(
            packops.apply_qk_norm_rope,
            {**heads, **weights, **tables},
            {**rope, "eps": Changes(0.5, instead_of=1e-6), "zero_centered": Changes(True)},
            ops.qk_norm_rope,
            always={"eps": 1e-6},
            constant=("cos", "sin"),
            contiguous=("q_weight", "k_weight"),
        ),
        "gated_activation": Op(packops.gated_activation, gated, {"activation": Changes("gelu")}, ops.gated_activation),
        "gated_linear": Op(
            packops.gated_linear,
            {**gated, "weight": rand(5, D), "bias": rand(5)},
            {"activation": Changes("gelu_tanh")},
            ops.gated_linear,
            lower=("gate", "up", "weight", "bias"),
        ),
        "gated_mlp": Op(
            packops.gated_mlp,
            mlp,
            {"activation": Changes("gelu_tanh")},
            ops.gated_mlp,
            lower=tuple(mlp),
        ),
        "rms_norm": Op(
            packops.rms_norm,
            {"x": rand(T, D), "weight": rand(D)},
            {"eps": Changes(0.5, instead_of=1e-6), "zero_centered": Changes(True)},
            ops.rms_norm,
            always={"eps": 1e-6},
        ),
        "add_rms_norm": Op(
            packops.add_rms_norm,
            {"x": rand(T, D), "residual": rand(T, D), "weight": rand(D)},
            {"eps": Changes(0.5, instead_of=1e-6), "zero_centered": Changes(True)},
            ops.add_rms_norm,
            always={"eps": 1e-6},
        ),
        "attention": Op(
            packops.attention,
            packed,
            {
                "causal": Changes(False),
                "window": Changes(2),
                "softcap": Changes(0.5),
                "scale": Changes(0.2),
                "parents": Changes(parents),
            },
            ops.attention,
            lower=("q", "k", "v"),
            cuda_dtype=torch.bfloat16,
        ),
        "packed_labels": Op(
            packops.packed_labels,
            {"labels": labels, "cu_seqlens": cu_seqlens},
            {"shift": Changes(False), "ignore_index": Changes(-7)},
            ops.packed_labels,
        ),
        "packed_metadata": Op(
            packops.packed_metadata,
            {"cu_seqlens": cu_seqlens, "total_tokens": T},
            {"parents": Elsewhere("packed_forest")},
            ops.packed_metadata,
        ),
        "packed_forest": Op(
            packops.packed_metadata, {"cu_seqlens": cu_seqlens, "total_tokens": T, "parents": parents}, {}, ops.packed_forest
        ),
        "document_sums": Op(packops.document_sums, {"values": rand(T), "cu_seqlens": cu_seqlens}, {}, ops.document_sums),
    }


OPS = build()


# --------------------------------------------------------------------------------------------------------------------------------
# What there is


def ops_called_by(function) -> set[str]:
    """Names of the packops ops that run in it, private ones and those that other ops call included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = {event.name() for event in profile.profiler.kineto_results.events()}  # profile.events() takes minutes to nest them
    return {name.removeprefix("packops::") for name in names if name.startswith("packops::")}


def kernels() -> set[str]:
    """Every op that has a kernel of its own, as torch lists them; not those that are made of others."""
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("packops::")}
    composed = {name for kind in Composed.__subclasses__() for name in (f"_{kind.name}", f"_{kind.name}_backward")}
    return {n.split("::")[1] for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, "CPU")} - composed


# --------------------------------------------------------------------------------------------------------------------------------
# Calling


@dataclasses.dataclass
class Call:
    tensors: dict[str, Any]
    options: dict[str, Any]

    def differentiable(self, op: Op) -> list[str]:
        def is_free(name: str, x: Any) -> bool:
            constant = name in op.constant or (name.endswith("_weight") and name in op.options)
            return isinstance(x, Tensor) and x.is_floating_point() and not constant

        return [name for name, x in {**self.tensors, **self.options}.items() if is_free(name, x)]


def calls(op: Op, names: set[str] | None = None) -> dict[str, tuple[Call, Call]]:
    """For each option the call without it and the call with it."""
    found = {}
    for name, change in op.options.items():
        if not isinstance(change, Changes) or isinstance(change, Refused) or (names is not None and name not in names):
            continue
        tensors = {**op.tensors, **change.tensors}
        without = {**op.always, **change.beside}
        if change.instead_of is not inspect.Parameter.empty:
            without[name] = change.instead_of
        found[name] = Call(tensors, without), Call(tensors, {**without, name: change.value})
    if not found:  # no option: the call alone
        found[""] = Call(op.tensors, dict(op.always)), Call(op.tensors, dict(op.always))
    return found


def flatten(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.numel() else []  # nothing, or None: a result that was not asked for
    if outputs is None:
        return []
    if isinstance(outputs, (tuple, list)):
        return [x for output in outputs for x in flatten(output)]
    return [x for field in dataclasses.fields(outputs) for x in flatten(getattr(outputs, field.name))]


def fresh(name: str, x: Tensor) -> Tensor:
    """A copy of an argument's tensor: what :func:`run` gives to an op, unless told otherwise."""
    return x.clone()


def random_like(x: Tensor) -> Tensor:
    """The same numbers on every device and in every dtype."""
    return torch.rand(x.shape).to(x)


def moved(op: Op, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What puts a copy of a tensor on a device, in a dtype that the op takes there."""

    def move(x: Tensor) -> Tensor:
        is_single = x.dtype == torch.float32 and device.type == "cuda"
        return x.to(device, op.cuda_dtype if is_single else x.dtype, copy=True)

    return move


def as_it_is(name: str, x: Tensor) -> Tensor:
    return x


def run(
    op: Op,
    way: Callable[..., list[Any]],
    which: list[Call],
    cast: Callable[[str, Tensor], Tensor] = as_it_is,
    place: Callable[[str, Tensor], Tensor] = fresh,
    incoming: Callable[[Tensor], Tensor] = random_like,
) -> list[list[Tensor]]:
    """Outputs and gradients of each call. ``way`` makes all calls at once, so that it can be compiled as one.

    ``place(name, x)`` makes each tensor that the op gets, ``cast`` stands between a tensor and the op where a gradient flows, and
    ``incoming(x)`` makes the gradient of a result.
    """
    leaves, arguments = [], []
    for call in which:
        free = call.differentiable(op)
        mine = {
            name: place(name, x).requires_grad_(name in free) if isinstance(x, Tensor) else x
            for name, x in {**call.tensors, **call.options}.items()
        }
        leaves.append([mine[name] for name in free])
        given = {name: cast(name, x) if name in free else x for name, x in mine.items()}
        arguments.append(([given[name] for name in call.tensors], {name: given[name] for name in call.options}))
    outputs = [flatten(result) for result in way(arguments)]
    everything = [x for result in outputs for x in result if x.requires_grad]
    grads = iter(())
    if everything:
        torch.manual_seed(1)
        all_leaves = [leaf for mine in leaves for leaf in mine]
        grads = iter(torch.autograd.grad(everything, all_leaves, [incoming(x) for x in everything], allow_unused=True))
    results = []
    for result, mine in zip(outputs, leaves, strict=True):
        gradients = [next(grads, None) for _ in mine] if everything else []
        results.append([x.detach() for x in result] + [g for g in gradients if g is not None])
    return results


def plainly(function: Callable[..., Any]) -> Callable[..., list[Any]]:
    """Call after call."""
    return lambda arguments: [function(*tensors, **options) for tensors, options in arguments]


def difference(got: list[Tensor], want: list[Tensor]) -> str:
    """ "" if they are equal, NaNs included; else where they are not."""
    if len(got) != len(want):
        return f"{len(got)} tensors, not {len(want)}"
    for number, (x, y) in enumerate(zip(got, want, strict=True)):
        if x.shape != y.shape:
            return f"tensor {number} has shape {tuple(x.shape)}, not {tuple(y.shape)}"
        if not torch.equal(x.double().nan_to_num(1e300), y.double().nan_to_num(1e300)):
            return f"tensor {number} differs by {(x.double() - y.double()).abs().max():.3g}"
    return ""
