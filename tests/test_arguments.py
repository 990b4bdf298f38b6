"""Wrong things for every argument of every op: a TypeError that names the argument, what it got and what it wants; the same eager
and compiled, from the function and, where the dispatcher lets a wrong thing through to it, from the op."""

from __future__ import annotations

import inspect
import math
import typing
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import packops
from op_table import OPS, Op, flatten
from packops.ops.arguments import kinds_of, with_options_of
from packops.ops.linear_ce_loss import KINDS as LINEAR_KINDS

DEVICE = torch.device("meta")
SOME_TENSOR = torch.ones(())
TEXT = "text"
WRONG: dict[str, list[Any]] = {
    "Tensor": [[1.0, 2.0], np.ones(3), TEXT, 2.5, 3, True, object()],
    "bool": [1, 0.0, TEXT, [True], SOME_TENSOR, np.bool_(True)],
    "int": [2.5, TEXT, [3], True, torch.tensor(1), np.float64(2.0)],
    "float": [TEXT, [0.5], True, SOME_TENSOR, 1j],
    "str": [1, True, b"mean", ["mean"], SOME_TENSOR],
    "int[]": [3, TEXT, [1.5, 2, 3], [True, 1, 1], [1, TEXT], SOME_TENSOR],
    "ScalarType": [TEXT, 32, float],
    "number": [TEXT, [3], True, np.ones(1), object()],
}
BY_NAME = {
    **LINEAR_KINDS,
    "num_items": "number?",
    "parents": "Tensor?",
    "local_logits": "Tensor",
    "local_weight": "Tensor",
    "local_bias": "Tensor?",
    "entropy": "bool",
    "inplace": "bool",
    "return_stats": "bool",
    "shard_sizes": "int[]?",
}


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    """The forms over ranks run in a group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Other forms of an op: the function is the same.
OTHER_FORMS = {"cross_entropy_stats", "linear_cross_entropy_stats", "packed_forest"}
NAMES = [name for name in OPS if name not in OTHER_FORMS]


def kinds(op: Op) -> dict[str, str]:
    """Of every argument of the function; the group has tests of its own."""
    known = {**BY_NAME, **(kinds_of(op.op.default) if op.op is not None else {}), "num_items": "number?"}
    names = inspect.signature(op.function).parameters
    known |= {"activation": "str"} if "activation" in names else {}
    known |= dict.fromkeys(("gate", "up"), "Tensor") if "gate" in names else {}
    known |= {"residual": "Tensor?"} if "residual" in names else {}  # without one the function is another op
    return {name: known[name].replace("SymInt", "int") for name in names if name != "group"}


def call(function: Any, op: Op, wrong: dict[str, Any]) -> Any:
    values = {**op.tensors, **op.always, **wrong}
    tensors = [values.pop(name) for name in op.tensors]
    return function(*tensors, **values)


def wrong_values(kind: str) -> list[Any]:
    plain = kind.removesuffix("?")
    return WRONG[plain] + ([] if kind.endswith("?") else [None])


@pytest.mark.parametrize("name", NAMES)
def test_wrong_things_are_named(name):
    op = OPS[name]
    for argument, kind in kinds(op).items():
        for value in wrong_values(kind):
            with pytest.raises(TypeError, match=rf"^packops\.\w+: {argument} must be an? .*, got ") as error:
                call(op.function, op, {argument: value})
            got = "None" if value is None else type(value).__name__
            assert got in str(error.value), (argument, value)


def in_turn() -> dict[str, list[tuple[str, Any]]]:
    """A wrong value for every argument of every op; those of one kind take turns, as a compile of every value takes too long."""
    turns: dict[str, int] = defaultdict(int)
    chosen: dict[str, list[tuple[str, Any]]] = {}
    for name in NAMES:
        chosen[name] = []
        for argument, kind in kinds(OPS[name]).items():
            values = wrong_values(kind)
            turn = turns[kind.removesuffix("?")]
            chosen[name].append((argument, values[turn % len(values)]))
            turns[kind.removesuffix("?")] += 1
    return chosen


@pytest.mark.parametrize("name", NAMES)
def test_wrong_things_are_named_compiled(name):
    op = OPS[name]
    for argument, value in in_turn()[name]:
        torch._dynamo.reset()
        compiled = torch.compile(lambda v, op=op, argument=argument: call(op.function, op, {argument: v}), backend="eager")
        with pytest.raises(TypeError, match=rf"packops\.\w+: {argument} must be an? .*, got "):
            compiled(value)


@pytest.mark.parametrize("name", NAMES)
def test_right_things_of_other_types_are_taken(name):
    """numpy's numbers, and ints where a float belongs."""
    op = OPS[name]
    for argument, kind in kinds(op).items():
        change = op.options.get(argument)
        value = getattr(change, "value", None)
        if (
            kind.removesuffix("?") in ("int", "float", "number")
            and isinstance(value, (int, float))
            and not hasattr(change, "message")
        ):
            beside = {**change.tensors, **change.beside}
            as_numpy = np.int64(value) if isinstance(value, int) else np.float64(value)
            want = flatten(call(op.function, op, {**beside, argument: value}))
            for x, y in zip(flatten(call(op.function, op, {**beside, argument: as_numpy})), want, strict=True):
                assert torch.equal(x, y)


