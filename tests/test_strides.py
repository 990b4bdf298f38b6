"""Any argument of any op may have strides of its own, and any dtype that its docstring names.

Two tensors that always have equal strides in tests hide that one's are used for the other. Here each argument lies in memory in a
way of its own, alone and all at once, and so does the incoming gradient; the result is that of contiguous tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import packops
from op_table import OPS, calls, moved, plainly, random_like, run


def rows_apart(x: Tensor, gap: int) -> Tensor:
    """The last dimension contiguous, with ``gap`` elements between rows; a vector has them between its elements."""
    if x.ndim == 0:
        return x.clone()
    if x.ndim == 1:
        room = x.new_zeros(x.shape[0], gap + 1)[:, 0]
    else:
        room = x.new_zeros(*x.shape[:-1], x.shape[-1] + gap)[..., : x.shape[-1]]
    return room.copy_(x)


def shifted(x: Tensor, gap: int) -> Tensor:
    """The same, and it begins at an odd element: no row is aligned."""
    if x.ndim < 2:
        return x.new_zeros(x.shape[0] + gap)[gap:].copy_(x) if x.ndim else x.clone()
    return x.new_zeros(*x.shape[:-1], x.shape[-1] + gap + 1)[..., 1 : x.shape[-1] + 1].copy_(x)


def leading_swapped(x: Tensor, gap: int) -> Tensor:
    """The first two of three and more dimensions lie the other way round in memory."""
    if x.ndim < 3:
        return rows_apart(x, gap)
    return rows_apart(x.transpose(0, 1), gap).transpose(0, 1)


LAYOUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "rows apart": rows_apart,
    "shifted": shifted,
    "leading dimensions swapped": leading_swapped,
}
NAMES = [name for name, op in OPS.items() if op.plain is None]


@functools.cache
def contiguous(name: str, device: torch.device) -> list[list[Tensor]]:
    op = OPS[name]
    which = [with_it for _, with_it in calls(op).values()]
    move = moved(op, device)
    return run(op, plainly(op.function), which, place=lambda _, x: move(x))


def check(name: str, device: torch.device, place, incoming=random_like, where: str = "") -> None:
    op = OPS[name]
    pairs = calls(op)
    results = run(op, plainly(op.function), [with_it for _, with_it in pairs.values()], place=place, incoming=incoming)
    for option, got, want in zip(pairs, results, contiguous(name, device), strict=True):
        assert len(got) == len(want)
        for x, y in zip(got, want, strict=True):
            # Rows that begin elsewhere may be added up in another order.
            loose = {"rtol": 2e-2, "atol": 2e-2} if y.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-6}
            torch.testing.assert_close(x, y, **loose, equal_nan=True, msg=lambda text, o=option: f"{where}, {o}: {text}")


def arguments_of(name: str) -> list[str]:
    found = [argument for _, call in calls(OPS[name]).values() for argument, x in {**call.tensors, **call.options}.items()
             if isinstance(x, Tensor)]  # fmt: skip
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_one_argument_at_a_time(name, layout, device):
    """In calls with every option."""
    move = moved(OPS[name], device)
    for argument in arguments_of(name):

        def place(n: str, x: Tensor, argument=argument) -> Tensor:
            return LAYOUTS[layout](move(x), 8) if n == argument else move(x)

        if argument in OPS[name].contiguous and layout != "shifted":
            with pytest.raises(ValueError, match=f"{argument} must be a contiguous"):
                check(name, device, place)
        else:
            check(name, device, place, where=f"{argument} {layout}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_all_arguments_at_once_each_another(name, layout, device):
    gaps = {argument: 2 * number + 1 for number, argument in enumerate(arguments_of(name))}
    kept, move = OPS[name].contiguous, moved(OPS[name], device)
    check(name, device, lambda n, x: (shifted if n in kept else LAYOUTS[layout])(move(x), gaps[n]), where=layout)


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows apart": lambda g: rows_apart(g, 8),
    "shifted": lambda g: shifted(g, 3),
    "leading dimensions swapped": lambda g: leading_swapped(g, 8),
    "every second element": lambda g: rows_apart(g.unsqueeze(-1), 1).squeeze(-1) if g.ndim else g,
    "transposed": lambda g: g.transpose(0, -1).contiguous().transpose(0, -1) if g.ndim > 1 else g,
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", [name for name in NAMES if OPS[name].options or OPS[name].function is packops.document_sums])
def test_incoming_gradient(name, gradient, device):
    def incoming(x: Tensor) -> Tensor:
        return GRADIENTS[gradient](random_like(x))

    move = moved(OPS[name], device)
    check(name, device, lambda _, x: move(x), incoming, where=f"gradient {gradient}")


@pytest.mark.parametrize("name", [name for name in NAMES if OPS[name].options or OPS[name].function is packops.document_sums])
def test_expanded_gradient(name, device):
    """What sum() sends back: one number for all elements, against as many equal numbers."""
    op = OPS[name]
    which, move = [with_it for _, with_it in calls(op).values()], moved(op, device)

    def gradients(incoming):
        return run(op, plainly(op.function), which, place=lambda _, x: move(x), incoming=incoming)

    expanded = gradients(lambda x: torch.full((), 0.7).to(x).expand(x.shape))
    written = gradients(lambda x: torch.full(x.shape, 0.7).to(x))
    # cuBLAS multiplies an expanded matrix by another kernel.
    loose = 1e-5 if name in ("gated_linear", "gated_mlp") and device.type == "cuda" else 0
    for option, got, want in zip(calls(op), expanded, written, strict=True):
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=loose, atol=loose, equal_nan=True, msg=lambda text, o=option: f"{o}: {text}")


NUM_ITEMS = {
    "int8": torch.tensor(40, dtype=torch.int8),
    "uint8": torch.tensor(40, dtype=torch.uint8),
    "int16": torch.tensor(40, dtype=torch.int16),
    "int32": torch.tensor(40, dtype=torch.int32),
    "int64": torch.tensor(40),
    "float16": torch.tensor(40, dtype=torch.float16),
    "bfloat16": torch.tensor(40, dtype=torch.bfloat16),
    "float64": torch.tensor(40, dtype=torch.float64),
    "one element of many": torch.arange(0, 80, 8, dtype=torch.int16)[5:6],
}


@pytest.mark.parametrize("case", NUM_ITEMS)
@pytest.mark.parametrize("where", ["here", "on the host"])
def test_num_items_of_any_dtype(case, where, device):
    logits, labels = torch.randn(9, 37, device=device), torch.randint(0, 37, (9,), device=device)
    hidden, weight = torch.randn(9, 8, device=device), torch.randn(37, 8, device=device)
    count = NUM_ITEMS[case] if where == "on the host" else NUM_ITEMS[case].to(device)
    for function, inputs in ((packops.cross_entropy, [logits]), (packops.linear_cross_entropy, [hidden, weight])):
        for reduction in ("mean", "seq-mean-token-mean"):
            want = function(*inputs, labels, num_items=40, reduction=reduction)
            torch.testing.assert_close(function(*inputs, labels, num_items=count, reduction=reduction), want, rtol=1e-6, atol=0)
