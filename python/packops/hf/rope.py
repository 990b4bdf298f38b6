"""RoPE of one model: its attention layers call packops, its tables come in fp32.

Two things are exchanged, both for the instances. The attention layers' ``forward`` keeps every line but calls packops where it
called ``apply_rotary_pos_emb``, and where RMS norms of q and k lie directly before that call, one kernel does both. The rotary
embedding returns half as wide a table, in fp32 from angles in fp64, where Hugging Face rounds it to the model's dtype: 2.7e-3 of
rotated bf16 heads becomes 1.7e-3, which is what rounding them once costs.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import apply_qk_norm_rope, apply_rope
from . import families, projections, rewrite
from .families import Convention
from .norm import RMSNorm, recognise
from .record import Record, decoder_of, is_bare, record_of
from .rewrite import CannotRewriteError

ROPE = "apply_rotary_pos_emb"
_BOUND = "__packops_rope__"
_SHAPING = ("view", "reshape", "transpose", "contiguous")


def patch(model: nn.Module, record: Record) -> list[nn.Module]:
    """Replace RoPE in every attention layer of ``model``, or raise ValueError saying what is in the way.

    Returns:
        the norms of q and k that one kernel computes together with RoPE.
    """
    decoder = set(decoder_of(model).modules())
    attention = [(n, m) for n, m in model.named_modules() if m in decoder and _calls_rope(rewrite.class_of(m))]
    if not attention:
        raise _refusal(model, f"no layer of it calls {ROPE}(q, k, cos, sin)")
    # Who makes the tables of these layers, and who else reads them: what lies below the module that holds the rotary embedding.
    rotary, holders = [], []
    for name, module in model.named_modules():
        holder = name.rpartition(".")[0]
        if isinstance(model.get_submodule(holder), (nn.ModuleList, nn.ModuleDict)):  # a table for each kind of layer
            holder = holder.rpartition(".")[0]
        if type(module).__name__.endswith("RotaryEmbedding") and any(_is_below(layer, holder) for layer, _ in attention):
            rotary.append(module)
            holders.append(holder)
    below = [m for n, m in model.named_modules() if m not in rotary and any(_is_below(n, holder) for holder in holders)]
    readers = [m for m in below if _reads_tables(rewrite.class_of(m))]
    for reader in [*readers, *(module for _, module in attention)]:
        if others := sorted(_rotations(rewrite.class_of(reader)) - {ROPE}):
            raise _refusal(model, f"{type(reader).__name__} also calls {', '.join(others)}")
    conventions = {_convention(model, rewrite.class_of(module)) for _, module in attention}
    if len(conventions) != 1:
        raise _refusal(model, "its layers rotate in different ways")
    (convention,) = conventions
    layers = {module for _, module in attention}
    understood = all(module in layers for module in readers) and all(_same_tables(module, convention) for module in rotary)
    own_tables = frozenset(width for module in rotary for width in _widths(module)) if understood else frozenset()
    shared = 0
    absorbed: list[nn.Module] = []
    for name, module in attention:
        try:
            rewrite.refuse_wrapped(rewrite.class_of(module))
            norms = _norms(module)
            shared += projections.shares_input(rewrite.class_of(module))
            record.set_methods(name, module, Rotation(convention, own_tables, norms))
        except CannotRewriteError as error:
            raise _refusal(model, str(error)) from None
        if norms is not None:
            absorbed += [getattr(module, norms.q), getattr(module, norms.k)]
    if own_tables:
        for module in rotary:
            record.set_methods("rotary_emb", module, Tables())
    record.replaced("rope", _describe(len(attention), len(absorbed) // 2, convention))
    if shared:
        how = "gradients of one input added up in the products of plain linear layers"
        record.replaced("projections", f"{how}, in {shared} attention layers")
    record.replaced("tables", "fp32, from angles in fp64" if own_tables else "the model's own, rounded to its dtype")
    return absorbed


def notes(model: nn.Module) -> list[str]:
    """What has become of the rotary embeddings, before :func:`patch` or after it."""
    for module in decoder_of(model).modules():
        if type(module).__name__.endswith("RotaryEmbedding") and any(
            b.dtype in (torch.float16, torch.bfloat16) for n, b in module.named_buffers(recurse=False) if "inv_freq" in n
        ):
            return [
                "the rotary frequencies (inv_freq) were rounded to half precision when the whole model was cast, which turns far "
                "positions by wrong angles: load with dtype=..., rather than .half() or .bfloat16()"
            ]
    return []


def _describe(layers: int, fused: int, convention: Convention) -> str:
    pairs = "(2i, 2i + 1)" if convention.interleaved else "(i, i + R/2)"
    op = "packops.apply_rope" if not fused else "packops.apply_qk_norm_rope"
    partly = f" ({fused} of them)" if 0 < fused < layers else ""
    return f"{op} in {layers} attention layers{partly}, pairs {pairs}"


def _refusal(model: nn.Module, reason: str) -> ValueError:
    family = getattr(getattr(model, "config", None), "model_type", "unknown")
    return ValueError(
        f"packops.hf cannot replace RoPE in {type(model).__name__} (model type {family!r}): {reason}. Tested families: "
        f"{families.supported()}; others work if their layers look alike. rope=False leaves RoPE alone"
    )


def check_layers(model: nn.Module) -> None:
    """ValueError where a layer that reads our tables has given way to one that takes them for the model's, twice as wide."""
    record = record_of(model)
    for change in () if record is None else record.changes:
        rotation: Any = getattr(change, "methods", None)
        if not isinstance(rotation, Rotation) or not rotation.own_tables:
            continue
        try:
            layer = model.get_submodule(change.path)
        except AttributeError:  # it was wrapped since
            continue
        kind = rewrite.class_of(layer)
        if not hasattr(kind, "_packops") and (_calls_rope(kind) or _reads_tables(kind)):  # FSDP2 makes a class of ours
            raise ValueError(
                f"packops.hf: {change.path} was replaced after packops.hf.apply, by a {type(layer).__name__} that reads other "
                "tables of RoPE: call packops.hf.apply again"
            )