FLOATS = {"softcap", "logit_scale", "scale", "eps", "z_loss", "label_smoothing"}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("way", ["function", "op"])
def test_numbers_that_fp32_cannot_hold(name, way):
    op = OPS[name]
    function = op.function if way == "function" else op.op
    if function is None:
        return
    for option in sorted(FLOATS & {*op.options, *op.always}):
        for value in (
            math.inf,
            -math.inf,
            math.nan,
            1e39,
            -1.0,
            *([] if option in ("eps", "z_loss", "label_smoothing") else [1e-46]),
        ):
            with pytest.raises(ValueError, match=rf"packops\.\w+: {option} must"):
                call(function, op, {option: value})


@pytest.mark.parametrize("name", [name for name in NAMES if "num_items" in OPS[name].options])
def test_number_of_items(name):
    op = OPS[name]
    numbers = (-1, -0.5, math.nan, -math.inf, math.inf, 0)
    for value in (*numbers, *(torch.tensor(float(x)) for x in numbers if x == x), torch.tensor(-3)):
        with pytest.raises(ValueError, match=r"packops\.\w+: num_items must be"):
            call(op.function, op, {"num_items": value})
    nothing = torch.full_like(op.tensors["labels"], -100)
    for value in (0, 0.0, torch.tensor(0)):
        assert call(op.function, op, {"num_items": value, "labels": nothing}) == 0
    for value in (5, 5.0, np.int32(5), torch.tensor([5])):
        assert torch.equal(call(op.function, op, {"num_items": value}), call(op.function, op, {"num_items": torch.tensor(5.0)}))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("way", ["function", "op"])
def test_a_meta_tensor_beside_real_ones(name, way):
    """Nothing is made of memory that nobody wrote."""
    op = OPS[name]
    function = op.function if way == "function" else op.op
    if function is None:
        return
    tensors = {k: x for k, x in op.tensors.items() if isinstance(x, Tensor)}
    extra = {k: c.value for k, c in op.options.items() if isinstance(getattr(c, "value", None), Tensor)}
    if len(tensors) == 1 and not extra:
        return
    for argument, x in {**tensors, **extra}.items():
        beside = getattr(op.options.get(argument), "beside", {})
        with pytest.raises(ValueError, match=r"packops\.\w+: .*meta"):
            call(function, op, {**beside, argument: x.to("meta")})


@pytest.mark.parametrize("name", [name for name in OPS if OPS[name].plain is None])
def test_meta_tensors_alone(name):
    """Shapes of what would come out, as of any op of torch."""
    op = OPS[name]
    real = flatten(call(op.function, op, {}))
    inputs = {
        k: x.to("meta").requires_grad_(x.is_floating_point() and k not in op.constant)
        for k, x in op.tensors.items()
        if isinstance(x, Tensor)
    }
    on_meta = flatten(call(op.function, op, inputs))
    assert [(x.shape, x.dtype) for x in on_meta] == [(x.shape, x.dtype) for x in real]
    assert all(x.device.type == "meta" for x in on_meta)
    outputs, leaves = ([x for x in some if x.requires_grad] for some in (on_meta, inputs.values()))
    if outputs:
        grads = torch.autograd.grad(sum(x.sum() for x in outputs), leaves)
        assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in leaves]


