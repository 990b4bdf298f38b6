"""What :func:`packops.hf.apply` changed in one model, so that it can be undone and told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

from torch import nn

ATTRIBUTE = "_packops_hf"
_ABSENT = "packops: no such attribute"  # a string, so that copies of it are recognised


def _nothing() -> None:
    return None


def is_replaced(module: nn.Module) -> bool:
    """Whether this instance has a ``forward`` other than its class's. (Unpickled, a model that was patched has that, bound.)"""
    present = vars(module).get("forward")
    return present is not None and getattr(present, "__func__", None) is not type(module).forward


def is_bare(module: nn.Module) -> bool:
    """Whether its class alone says what a module does: nothing wraps it, no hook looks on or gathers a sharded weight first."""
    return "forward" not in vars(module) and not (
        module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether weight and bias alone say what the module does: no LoRA, no hooks."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and is_bare(module)


@dataclasses.dataclass
class Change:
    """One instance attribute of one module (or configuration)."""

    path: str
    owner: Any
    attribute: str
    before: Any
    after: Any


@dataclasses.dataclass
class Report:
    """What :func:`packops.hf.apply` replaced in a model; ``print`` it.

    Attributes:
        model: its class.
        family: its model type.
        tested: whether the tests of packops cover this family. Others were checked when they were patched, by their structure.
        replaced: ``"rope"``, ``"tables"``, ``"rms_norm"``, ``"mlp"``, ``"loss"``, ``"lm_head"``, ``"attention"`` -> what does it
            now. Empty: nothing was.
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
    """The changes to one model; lives in its ``__dict__`` and is copied with it."""

    def __init__(self, report: Report):
        self.report = report
        self.changes: list[Change] = []

    def __reduce__(self) -> tuple:
        # A pickled model comes back without our methods, as Python pickles a bound method by its name. So without a record, too.
        return _nothing, ()

    def __deepcopy__(self, memo: dict) -> Record:
        from copy import deepcopy

        twin = Record(dataclasses.replace(self.report, replaced=dict(self.report.replaced), notes=list(self.report.notes)))
        memo[id(self)] = twin
        twin.changes = deepcopy(self.changes, memo)  # the modules in it are the copy's own
        return twin

    def set(self, path: str, owner: Any, attribute: str, value: Any) -> None:
        self.changes.append(Change(path, owner, attribute, vars(owner).get(attribute, _ABSENT), value))
        vars(owner)[attribute] = value

    def set_forward(self, path: str, module: nn.Module, forward: Any) -> None:
        """Bind ``forward`` on the instance; refuse where somebody else has."""
        if is_replaced(module):
            present = vars(module)["forward"]
            raise ValueError(
                f"packops.hf: the forward of {path} ({type(module).__name__}) was already replaced on this instance, by "
                f"{getattr(present, '__module__', None) or type(present).__module__}: call packops.hf.apply before "
                "accelerate, DeepSpeed or whatever it was wraps the model"
            )
        self.set(path, module, "forward", forward)

    def set_forwards(
        self,
        model: nn.Module,
        recognise: Callable[[nn.Module], Any],
        forward: Callable[[Any], Any],
        leave: Iterable[nn.Module] = (),
    ) -> list[nn.Module]:
        """Bind ``forward(found)`` on every module that is ``found`` by ``recognise``, but for those to ``leave`` and where
        somebody else has; returns the modules."""
        others, changed = set(leave), []
        for name, module in model.named_modules():
            if module not in others and not is_replaced(module) and (found := recognise(module)) is not None:
                self.set_forward(name, module, MethodType(forward(found), module))
                changed.append(module)
        return changed

    def say(self, what: str, how: str) -> None:
        self.report.replaced[what] = how

    def note(self, text: str) -> None:
        self.report.notes.append(text)

    def undo(self) -> None:
        """Put everything back, or, where somebody changed it since, raise RuntimeError and put nothing back."""
        for change in self.changes:
            if vars(change.owner).get(change.attribute, _ABSENT) not in (change.after, _ABSENT):
                raise RuntimeError(
                    f"packops.hf.revert: {change.attribute} of {change.path} was replaced again after packops.hf.apply (mixed "
                    f"precision of accelerate does it); undo that first, or delete the attribute: `del model.{change.attribute}`"
                )
        for change in reversed(self.changes):
            if change.before == _ABSENT:
                vars(change.owner).pop(change.attribute, None)
            else:
                vars(change.owner)[change.attribute] = change.before
        self.changes.clear()
