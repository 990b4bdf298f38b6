"""What :func:`packops.hf.apply` changed in one model, so that it can be undone and told.

A module whose forward is replaced becomes an instance of a subclass made for it, of the same name: methods find their ``self``
wherever the module is copied to, so ``copy.deepcopy``, pickling and the replicas of ``nn.DataParallel`` are patched, too, and
compute with their own weights. (A bound method in the instance's ``__dict__`` would go on computing with the original's.)
"""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as _module

from . import rewrite

ATTRIBUTE = "_packops_hf"
_ABSENT = "packops: no such attribute"  # a string, so that copies of it are recognised
_LINEAR = inspect.unwrap(nn.Linear.forward)  # torch's own, for which another may stand
_PLAIN = (nn.Parameter, torch.Tensor, FakeTensor, type(None))
_ANSWERED_FOR: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules whose class a record will put back


class Methods(Protocol):
    """What makes the methods of a subclass, from its base class; hashable, and pickled in place of them.

    One whose methods take the place of more than the base's ``forward`` has ``origins(base)``: that, by names.
    """

    def __hash__(self) -> int: ...

    def methods(self, base: Any) -> dict[str, Callable]: ...


def subclass_of(base: Any, methods: Methods) -> Any:
    """The subclass of ``base`` with these methods; one for equal arguments, so that torch.compile compiles equal layers once."""
    return _subclass_of(base, methods, _origins(base, methods))


@cache
def _subclass_of(base: Any, methods: Methods, origins: tuple[tuple[str, Any], ...]) -> Any:
    names = ("__module__", "__qualname__", "__doc__")
    attributes = {name: getattr(base, name) for name in names} | methods.methods(base)
    ours = {"__reduce_ex__": _reduce, "_packops": (base, methods), "_packops_origins": origins}
    return type(base)(base.__name__, (base,), {**attributes, **ours})


def _origins(base: Any, methods: Methods) -> tuple[tuple[str, Any], ...]:
    """What the methods take the place of, by names: anyone may replace it, for all models of a process."""
    further = getattr(methods, "origins", None)
    return (f"{base.__qualname__}.forward", base.forward), *(further(base).items() if further else ())


def check_origins(cls: Any) -> None:
    """ValueError where somebody has replaced what methods of ours took the place of: they would go on as if nobody had."""
    for ours in cls.__mro__:  # FSDP2 makes a class of ours
        if "_packops" in vars(ours):
            for (name, before), (_, now) in zip(ours._packops_origins, _origins(*ours._packops), strict=True):
                if now is not before:
                    raise ValueError(
                        f"packops.hf: {name} was replaced after packops.hf.apply, which has put its own in the place of the one "
                        "before: call packops.hf.apply again, which looks at the new one"
                    )


def check_classes(model: nn.Module) -> None:
    """:func:`check_origins` for every class of what was changed in a transformers model."""
    if (record := record_of(model)) is not None and not torch.compiler.is_compiling():
        for cls in {type(change.owner) for change in record.changes if isinstance(change, ChangeOfMethods)}:
            check_origins(cls)


def _reduce(self: Any, protocol: Any) -> tuple:
    check_origins(type(self))  # of a copy they would be those of today
    base, methods = self._packops
    constructor, _, *state = base.__reduce_ex__(self, max(2, int(protocol)))
    if constructor.__name__ != "__newobj__":
        raise TypeError(
            f"packops.hf: {base.__name__} copies and pickles itself in a way of its own: call packops.hf.revert first"
        )
    return (_blank_instance, (base, methods), *state)


def _blank_instance(base: Any, methods: Methods) -> Any:
    cls = subclass_of(base, methods)
    return cls.__new__(cls)


def is_replaced(module: nn.Module) -> bool:
    """Whether this instance has a ``forward`` other than its class's. (accelerate leaves that one behind, bound.)"""
    present = vars(module).get("forward")
    return present is not None and not (
        getattr(present, "__func__", None) is type(module).forward and getattr(present, "__self__", None) is module
    )


def is_patched(module: nn.Module) -> bool:
    """Whether its class is one of :func:`subclass_of`'s."""
    return "_packops" in vars(type(module))


def is_bare(module: nn.Module) -> bool:
    """Whether its class alone says what a module does: nothing wraps it, no hook looks on or gathers a sharded weight first.

    Nor a hook of all modules there are: ``torch.nn.modules.module.register_module_forward_hook``.
    """
    return "forward" not in vars(module) and not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _module._global_forward_pre_hooks
        or _module._global_forward_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def is_plain_tensor(x: Any) -> bool:
    """Whether ``x`` is a tensor like any other: not nested, and of no class that has products of its own."""
    return x is not None and type(x) in _PLAIN and not x.is_nested


def is_plain_linear(module: nn.Module) -> bool:
    """Whether weight and bias alone say what the module does: no LoRA, no hooks. (A replica's weight is a tensor.)"""
    if type(module) is not nn.Linear or nn.Linear.forward is not _LINEAR:
        return False
    return type(module.weight) in _PLAIN and type(module.bias) in _PLAIN and is_bare(module)


