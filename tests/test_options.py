"""Every option of every op does something, and the same in every way to call it.

For each op a table has, for each option, a value that must change the result. The ways to call an op: packops' function, the op
itself (``torch.ops.packops``), both compiled, under autocast, and with the vocabulary over ranks where there is such a form.
The tests find the ops, the functions and their options by themselves: a new one without an entry fails.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import packops
from op_table import OPS, Elsewhere, Op, Refused, calls, difference, flatten, moved, plainly, run

# Ops that are another one in place: test_in_place.
IN_PLACE = {"rope_"}
# Functions that are no ops.
NO_OPS = {"attention_path"}


# --------------------------------------------------------------------------------------------------------------------------------
# Nothing is left out


def options_of_function(op: Op) -> set[str]:
    parameters = inspect.signature(op.function).parameters.values()
    return {p.name for p in parameters if (p.name not in op.tensors and p.default is not p.empty) or p.kind is p.KEYWORD_ONLY}


def options_of_op(op: Op) -> set[str]:
    (overload,) = op.op.overloads()
    arguments = getattr(op.op, overload)._schema.arguments
    return {argument.name for argument in arguments if argument.name not in op.tensors}


def test_every_op_is_in_the_table():
    found = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("packops::")}
    public = {name for name in found if not name.startswith("_")}
    assert public - IN_PLACE == {op.op._qualified_op_name.split("::")[1] for op in OPS.values() if op.op is not None}
    functions = {
        getattr(packops, name)
        for name in packops.__all__
        if inspect.isfunction(getattr(packops, name)) and "Tensor" in str(inspect.signature(getattr(packops, name)))
    }
    missing = {f.__name__ for f in functions if f.__module__ not in NO_OP_MODULES} - NO_OPS
    assert missing == {op.function.__name__ for op in OPS.values()}


# Their functions take tensors and are no ops.
NO_OP_MODULES = {"packops.rotary", "packops.verify", "packops.distributed", "packops.data.batch", "packops.data.packing"}


@pytest.mark.parametrize("name", OPS)
def test_every_option_is_in_the_table(name):
    op = OPS[name]
    if name.endswith("cross_entropy_stats"):
        assert options_of_op(op) == options_of_op(OPS[name.removesuffix("_stats")])
        return
    assert set(op.options) == options_of_function(op)
    if op.op is not None:
        assert options_of_op(op) <= options_of_function(op), "the op has an option that the function lacks"
        only_function = options_of_function(op) - options_of_op(op)
        other_op = {option for option, change in op.options.items() if isinstance(change, Elsewhere) and change in OPS}
        assert only_function <= {"inplace", "return_stats"} | other_op, f"the op lacks {only_function}"
    if op.plain is not None:
        plain = next(other for other in OPS.values() if other.function is op.plain)
        assert set(op.options) == {op.renamed.get(o, o) for o in plain.options if o != "return_stats"} | {"group", "shard_sizes"}


# --------------------------------------------------------------------------------------------------------------------------------
# Ways to call


def op_of(op: Op) -> Callable[..., list[Any]]:
    return plainly(op.op if op.compared is None else lambda *tensors, **options: op.op(*tensors, **options)[: op.compared])


@functools.cache
def eager(name: str) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """What packops' function gives without and with each option."""
    op = OPS[name]
    pairs = calls(op)
    results = iter(run(op, plainly(op.function), [call for pair in pairs.values() for call in pair]))
    return {option: (next(results), next(results)) for option in pairs}


def check_same_everywhere(name: str, way: Callable[..., list[Any]], names: set[str] | None = None) -> None:
    op = OPS[name]
    pairs = calls(op, names)
    results = iter(run(op, way, [call for pair in pairs.values() for call in pair]))
    for option in pairs:
        for got, want, how in zip((next(results), next(results)), eager(name)[option], ("without", "with"), strict=True):
            assert not difference(got, want), f"{how} {option}: {difference(got, want)}"