# ---- attention layers ----------------------------------------------------------------------------------------------------------


@rewrite.cache_of_class
def _calls_rope(cls: type) -> bool:
    function = inspect.unwrap(getattr(cls, "forward", None) or object)
    return isinstance(function, FunctionType) and ROPE in function.__code__.co_names


@rewrite.cache_of_class
def _definition(cls: type) -> ast.FunctionDef:
    return rewrite.parse(cls.forward)  # type: ignore[attr-defined]


def _is_below(path: str, holder: str) -> bool:
    return not holder or path == holder or path.startswith(f"{holder}.")


@rewrite.cache_of_class
def _rotations(cls: type) -> frozenset[str]:
    """The functions that rotate heads in any method of a class."""
    names = (name for function in rewrite.methods_of(cls) for name in function.__code__.co_names)
    return frozenset(name for name in names if name.startswith("apply_") and "rot" in name)


@rewrite.cache_of_class
def _reads_tables(cls: type) -> bool:
    """Whether a method of a class takes a table apart, other than to pass it on."""
    if cls.__module__.startswith("peft.tuners.adaption_prompt"):  # a function there rotates q once more
        return True
    return any({"cos", "sin"} <= set(function.__code__.co_varnames) for function in rewrite.methods_of(cls))


def _convention(model: nn.Module, cls: type) -> Convention:
    function = inspect.unwrap(cls.forward)  # type: ignore[attr-defined]
    convention = families.convention_of(function.__globals__[ROPE])
    if convention is None:
        raise _refusal(model, f"its {ROPE} turns heads in a way of its own")
    return convention


class Norms(NamedTuple):
    """The RMS norms of q and k, and how both compute."""

    q: str  # attribute of the layer
    k: str
    form: RMSNorm
    across_heads: bool

    def can_be_absorbed(self, norm: nn.Module) -> bool:
        """Whether the weight alone says what the module does now."""
        return type(norm) is self.form.kind and is_bare(norm)

    def apply(self, norm: nn.Module, heads: Tensor, unsqueeze_dim: int) -> Tensor:
        """The module itself on heads that are as RoPE takes them."""
        if not self.across_heads:
            return norm(heads)
        if unsqueeze_dim == 1:
            heads = heads.transpose(1, 2)
        out = norm(heads.flatten(2)).view(heads.shape)
        return out.transpose(1, 2) if unsqueeze_dim == 1 else out


@dataclasses.dataclass(frozen=True)
class Rotation:
    """What an attention layer calls in place of ``apply_rotary_pos_emb``."""

    convention: Convention
    own_tables: frozenset[int]  # the widths of ours; empty: the tables are the model's
    norms: Norms | None

    def methods(self, base: Any) -> dict[str, Callable]:
        return {"forward": _attention_forward(base, self.convention, self.own_tables, self.norms)}

    def origins(self, base: Any) -> dict[str, Any]:
        function = inspect.unwrap(base.forward)
        found = {f"{function.__module__}.{ROPE}": function.__globals__.get(ROPE)}
        if self.norms is not None:
            found[f"{self.norms.form.kind.__qualname__}.forward"] = self.norms.form.kind.forward
        return found