@pytest.mark.parametrize("name", OPS)
def test_default_device(name):
    """What a call makes on its way does not land on the default device."""
    op = OPS[name]
    options = {"num_items": 5} if "num_items" in op.options else {}

    def results() -> list[Tensor]:
        free = {
            k: x.clone().requires_grad_(x.is_floating_point() and k not in op.constant)
            for k, x in op.tensors.items()
            if isinstance(x, Tensor)
        }
        outputs = flatten(call(op.function, op, {**free, **options}))
        if any(x.requires_grad for x in outputs):
            sum(x.sum() for x in outputs if x.requires_grad).backward()
        return [*outputs, *(x.grad for x in free.values() if x.grad is not None)]

    want = results()
    with DEVICE:
        got = results()
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(got, want, strict=True))


def test_dtensors_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    for name in NAMES:
        op = OPS[name]
        for argument, x in op.tensors.items():
            if isinstance(x, Tensor):
                with pytest.raises(TypeError, match=rf"packops\.\w+: {argument} must be a plain tensor, got a DTensor"):
                    call(op.function, op, {argument: distribute_tensor(x, mesh, [Replicate()])})


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation", "ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_are_no_strided_array_are_named(name):
    op = OPS[name]
    for argument, x in op.tensors.items():
        if isinstance(x, Tensor):
            others = {
                "torch.sparse_coo": x.to_sparse(),
                "a nested tensor": torch.nested.nested_tensor([x, x], layout=torch.jagged),
                "a quantized tensor": torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
            }
            if x.dim() == 2:  # torch's matrix products take these
                others["torch.sparse_csr"] = x.to_sparse_csr()
            for got, other in others.items():
                with pytest.raises(TypeError, match=rf"packops\.\w+: {argument} must be a plain tensor, got {got}: pass"):
                    call(op.function, op, {argument: other})


def test_counts_that_are_no_strided_array_are_named():
    with pytest.raises(
        TypeError, match=r"^packops\.loss_normalizer: labels_or_counts must be a plain tensor, got torch.sparse_coo: pass"
    ):
        packops.loss_normalizer(torch.tensor([1, 2]).to_sparse())


def test_error_of_a_right_call_is_its_own():
    """The search for a wrong type hides no other error."""
    with pytest.raises(ValueError, match="weight"):
        packops.rms_norm(torch.ones(3, 8), torch.ones(7), eps=1e-6)
    with pytest.raises(IndexError, match="label 99"):
        packops.cross_entropy(torch.ones(3, 8), torch.tensor([1, 2, 99]))


def test_a_form_takes_the_options_of_another_function():
    def source(x: int, *, a: int = 1, b: float = 2.0, c: str = "c") -> int:
        return 0

    @with_options_of(source, without=("c",))
    def form(x, *, a: int = 5, **options):
        """A form of source."""
        return x, a, options

    assert form(0) == (0, 5, {"b": 2.0})
    assert form(0, b=3.0, a=4) == (0, 4, {"b": 3.0})
    for wrong in ({"c": "d"}, {"d": 1}):
        with pytest.raises(TypeError, match=rf"form\(\) got an unexpected keyword argument '{next(iter(wrong))}'"):
            form(0, **wrong)
    with pytest.raises(TypeError, match="x"):
        form()
    assert str(inspect.signature(form)) == "(x, *, a: 'int' = 5, b: 'float' = 2.0)"
    assert typing.get_type_hints(form)["b"] is float
    assert (form.__name__, form.__doc__) == ("form", "A form of source.")


# ---- functions and classes beside the ops ------------------------------------------------------------------------------------