# --------------------------------------------------------------------------------------------------------------------------------
# The tests


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    """The forms over ranks run in a group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", OPS)
def test_every_option_changes_the_result(name):
    for option, (without, with_it) in eager(name).items():
        assert not option or difference(without, with_it), f"{option} changes nothing"


REFUSED = [(name, o) for name, op in OPS.items() for o, change in op.options.items() if isinstance(change, Refused)]


@pytest.mark.parametrize("name, option", REFUSED)
def test_every_option_that_changes_nothing_arrives(name, option):
    op = OPS[name]
    change = op.options[option]
    for function in (op.function, op.op):
        if function is not None:
            with pytest.raises((ValueError, RuntimeError), match=change.message):
                function(*op.tensors.values(), **op.always, **{option: change.value})


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.plain is None])
def test_on_a_gpu(name):
    """As on the CPU with the same numbers, to rounding."""
    op = OPS[name]
    pairs = calls(op)
    which = [call for pair in pairs.values() for call in pair]
    move = moved(op, torch.device("cuda"))
    results = iter(run(op, plainly(op.function), which, place=lambda _, x: move(x)))
    # Rounded as the GPU gets them: in the exponent of a peaked softmax, rounding is multiplied by the scores.
    expected = iter(run(op, plainly(op.function), which, place=lambda _, x: move(x).to("cpu", x.dtype)))
    for option, pair in pairs.items():
        for _ in pair:
            got, want = next(results), next(expected)
            assert len(got) == len(want), option
            for x, y in zip(got, want, strict=True):
                # Of bf16, a few roundings of the largest number that was summed up.
                size = max(1.0, float(y.abs().max())) if y.numel() and y.is_floating_point() else 1.0
                loose = {"rtol": 2e-2, "atol": 1e-2 * size} if x.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
                loose |= {"equal_nan": True, "check_dtype": False}
                torch.testing.assert_close(x.cpu(), y, **loose, msg=lambda text, o=option: f"{o}: {text}")


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.op is not None])
def test_the_op_itself(name):
    check_same_everywhere(name, op_of(OPS[name]), options_of_op(OPS[name]))


@pytest.mark.parametrize("name", OPS)
def test_compiled(name):
    """The function and the op, each with all its options, in one graph."""
    op = OPS[name]
    torch._dynamo.reset()
    check_same_everywhere(name, torch.compile(plainly(op.function), backend="aot_eager", fullgraph=op.plain is None))
    if op.op is not None:
        torch._dynamo.reset()
        check_same_everywhere(name, torch.compile(op_of(op), backend="aot_eager", fullgraph=True), options_of_op(op))


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.lower or op.wider])
def test_under_autocast(name):
    """As if the inputs that autocast is about had been cast by hand."""
    op = OPS[name]

    def cast(argument: str, x: Tensor) -> Tensor:
        return x.bfloat16() if argument in op.lower else x.float() if argument in op.wider else x

    def autocast(arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return plainly(op.function)(arguments)

    pairs = calls(op)
    which = [call for pair in pairs.values() for call in pair]
    by_hand, results = iter(run(op, plainly(op.function), which, cast)), iter(run(op, autocast, which))
    for option in pairs:
        for how in ("without", "with"):
            got, want = next(results), next(by_hand)
            assert not difference(got, want), f"{how} {option}: {difference(got, want)}"


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.plain is not None])
def test_over_ranks(name):
    """As the form for one process, to rounding."""
    op = OPS[name]
    plain = next(key for key, other in OPS.items() if other.function is op.plain)
    for option, expected in eager(plain).items():
        if op.renamed.get(option, option) not in op.options:
            continue
        for got, want in zip(eager(name)[op.renamed.get(option, option)], expected, strict=True):
            assert len(got) == len(want)
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6, msg=lambda text, o=option: f"{o}: {text}")


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.options.get("inplace") is not None])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_in_place(name, compiled):
    """The same result, and the memory is written."""
    op = OPS[name]
    first = next(iter(op.tensors))

    def call(inplace):
        leaf = op.tensors[first].clone().requires_grad_()
        written = leaf * 1
        written.retain_grad()
        others = {k: v.clone() if isinstance(v, Tensor) else v for k, v in list(op.tensors.items())[1:]}
        function = op.function
        if compiled:
            torch._dynamo.reset()
            function = torch.compile(op.function, backend="aot_eager")
        out = flatten(function(written, *others.values(), **op.always, inplace=inplace))
        result = [x.detach().clone() for x in out]
        (grad,) = torch.autograd.grad(out[0].sum(), leaf)
        return [*result, grad], written.detach()

    want, kept = call(False)
    got, written = call(True)
    assert not difference(got, want), difference(got, want)
    assert torch.equal(kept, op.tensors[first])
    assert compiled or not torch.equal(written, op.tensors[first])  # a compiler may put the result elsewhere
