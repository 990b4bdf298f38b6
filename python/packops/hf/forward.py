"""The forward of one model: in training the lm_head is part of the loss, and calls that would go wrong are refused.

Hugging Face's causal language models end alike: ``logits = self.lm_head(hidden)``, perhaps a scale or a soft cap, then
``self.loss_function(logits, labels, ...)``. The model's forward keeps every line, and gets one branch before these: where nobody
wants the logits, :func:`packops.linear_cross_entropy` takes the hidden states, with the scale and the cap that stand there.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import families, rewrite
from .calls import check_forward, watch
from .loss import CausalLMLoss, scores_the_next_token
from .record import Record, is_plain_linear
from .rewrite import CannotRewriteError

_WANTED, _SKIP, _ROUTER = "__packops_skip_logits__", "__packops_skip__", "__packops_router_loss__"
_ROUTER_LOSS = "load_balancing_loss_func"


def guard(model: nn.Module, record: Record) -> None:
    """Let ``model`` refuse calls whose result would be wrong, and leave its loss alone."""
    if hasattr(type(model), "loss_function") and scores_the_next_token(model):
        record.set_methods("the model", model, Model(False, families.never_looks(model)))


def patch(model: nn.Module, reduction: str, record: Record) -> None:
    """Replace the loss of ``model`` and, where its forward ends as expected, let it skip the logits in training."""
    if not hasattr(type(model), "loss_function"):
        raise ValueError(f"packops.hf cannot replace the loss of {type(model).__name__}: it has no loss_function")
    if not scores_the_next_token(model):
        raise ValueError(
            f"packops.hf cannot replace the loss of {type(model).__name__} ({model.loss_type!r}): it does not score each token's "
            "successor. cross_entropy=False leaves it alone"
        )
    record.set("the model", model, "_loss_function", CausalLMLoss(reduction))
    record.replaced("loss", f"packops.cross_entropy, reduction {reduction!r}")
    ending = _model_forward(rewrite.class_of(model), True)
    reason = ending.reason
    if reason is None and getattr(model, ending.head, None) is not model.get_output_embeddings():  # type: ignore[operator]
        reason = f"{ending.head} is not the model's output embedding"
    record.set_methods("the model", model, Model(reason is None, families.never_looks(model)))
    if reason is None:
        record.replaced("lm_head", "packops.linear_cross_entropy, without logits, in training and with skip_logits=True")
        if not is_plain_linear(head := getattr(model, ending.head)):
            record.note(f"logits are made all the same while {ending.head} ({type(head).__name__}) is more than its weight")
    else:
        record.note(f"logits are always made: {reason}")


@dataclasses.dataclass(frozen=True)
class Model:
    """A causal language model that refuses calls whose loss would be wrong.

    Attributes:
        fused: its forward may end without logits.
        never_looks: as :func:`packops.hf.families.never_looks`, which takes too long to ask at every call.
    """

    fused: bool
    never_looks: bool

    def methods(self, base: Any) -> dict[str, Callable]:
        inner, fused, never_looks = _model_forward(base, self.fused).function, self.fused, self.never_looks
        names = list(inspect.signature(base.forward).parameters)[1:]

        @functools.wraps(base.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            check_forward(self, names, args, kwargs, never_looks)
            if fused and not _returns_dict(self, kwargs):
                if kwargs.get("skip_logits"):
                    raise ValueError("packops.hf: skip_logits=True would leave a hole in a tuple: it needs return_dict=True")
                kwargs["skip_logits"] = False
            return inner(self, *args, **kwargs)

        def set_attribute(self: Any, name: str, value: Any) -> None:
            base.__setattr__(self, name, watch(self, value, never_looks) if name == "forward" else value)

        return {"forward": forward, "__setattr__": set_attribute}


def _returns_dict(model: Any, kwargs: Mapping[str, Any]) -> bool:
    wanted = kwargs.get("return_dict")
    return bool(model.config.return_dict if wanted is None else wanted)


def skip_logits(model: nn.Module, head: str, labels: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether this call shall return the loss without logits; takes ``skip_logits`` out of its keyword arguments."""
    wanted = kwargs.pop("skip_logits", None)
    if labels is None:
        return False
    if wanted is None:
        wanted = model.training and torch.is_grad_enabled()
    return bool(wanted) and isinstance(model.loss_function, CausalLMLoss) and is_plain_linear(getattr(model, head))


