"""A method with a few calls in it exchanged, for one instance.

Hugging Face's layers call module globals such as ``apply_rotary_pos_emb``. To exchange such a call for one model and no other of
its family, neither the global nor the class may change. So the method's own source is parsed, the call is redirected to a name
that only the new function knows (a cell of a closure), and the result is compiled against the module it came from: every other
name in it means what it meant, tracebacks show the original lines, and torch.compile sees a plain function.
"""

from __future__ import annotations
import __future__

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache, wraps
from types import FunctionType
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Decorators that only write documentation, from the class they stand in.
_DOCUMENTATION = ("auto_docstring",)


class CannotRewriteError(Exception):
    """Why a method cannot be rewritten, in words."""


def class_of(instance: object) -> Any:
    """The type; as ``Any``, since mypy takes no class of nn.Module for hashable."""
    return type(instance)


def cache_of_class(function: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """:func:`functools.cache` for what is read off a class, whose ``forward`` somebody may replace meanwhile."""

    @cache
    def found(cls: Any, _forward: Any, *args: Any) -> T:
        return function(cls, *args)  # type: ignore[call-arg]

    @wraps(function)
    def look_up(cls: Any, *args: Any) -> T:
        return found(cls, getattr(cls, "forward", None), *args)

    return look_up  # type: ignore[return-value]


@cache_of_class
def methods_of(cls: Any) -> list[FunctionType]:
    """The methods that a class and its bases have from elsewhere than torch."""
    functions = (inspect.unwrap(m) for base in cls.__mro__ for m in vars(base).values() if callable(m))
    return [f for f in functions if isinstance(f, FunctionType) and not f.__module__.startswith("torch.")]


@cache
def _source(function: FunctionType) -> str:
    try:
        return "".join(inspect.getsourcelines(function)[0])
    except OSError as error:
        raise CannotRewriteError(f"the source of {function.__qualname__} is not installed ({error})") from None


def parse(method: Callable) -> ast.FunctionDef:
    """The definition of a method of a class, as it stands in its file; decorators are looked through. A fresh tree every time."""
    function = inspect.unwrap(method)
    if not isinstance(function, FunctionType):
        raise CannotRewriteError(f"{function!r} is not a Python function")
    # Under an "if", so that an indented method parses and columns in tracebacks stay right.
    try:
        tree = ast.parse("if True:\n" + _source(function))
    except SyntaxError:  # a function of a module, such as the forward of a ModuleList, or a lambda
        raise CannotRewriteError(f"{function.__qualname__} is not a plain method") from None
    block = tree.body[0]
    definition = block.body[0] if isinstance(block, ast.If) else None
    if not isinstance(definition, ast.FunctionDef):
        raise CannotRewriteError(f"{function.__qualname__} is not a plain method")
    return definition


def refuse_wrapped(cls: Any) -> None:
    """CannotRewriteError where somebody wrapped ``cls.forward`` since it was defined: a rewritten one would lack that."""
    if is_wrapped(cls):
        raise CannotRewriteError(f"{inspect.unwrap(cls.forward).__qualname__} was wrapped since it was defined")


def is_wrapped(cls: Any) -> bool:
    """Whether somebody wrapped ``cls.forward`` since it was defined.

    What a base class wraps around the ``forward`` of every subclass (checkpointing, in transformers) comes with a subclass.
    """
    makers = (getattr(vars(base).get("__init_subclass__"), "__func__", None) for base in cls.__mro__)
    again = [constant for maker in makers if maker is not None for constant in maker.__code__.co_consts]
    method, wrappers = cls.forward, 0
    while hasattr(method, "__wrapped__"):
        wrappers += getattr(method, "__code__", None) not in again
        method = method.__wrapped__
    if not wrappers:
        return False
    try:
        return wrappers > sum(not _is_documentation(decorator) for decorator in parse(method).decorator_list)
    except CannotRewriteError:  # nobody knows whose they are
        return True


def build(method: Callable, definition: ast.FunctionDef, bindings: Mapping[str, Any]) -> FunctionType:
    """Compile ``definition``, a changed :func:`parse` of ``method``, with ``bindings`` for the names that only it knows.

    Its default values are those that ``method`` has; its decorators are applied again.
    """
    function, name = inspect.unwrap(method), inspect.unwrap(method).__qualname__
    if function.__code__.co_freevars:  # super(), __class__, or a function made by another
        raise CannotRewriteError(f"{name} is a closure over {', '.join(function.__code__.co_freevars)}")
    if private := _private_name(definition):  # which means something else outside of its class
        raise CannotRewriteError(f"{name} uses {private}, a private name")
    bindings = {**bindings, **_bind_defaults(definition, function)}
    definition.decorator_list = [d for d in definition.decorator_list if not _is_documentation(d)]
    if definition.body and isinstance(definition.body[0], ast.Expr) and isinstance(definition.body[0].value, ast.Constant):
        definition.body = definition.body[1:] or [ast.Pass()]
    factory = ast.FunctionDef(
        name="factory",
        args=ast.arguments(posonlyargs=[], args=[ast.arg(name) for name in bindings], kwonlyargs=[], kw_defaults=[], defaults=[]),
        body=[definition, ast.Return(ast.Name(definition.name, ast.Load()))],
        decorator_list=[],
    )
    module = ast.fix_missing_locations(ast.Module([factory], type_ignores=[]))
    ast.increment_lineno(module, inspect.getsourcelines(function)[1] - 2)
    future = function.__code__.co_flags & __future__.annotations.compiler_flag  # else they are evaluated, if only then
    code = compile(module, inspect.getsourcefile(function) or "<unknown>", "exec", flags=future, dont_inherit=True)
    scope: dict[str, Any] = {}
    exec(code, function.__globals__, scope)
    try:
        rewritten = scope["factory"](**bindings)
    except Exception as error:  # a decorator or an annotation of the class's own
        raise CannotRewriteError(f"{name} cannot be defined outside of its class ({error})") from None
    rewritten.__qualname__ = function.__qualname__
    rewritten.__doc__ = function.__doc__
    return rewritten


def _private_name(definition: ast.FunctionDef) -> str | None:
    names = (getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(definition))
    return next((name for name in names if name.startswith("__") and not name.endswith("__")), None)


def _bind_defaults(definition: ast.FunctionDef, function: FunctionType) -> dict[str, Any]:
    """Names in the place of default values, and the values."""
    arguments, by_keyword = definition.args, function.__kwdefaults__ or {}
    bound: dict[str, Any] = {}

    def name_of(value: Any) -> ast.expr:
        bound[name := f"__packops_default_{len(bound)}__"] = value
        return ast.Name(name, ast.Load())

    arguments.defaults = [name_of(value) for value in function.__defaults__ or ()]
    arguments.kw_defaults = [name_of(by_keyword[a.arg]) if a.arg in by_keyword else None for a in arguments.kwonlyargs]
    return bound


def _is_documentation(decorator: ast.expr) -> bool:
    name = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(name, ast.Name) and name.id in _DOCUMENTATION


# ---- looking at trees ----------------------------------------------------------------------------------------------------------


def self_name(definition: ast.FunctionDef) -> str:
    first = (*definition.args.posonlyargs, *definition.args.args)[:1]
    if not first:
        raise CannotRewriteError(f"{definition.name} has no argument for its instance")
    return first[0].arg


def parameter_names(definition: ast.FunctionDef) -> set[str]:
    arguments = definition.args
    return {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}


def blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    """Every list of statements."""
    fields = (getattr(node, name, None) for node in ast.walk(tree) for name in ("body", "orelse"))
    return (field for field in fields if isinstance(field, list))


def calls_of(tree: ast.AST, name: str) -> list[ast.Call]:
    """Every ``name(...)``."""
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name]


def mentions(tree: ast.AST, name: str) -> bool:
    return any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(tree))


def assigned_name(statement: ast.stmt) -> str | None:
    """x of ``x = ...``."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    return None


def attribute_of(node: ast.AST, owner: str) -> str | None:
    """``a`` of ``owner.a``."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == owner:
        return node.attr
    return None


def statements(text: str, at: ast.stmt) -> list[ast.stmt]:
    """New statements that pass for the line of ``at``."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.stmt, ast.expr, ast.keyword)):
            ast.copy_location(node, at)
    return tree.body