def pretrained(model: nn.Module) -> nn.Module:
    """The transformers model in a wrapper."""
    from transformers import PreTrainedModel

    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise TypeError(f"packops.hf: model must be a transformers.PreTrainedModel or hold one, got {type(model).__name__}")
    return found


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a transformers model that reads and writes text, without its head, its vision and its audio towers."""
    found = cast(Any, model).get_decoder() if hasattr(model, "get_decoder") else None
    return found if isinstance(found, nn.Module) else model


def record_of(model: nn.Module) -> Record | None:
    """What was changed in a transformers model; None if nothing was."""
    return vars(model).get(ATTRIBUTE)


def strip_copies(model: nn.Module) -> list[nn.Module]:
    """Give modules that were copied while they were patched (PEFT's ``modules_to_save`` and layer replication do) their class
    back; returns them. What a record answers for, this model's or another's, stays."""
    copies = [module for module in model.modules() if is_patched(module) and module not in _ANSWERED_FOR]
    for module in copies:
        while is_patched(module):  # more than once where two models shared the original
            module.__class__ = vars(type(module))["_packops"][0]
    return copies


@dataclasses.dataclass
class Change:
    """One attribute of one module."""

    path: str
    owner: Any
    attribute: str
    before: Any
    after: Any

    @property
    def is_ours(self) -> bool:
        """Whether nobody has changed it since."""
        present = vars(self.owner).get(self.attribute, _ABSENT)
        return present in (self.after, _ABSENT)

    def undo(self) -> None:
        if isinstance(self.before, str) and self.before == _ABSENT:
            vars(self.owner).pop(self.attribute, None)
        else:
            vars(self.owner)[self.attribute] = self.before


@dataclasses.dataclass
class ChangeOfMethods:
    """The class of one module."""

    path: str
    owner: Any
    before: Any
    methods: Methods  # not the class they make, which pickle would look for by its name

    @property
    def attribute(self) -> str:
        return "forward" if is_replaced(self.owner) else "class"

    @property
    def is_ours(self) -> bool:
        return vars(type(self.owner)).get("_packops") == (self.before, self.methods) and not is_replaced(self.owner)

    def undo(self) -> None:
        vars(self.owner).pop("forward", None)
        self.owner.__class__ = self.before
        if not is_patched(self.owner):  # by another model that has this layer, too
            _ANSWERED_FOR.discard(self.owner)


@dataclasses.dataclass
class Report:
    """What :func:`packops.hf.apply` replaced in a model; ``print`` it.

    Attributes:
        model: its class.
        family: its model type.
        tested: whether the tests of packops cover this family. Others were checked when they were patched, by their structure.
        replaced: ``"rope"``, ``"tables"``, ``"rms_norm"``, ``"residual"``, ``"projections"``, ``"mlp"``, ``"loss"``,
            ``"lm_head"``, ``"attention"`` -> what does it now. Empty: nothing was.
        notes: what the user should know, in words.
    """

    model: str
    family: str
    tested: bool
    replaced: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def __repr__(self) -> str:
        if not self.replaced:
            return f"packops.hf: nothing is replaced in {self.model}"
        untested = "" if self.tested else ", a family that the tests of packops do not cover"
        lines = [f"packops.hf in {self.model} ({self.family}{untested})"]
        lines += [f"  {what:<10}{how}" for what, how in self.replaced.items()]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


class Record:
    """The changes to one model; lives in its ``__dict__``, is copied and pickled with it."""

    def __init__(self, report: Report):
        self.report = report
        self.changes: list[Change | ChangeOfMethods] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _ANSWERED_FOR.update(change.owner for change in self.changes if isinstance(change, ChangeOfMethods))
        if self.report.replaced.get("attention") == "packops_varlen":  # unpickled, perhaps in a process that does not know it yet
            from .attention import register

            register()

    def set(self, path: str, owner: Any, attribute: str, value: Any) -> None:
        self.changes.append(Change(path, owner, attribute, vars(owner).get(attribute, _ABSENT), value))
        vars(owner)[attribute] = value

    def set_methods(self, path: str, module: nn.Module, methods: Methods) -> None:
        """Exchange methods of this instance; refuse where somebody else has replaced its forward."""
        if is_replaced(module):
            present = vars(module)["forward"]
            raise ValueError(
                f"packops.hf: the forward of {path} ({type(module).__name__}) was already replaced on this instance, by "
                f"{getattr(present, '__module__', None) or type(present).__module__}: call packops.hf.apply before "
                "accelerate, DeepSpeed or whatever it was wraps the model"
            )
        vars(module).pop("forward", None)
        base: Any = type(module)
        module.__class__ = subclass_of(base, methods)
        self.changes.append(ChangeOfMethods(path, module, base, methods))
        _ANSWERED_FOR.add(module)

    def set_found(
        self, model: nn.Module, recognise: Callable[[nn.Module], Methods | None], leave: Iterable[nn.Module] = ()
    ) -> list[nn.Module]:
        """Exchange the methods of every module in which ``recognise`` finds something, but for those to ``leave`` and where
        somebody else has, of the instance or around its class's; returns the modules."""
        others, changed = set(leave), []
        for name, module in model.named_modules():
            if module in others or is_replaced(module) or rewrite.is_wrapped(type(module)):
                continue
            if (found := recognise(module)) is not None:
                self.set_methods(name, module, found)
                changed.append(module)
        return changed

    def replaced(self, what: str, how: str) -> None:
        self.report.replaced[what] = how

    def note(self, text: str) -> None:
        self.report.notes.append(text)

    def undo(self) -> None:
        """Put everything back, or, where somebody changed it since, raise RuntimeError and put nothing back."""
        for change in self.changes:
            if not change.is_ours:
                name = change.attribute
                raise RuntimeError(
                    f"packops.hf.revert: {name} of {change.path} was replaced again after packops.hf.apply (mixed precision of "
                    f"accelerate does it, and FSDP); undo that first, or delete the attribute: `del model.{name}`"
                )
        for change in reversed(self.changes):
            change.undo()
        self.changes.clear()