def router_loss(
    function: Callable, kwargs: Mapping[str, Any], *, attention_mask: Tensor | None = None, **options: Any
) -> Tensor | float:
    """The load balancing loss of a mixture of experts, of the tokens that are not padding; 0 where there are none."""
    mask = kwargs.get("real_tokens") if attention_mask is None else attention_mask
    if mask is None:
        return function(attention_mask=None, **options)
    some = (mask != 0).any()
    return function(attention_mask=torch.where(some, mask, 1), **options) * some


class Ending(NamedTuple):
    """The rewritten forward of a model."""

    function: Callable
    head: str  # attribute of the lm_head; "" where the logits are always made
    reason: str | None  # why they are


@rewrite.cache_of_class
def _model_forward(cls: type, fused: bool) -> Ending:
    """The forward of ``cls`` with a router loss that leaves out padding and, if ``fused``, a branch that skips the logits."""
    bindings: dict[str, Any] = {}
    head, reason = "", None
    try:
        rewrite.refuse_wrapped(cls)
        definition = rewrite.parse(cls.forward)  # type: ignore[attr-defined]
        if _rewrite_router_loss(cls, definition):
            bindings[_ROUTER] = router_loss
        if fused:
            try:
                head = _add_branch(cls, definition)
                bindings[_WANTED] = skip_logits
            except CannotRewriteError as error:
                reason = str(error)
        function = rewrite.build(cls.forward, definition, bindings) if bindings else cls.forward  # type: ignore[attr-defined]
    except CannotRewriteError as error:
        return Ending(cls.forward, "", str(error))  # type: ignore[attr-defined]
    return Ending(function, head, reason)


def _rewrite_router_loss(cls: type, definition: ast.FunctionDef) -> bool:
    calls = rewrite.calls_of(definition, _ROUTER_LOSS)
    function = inspect.unwrap(cls.forward).__globals__.get(_ROUTER_LOSS)  # type: ignore[attr-defined]
    if not calls or not definition.args.kwarg or "attention_mask" not in inspect.signature(function).parameters:
        return False
    for call in calls:
        names = list(inspect.signature(function).parameters)
        call.keywords += [ast.keyword(name, value) for name, value in zip(names, call.args, strict=False)]
        call.args = [ast.Name(_ROUTER_LOSS, ast.Load()), ast.Name(definition.args.kwarg.arg, ast.Load())]
        call.func = ast.Name(_ROUTER, ast.Load())
    return True


def _add_branch(cls: type, definition: ast.FunctionDef) -> str:
    """Let the forward skip the logits; returns the attribute of the lm_head."""
    tail = _Tail(definition)
    this, body = rewrite.self_name(definition), definition.body
    if not definition.args.kwarg or not {"labels", "position_ids"} <= rewrite.parameter_names(definition):
        raise CannotRewriteError(f"{cls.__name__}.forward does not take labels, position_ids and **kwargs")
    kwargs = definition.args.kwarg.arg
    # Only the sequence reductions look at them, but these must.
    tail.call.keywords.insert(0, ast.keyword("position_ids", ast.Name("position_ids", ast.Load())))
    first = body[tail.begin]  # a traceback shows the line of the lm_head
    ask = rewrite.statements(f"{_SKIP} = {_WANTED}({this}, {tail.head!r}, labels, {kwargs})", at=first)
    skipping = rewrite.statements(
        f"{tail.logits} = None\n"
        f"loss = {this}.loss_function.of_hidden({this}.{tail.head}, {ast.unparse(tail.hidden)}, labels, "
        f"logit_scale={tail.scale}, softcap={tail.cap}, position_ids=position_ids, **{kwargs})",
        at=first,
    )
    branch = ast.copy_location(ast.If(ast.Name(_SKIP, ast.Load()), skipping, body[tail.begin : tail.end]), first)
    definition.body = [*ask, *body[: tail.begin], branch, *body[tail.end :]]
    return tail.head