@cache
def make_rope(convention: Convention, own_tables: frozenset[int], norms: Norms | None) -> Callable:
    """What an attention layer calls; one object for equal arguments, so that torch.compile compiles equal layers once."""
    interleaved = convention.interleaved

    def arguments(cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> dict[str, Any]:
        if not own_tables:
            cos, sin = convention.gather(cos), convention.gather(sin)
        elif cos.shape[-1] not in own_tables:
            raise ValueError(
                f"packops.hf: tables of RoPE are {sorted(own_tables)} wide, got {cos.shape[-1]}: the rotary embedding was "
                "replaced after packops.hf.apply: call packops.hf.apply again"
            )
        return {
            "cos": cos,
            "sin": sin,
            "layout": "bhsd" if unsqueeze_dim == 1 else "bshd",
            "rotary_dim": 2 * cos.shape[-1],
            "interleaved": interleaved,
            "per_token_table": True,
        }

    def rope(layer: nn.Module, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1):
        return apply_rope(q, k, **arguments(cos, sin, unsqueeze_dim))

    if norms is None:
        return rope

    def qk_norm_rope(layer: nn.Module, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1):
        q_norm, k_norm = getattr(layer, norms.q), getattr(layer, norms.k)
        both = norms.can_be_absorbed(q_norm) and norms.can_be_absorbed(k_norm)
        if not both or (eps := getattr(q_norm, norms.form.eps)) != getattr(k_norm, norms.form.eps):
            q, k = norms.apply(q_norm, q, unsqueeze_dim), norms.apply(k_norm, k, unsqueeze_dim)
            return rope(layer, q, k, cos, sin, unsqueeze_dim)
        return apply_qk_norm_rope(
            q,
            k,
            q_norm.weight,
            k_norm.weight,
            eps=eps,
            zero_centered=norms.form.zero_centered,
            **arguments(cos, sin, unsqueeze_dim),
        )

    return qk_norm_rope


@rewrite.cache_of_class
def _attention_forward(cls: type, convention: Convention, own_tables: frozenset[int], norms: Norms | None) -> FunctionType:
    definition = copy.deepcopy(_definition(cls))
    this = rewrite.self_name(definition)
    if norms is not None:
        _Without(this, (norms.q, norms.k)).visit(definition)
    for call in rewrite.calls_of(definition, ROPE):
        call.func = ast.Name(_BOUND, ast.Load())
        call.args.insert(0, ast.Name(this, ast.Load()))
    bindings = {_BOUND: make_rope(convention, own_tables, norms), **projections.share_input(definition)}
    return rewrite.build(cls.forward, definition, bindings)  # type: ignore[attr-defined]


class _Without(ast.NodeTransformer):
    """``self.norm(x)`` becomes ``x``."""

    def __init__(self, this: str, norms: tuple[str, ...]):
        self.this, self.norms = this, norms

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        return node.args[0] if rewrite.attribute_of(node.func, self.this) in self.norms else node


# ---- the norms of q and k ------------------------------------------------------------------------------------------------------


def _norms(layer: nn.Module) -> Norms | None:
    """The norms that RoPE can absorb: RMS norms with nothing but changes of shape between them and RoPE, run at every call."""
    names = _norms_before_rope(rewrite.class_of(layer))
    if names is None:
        return None
    found = [_norm_of(layer, name) for name in names]
    if found[0] is None or found[0] != found[1]:
        return None
    form, _, across_heads = found[0]
    return Norms(*names, form, across_heads)


@rewrite.cache_of_class
def _norms_before_rope(cls: type) -> tuple[str, str] | None:
    """("q_norm", "k_norm") if the layer's forward, from the norms to RoPE, only changes shapes."""
    definition = _definition(cls)
    body = definition.body
    at = [i for i, statement in enumerate(body) if rewrite.calls_of(statement, ROPE)]
    if len(at) != 1 or len(rewrite.calls_of(definition, ROPE)) != 1 or not isinstance(body[at[0]], ast.Assign):
        return None
    call = rewrite.calls_of(body[at[0]], ROPE)[0]
    heads = call.args[:2]
    found = [_norm_on_the_way(definition, body[: at[0]], x.id) for x in heads if isinstance(x, ast.Name)]
    return (found[0], found[1]) if len(found) == 2 and found[0] and found[1] else None


def _norm_on_the_way(definition: ast.FunctionDef, before: list[ast.stmt], name: str) -> str | None:
    """The one norm that ``name`` goes through, if besides it only shapes change."""
    this = rewrite.self_name(definition)
    norms: list[str] = []
    for statement in before:
        if not rewrite.mentions(statement, name):
            continue
        if rewrite.assigned_name(statement) != name:
            return None
        node = statement.value  # type: ignore[attr-defined]
        passed: list[str] = []  # outermost first
        while isinstance(node, ast.Call):
            attribute = rewrite.attribute_of(node.func, this)
            if attribute is not None and "norm" in attribute and len(node.args) == 1 and not node.keywords:
                passed.append(attribute)
                node = node.args[0]
            elif isinstance(node.func, ast.Attribute) and node.func.attr in _SHAPING:
                node = node.func.value
            else:
                break
        # Where it starts, on a projection, what was before does not matter; and a projection on top of a norm ends its reach.
        norms = norms + passed if isinstance(node, ast.Name) and node.id == name else passed
    everywhere = [n for n in ast.walk(definition) if isinstance(n, ast.Call) and rewrite.attribute_of(n.func, this) in norms]
    return norms[0] if len(norms) == len(everywhere) == 1 else None


def _norm_of(layer: nn.Module, name: str) -> tuple[RMSNorm, float, bool] | None:
    """(how it computes, epsilon, across_heads) of an RMS norm of heads; None if it is something else."""
    module, head_dim = getattr(layer, name, None), getattr(layer, "head_dim", None)
    if not isinstance(module, nn.Module) or not head_dim or rewrite.is_wrapped(type(module)):
        return None
    norm = recognise(module)
    if norm is None:
        return None
    (width,) = module.get_parameter("weight").shape
    return (norm, getattr(module, norm.eps), width != head_dim) if width % head_dim == 0 else None


# ---- tables --------------------------------------------------------------------------------------------------------------------

# All that the forward of a rotary embedding uses whose table is cos and sin of position * inv_freq, times attention_scaling.
_TABLE_NAMES = {
    "attention_scaling", "autocast", "cat", "cos", "device", "device_type", "dtype", "expand", "float", "getattr", "inv_freq",
    "isinstance", "maybe_autocast", "repeat_interleave", "shape", "sin", "stack", "str", "to", "torch", "transpose", "type",
    "view",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tables:
    """A rotary embedding in fp32, from angles in fp64."""

    def methods(self, base: Any) -> dict[str, Callable]:
        return {"forward": _table_forward()}


@cache
def _table_forward() -> FunctionType:
    from transformers.modeling_rope_utils import dynamic_rope_update

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        prefix = "" if layer_type is None else f"{layer_type}_"
        frequencies, scaling = getattr(self, f"{prefix}inv_freq"), getattr(self, f"{prefix}attention_scaling")
        angles = position_ids[..., None].double() * frequencies.to(device=x.device, dtype=torch.float64)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)

    # The update changes inv_freq for the rope types "dynamic" and "longrope", as the stock forward has it do.
    return torch.no_grad()(dynamic_rope_update(forward))


def _layer_types(rotary: nn.Module) -> Iterator[str | None]:
    for name, _ in rotary.named_buffers(recurse=False):
        if name == "inv_freq":
            yield None
        elif name.endswith("_inv_freq") and not name.endswith("original_inv_freq"):
            yield name[: -len("_inv_freq")]


def _widths(rotary: nn.Module) -> list[int]:
    """Of the tables that :func:`_table_forward` makes."""
    names = ["inv_freq" if kind is None else f"{kind}_inv_freq" for kind in _layer_types(rotary)]
    return [rotary.get_buffer(name).shape[-1] for name in names]


def _same_tables(rotary: nn.Module, convention: Convention) -> bool:
    """Whether :func:`_table_forward` makes the table that ``rotary`` makes: by the names it uses, and by asking one like it."""
    function = inspect.unwrap(type(rotary).forward)
    known = isinstance(function, FunctionType) and set(function.__code__.co_names) <= _TABLE_NAMES
    if not known or rewrite.is_wrapped(type(rotary)):
        return False
    try:
        with torch.device("cpu"):  # the model's own may be on any device, or on none
            twin = type(rotary)(config=rotary.config)
    except (AttributeError, TypeError):
        return False
    x = torch.zeros(2, 6, 4, dtype=torch.float32, device="cpu")
    layer_types = list(_layer_types(twin))
    for layer_type in layer_types:
        further = () if layer_type is None else (layer_type,)
        for ids in ([[0, 1, 2, 0, 1, 5]], [[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]]):
            position_ids = torch.tensor(ids, device="cpu")
            theirs = twin(x, position_ids, *further)
            ours = _table_forward()(twin, x, position_ids, *further)
            for a, b in zip(theirs, ours, strict=True):
                spread = convention.spread(b)
                if a.shape != spread.shape or not torch.allclose(a, spread, atol=1e-5):
                    return False
    return bool(layer_types)