IDS, BOUNDS = torch.arange(7), torch.tensor([0, 3, 7])
BESIDE: dict[str, tuple[Any, dict[str, Any]]] = {
    "rope_table": (packops.rope_table, {"rotary_dim": 8, "max_position": 16}),
    "RotaryEmbedding": (packops.RotaryEmbedding, {"rotary_dim": 8}),
    "CrossEntropyLoss": (packops.CrossEntropyLoss, {}),
    "loss_normalizer": (packops.loss_normalizer, {"labels_or_counts": IDS}),
    "verify": (packops.verify, {"model": None, "documents": []}),
    "max_docs_for_flash_attention": (
        packops.max_docs_for_flash_attention,
        {"total_tokens": 64, "num_heads": 2, "head_dim": 64},
    ),
    "PackedBatch.build": (packops.PackedBatch.build, {"input_ids": IDS, "labels": IDS, "boundaries": [0, 3, 7]}),
    "PackedBatch.from_cu_seqlens": (packops.PackedBatch.from_cu_seqlens, {"input_ids": IDS, "cu_seqlens": BOUNDS}),
    "PackedBatch.from_position_ids": (packops.PackedBatch.from_position_ids, {"input_ids": IDS, "position_ids": IDS}),
    "PackedBatch.from_padded": (
        packops.PackedBatch.from_padded,
        {"input_ids": IDS[None], "attention_mask": torch.ones_like(IDS)[None]},
    ),
}
KIND_OF_HINT = {
    "Tensor": "Tensor", "Tensor | None": "Tensor", "bool": "bool", "int": "int", "int | None": "int", "float": "float",
    "float | None": "float", "str": "str", "Reduction": "str", "torch.dtype": "ScalarType",
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_wrong_things_beside_the_ops_are_named(name):
    """As their annotations say, so that a new argument is looked at without a word here."""
    function, valid = BESIDE[name]
    tried = 0
    for parameter in inspect.signature(function).parameters.values():
        for value in WRONG.get(KIND_OF_HINT.get(parameter.annotation, ""), []):
            tried += 1
            with pytest.raises(TypeError, match=rf"^packops\.{name}: {parameter.name} must be "):
                function(**{**valid, parameter.name: value})
    assert tried > 4


def test_a_mapping_is_named():
    for function in (packops.rope_table, packops.RotaryEmbedding):
        with pytest.raises(TypeError, match=r"scaling must be a mapping or None, got a list"):
            function(8, 16, scaling=[("factor", 2.0)])


def test_in_a_graph():
    """torch compiles no signature: such a function is in a graph what it would be without its annotations."""

    def step(labels):
        return packops.loss_normalizer(labels) * packops.rope_table(4, 3)[0].sum()

    labels = torch.tensor([1, -100, 2])
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(step, backend="eager", fullgraph=True)(labels), step(labels))


def test_a_missing_argument_is_said_in_the_words_of_python():
    with pytest.raises(TypeError, match=r"rope_table\(\) missing 1 required positional argument: 'max_position'"):
        packops.rope_table(8)


def ints_of(op: Op) -> list[str]:
    return [argument for argument, kind in kinds(op).items() if kind.removesuffix("?") == "int"]


@pytest.mark.parametrize("name", [name for name in NAMES if ints_of(OPS[name])])
def test_an_int_past_64_bits(name):
    """The dispatcher says that it expected an int and found an int."""
    op = OPS[name]
    for argument in ints_of(op):
        with pytest.raises(ValueError, match=rf"{argument} must fit int64, got {2**70}"):
            call(op.function, op, {argument: 2**70})


@pytest.mark.parametrize("item", ["12", ["12"], True, [True], None, [None], -1, [3, -1], math.nan, math.inf])
def test_counts_that_are_none(item):
    with pytest.raises((TypeError, ValueError), match=r"^packops\.loss_normalizer: "):
        packops.loss_normalizer(item)


@pytest.mark.parametrize("item", [3, 3.0, np.int64(3), np.float32(3), [1, np.int32(2)], torch.tensor(3)])
def test_counts_of_any_type(item):
    assert packops.loss_normalizer(item).item() == 3