class _Tail:
    """The end of a causal language model's forward, from the lm_head to the loss.

    Statements ``begin`` to ``end`` make the logits and the loss; ``hidden`` is what goes into ``self.<head>``, ``scale`` and
    ``cap`` are the source of what happens to the logits, ``call`` is the call of the loss function.
    """

    def __init__(self, definition: ast.FunctionDef):
        body, this = definition.body, rewrite.self_name(definition)
        name = f"{definition.name} ends in a way of its own"
        found = [(i, call) for i, statement in enumerate(body) if (call := self._head_call(statement, this))]
        if len(found) != 1:
            raise CannotRewriteError(name)
        self.begin, head_call = found[0]
        self.logits = rewrite.assigned_name(body[self.begin]) or ""
        self.head, self.hidden = rewrite.attribute_of(head_call.func, this) or "", head_call.args[0]
        self.scale, self.cap = "1.0", "None"
        at = self.begin + 1
        while at < len(body) and self._shapes_logits(body[at], this):
            at += 1
        if at + 1 >= len(body) or ast.unparse(body[at]) != "loss = None":
            raise CannotRewriteError(name)
        self.end = at + 2
        call = self._loss_call(body[at + 1], this)
        if call is None:
            raise CannotRewriteError(name)
        self.call = call
        others = [statement for statement in body[self.end :] if not isinstance(statement, ast.Return)]
        if any(rewrite.mentions(statement, self.logits) for statement in others):
            raise CannotRewriteError(f"{name}, and uses its logits after the loss")

    @staticmethod
    def _head_call(statement: ast.stmt, this: str) -> ast.Call | None:
        if rewrite.assigned_name(statement) is None:
            return None
        call = statement.value  # type: ignore[attr-defined]
        if not isinstance(call, ast.Call) or len(call.args) != 1 or call.keywords:
            return None
        return call if rewrite.attribute_of(call.func, this) in ("lm_head", "embed_out", "output") else None

    def _shapes_logits(self, statement: ast.stmt, this: str) -> bool:
        """Whether it scales the logits, or caps them, by a number of the model or its configuration."""
        x = self.logits
        if isinstance(statement, ast.If) and isinstance(statement.test, ast.Compare):
            cap = ast.unparse(statement.test.left)
            known = f"if {cap} is not None:\n    {x} = {x} / {cap}\n    {x} = torch.tanh({x})\n    {x} = {x} * {cap}"
            if self.cap == "None" and cap.startswith(f"{this}.config.") and ast.unparse(statement) == known:
                self.cap = cap
                return True
            return False
        if rewrite.assigned_name(statement) != x or self.cap != "None":  # a scale after a cap is not ours
            return False
        value = statement.value  # type: ignore[attr-defined]
        if not isinstance(value, ast.BinOp) or not isinstance(value.left, ast.Name) or value.left.id != x:
            return False
        factor, operator = ast.unparse(value.right), {ast.Mult: "*", ast.Div: "/"}.get(type(value.op))
        if operator is None or not isinstance(value.right, ast.Attribute) or not factor.startswith(f"{this}."):
            return False
        self.scale = f"{self.scale} {operator} {factor}"
        return True

    def _loss_call(self, branch: ast.stmt, this: str) -> ast.Call | None:
        if not isinstance(branch, ast.If) or ast.unparse(branch.test) != "labels is not None" or branch.orelse:
            return None
        if len(branch.body) != 1 or rewrite.assigned_name(branch.body[0]) != "loss":
            return None
        call = branch.body[0].value  # type: ignore[attr-defined]
        if not isinstance(call, ast.Call) or rewrite.attribute_of(call.func, this) != "loss_function":
            return None
        given = call.args[0] if call.args else next((k.value for k in call.keywords if k.arg == "logits"), None)
        return call if isinstance(given, ast.Name) and given.id == self.logits else None
