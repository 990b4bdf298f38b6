"""What autograd cannot do raises, for every op of the table: it never comes back as None, 0 or a wrong number."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import packops
from op_table import OPS, Call, Op, flatten

# Linear in what they differentiate: derivatives of any order, in both modes.
LINEAR = {"rope", "document_sums"}
# Only added to the result: their gradient is a sum of what comes back.
ADDED = {("gated_linear", "bias"), ("gated_mlp", "down_bias")}
# Have no rules for the transforms of torch.func, and say so.
UNTRANSFORMED = {
    "linear_cross_entropy",
    "linear_log_probs",
    "document_sums",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_linear_log_probs",
}


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    """The forms over ranks run in a group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def differentiable(op: Op) -> list[str]:
    """The arguments that get a gradient; a bias is among the options."""
    return [*Call(op.tensors, {}).differentiable(op), *(name for name in op.options if name.endswith("bias"))]


def inputs_of(op: Op, free: tuple[str, ...] = (), place: Callable[[Tensor], Tensor] = torch.clone) -> dict[str, Any]:
    values = {**op.tensors, **op.always}
    values |= {name: op.options[name].value for name in op.options if name.endswith("bias")}
    return {k: place(x) if k in free else x.clone() if isinstance(x, Tensor) else x for k, x in values.items()}


def results_of(op: Op, way: str, values: dict[str, Any], **options: Any) -> list[Tensor]:
    function = op.function if way == "function" else op.op
    tensors = [values[name] for name in op.tensors]
    rest = {name: value for name, value in values.items() if name not in op.tensors}
    return [x for x in flatten(function(*tensors, **rest, **options)) if x.is_floating_point()][: op.compared]


def call(op: Op, way: str, values: dict[str, Any], **options: Any) -> Tensor:
    """A scalar that is linear in the results: what comes back to the op needs no gradient itself."""
    return sum(x.sum() for x in results_of(op, way, values, **options))


WAYS = [(name, way) for name, op in OPS.items() for way in ("function", "op") if way == "function" or op.op is not None]
DIFFERENTIABLE = [(name, way) for name, way in WAYS if differentiable(OPS[name]) and not name.endswith("_stats")]
ONCE = [(name, way, x) for name, way in DIFFERENTIABLE for x in differentiable(OPS[name]) if name not in LINEAR]


# --------------------------------------------------------------------------------------------------------------------------------
# Second derivatives


@pytest.mark.parametrize("behind_a_layer", [False, True], ids=["leaf", "layer"])
@pytest.mark.parametrize("name, way, argument", ONCE)
def test_second_derivative_raises(name, way, argument, behind_a_layer):
    """Of a scalar loss, whose incoming gradient is a constant: all that a penalty depends on are the inputs."""
    op = OPS[name]
    leaf = inputs_of(op)[argument].requires_grad_()
    values = {**inputs_of(op), argument: leaf * 2 if behind_a_layer else leaf}
    loss = call(op, way, values).square()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    penalty = gradient.square().sum()
    loss = loss + penalty
    for differentiate in (
        lambda: torch.autograd.grad(loss, leaf, allow_unused=True, retain_graph=True),
        lambda: torch.autograd.grad(penalty, leaf, allow_unused=True, retain_graph=True),
        lambda: loss.backward(retain_graph=True),
        lambda: torch.autograd.grad(gradient.sum(), leaf, retain_graph=True),
    ):
        with pytest.raises(RuntimeError, match=rf"packops\.{name} is differentiable once"):
            differentiate()


@pytest.mark.parametrize("name, way, argument", [(name, way, x) for name, way, x in ONCE if (name, x) not in ADDED])
def test_second_derivative_of_a_sum_raises(name, way, argument):
    """What comes back to the op depends on nothing, so it is the op alone that can tell."""
    op = OPS[name]
    leaf = inputs_of(op)[argument].requires_grad_()
    (gradient,) = torch.autograd.grad(call(op, way, {**inputs_of(op), argument: leaf}), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"packops\.{name} is differentiable once"):
        (gradient.square().sum() + leaf.sum()).backward()


@pytest.mark.parametrize("name, way, argument", ONCE)
def test_second_derivative_in_another_input_raises(name, way, argument):
    """The gradient of one input depends on every other that needs one."""
    op = OPS[name]
    others = [x for x in differentiable(op) if x != argument and not x.endswith("bias")]
    values = inputs_of(op, (argument, *others), lambda x: x.clone().requires_grad_())
    (gradient,) = torch.autograd.grad(call(op, way, values).square(), values[argument], create_graph=True)
    for other in others:
        if name == "qk_norm_rope" and argument[0] != other[0]:
            continue  # q and k do not meet
        with pytest.raises(RuntimeError, match=rf"packops\.{name} is differentiable once"):
            torch.autograd.grad(gradient.sum(), values[other], retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("name, way", DIFFERENTIABLE)
def test_create_graph_alone_changes_nothing(name, way):
    """The gradient is the same bits, and a second backward may follow."""
    op = OPS[name]
    found = []
    for create_graph in (False, True, True):
        values = inputs_of(op, tuple(differentiable(op)), lambda x: x.clone().requires_grad_())
        leaves = [values[x] for x in differentiable(op)]
        loss = call(op, way, values)
        grads = torch.autograd.grad(loss, leaves, create_graph=create_graph, retain_graph=True)
        again = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
        found.append(again)
    for grads in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0], strict=True))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name, way", DIFFERENTIABLE)
def test_zeros_without_memory_are_zeros(name, way, create_graph):
    """What torch passes on as the gradient of a sign, and so as that of an absolute value's gradient."""
    op = OPS[name]
    values = inputs_of(op, tuple(differentiable(op)), lambda x: x.clone().requires_grad_())
    leaves = [values[x] for x in differentiable(op)]
    for result in [x for x in results_of(op, way, values) if x.requires_grad]:
        options = {"create_graph": create_graph, "retain_graph": True, "allow_unused": True}
        for grad in torch.autograd.grad(result.sgn().sum(), leaves, **options):
            assert grad is None or not grad.any()


@pytest.mark.parametrize("name, way", DIFFERENTIABLE)
def test_several_gradients_at_once(name, way):
    """torch takes them one by one, and that is right, or it cannot: the error names the op and not what it is made of."""
    op = OPS[name]
    for argument in differentiable(op):
        values = inputs_of(op)

        def f(x, values=values, argument=argument):
            return results_of(op, way, {**values, argument: x})[0]

        want = torch.autograd.functional.jacobian(f, values[argument])
        found, message = None, ""
        try:
            found = torch.autograd.functional.jacobian(f, values[argument], vectorize=True)
        except RuntimeError as error:
            message = str(error)
        if found is None:
            assert f"packops.{name} computes one gradient at a time, and was asked for several" in message
        else:
            torch.testing.assert_close(found, want)


def test_create_graph_without_retained_graph():
    """create_graph=True, retain_graph=False: a recorded gradient all the same, in place too."""
    for inplace in (False, True):
        x = torch.randn(4, 9, requires_grad=True)
        loss = packops.cross_entropy(x * 1, torch.arange(4), inplace=inplace)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True, retain_graph=False)
        with pytest.raises(RuntimeError, match="is differentiable once"):
            gradient.square().sum().backward()


def test_second_derivatives_of_linear_ops():
    cos, sin = packops.rope_table(8, 5, dtype=torch.float64)
    q = torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda q: packops.apply_rope(q, None, cos, sin)[0], q)
    values = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: packops.document_sums(x, torch.tensor([0, 2, 5])), values)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("function", ["cross_entropy", "linear_cross_entropy"])
def test_compiled_second_derivative_raises(function, reduction):
    """torch's own error."""
    torch._dynamo.reset()
    x, w, y = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8), torch.arange(6)

    @functools.partial(torch.compile, backend="aot_eager")
    def loss(x):
        if function == "cross_entropy":
            return packops.cross_entropy(x, y, reduction=reduction).sum()
        return packops.linear_cross_entropy(x, w, y, reduction=reduction).sum()

    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|differentiable once|does not require grad"):
        gradient.square().sum().backward()


# --------------------------------------------------------------------------------------------------------------------------------
# Forward mode


@pytest.mark.parametrize("name, way", DIFFERENTIABLE)
@pytest.mark.parametrize("mode", ["forward_ad", "jvp"])
def test_forward_mode(name, way, mode):
    op = OPS[name]
    for argument in differentiable(op):
        values = inputs_of(op)
        x = values[argument].double() if name in LINEAR and argument in ("q", "k", "values") else values[argument]
        tangent = torch.randn_like(x)

        def f(x, values=values, argument=argument):
            given = {**values, argument: x}
            if name in LINEAR:
                given = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
            return call(op, way, given)

        if name in LINEAR and not (mode == "jvp" and (way == "op" or name in UNTRANSFORMED)):
            if mode == "jvp":
                _, found = torch.func.jvp(f, (x,), (tangent,))
            else:
                with forward_ad.dual_level():
                    found = forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent
            assert found is not None
            torch.testing.assert_close(found, f(tangent) - f(torch.zeros_like(x)))
            continue
        if name == "gated_linear" and mode == "jvp" and argument in ("weight", "bias"):
            continue  # torch's own linear
        if mode == "jvp":
            with pytest.raises(RuntimeError, match=r"forward-mode|torch\.func"):
                torch.func.jvp(f, (x,), (tangent,))
        else:
            with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
                f(forward_ad.make_dual(x, tangent))


@pytest.mark.parametrize("name, way", DIFFERENTIABLE)
def test_inside_a_dual_level_without_tangents(name, way):
    """Forward mode elsewhere is no reason to refuse."""
    op = OPS[name]
    want = call(op, way, inputs_of(op))
    with forward_ad.dual_level():
        assert torch.equal(call(op, way, inputs_of(op)), want)


def test_in_place_inside_a_dual_level():
    """Forward mode elsewhere leaves the loss in place; a tangent is refused before anything is written."""
    leaf, labels = torch.randn(5, 7, requires_grad=True), torch.arange(5)
    (want,) = torch.autograd.grad(packops.cross_entropy(leaf, labels), leaf)
    with forward_ad.dual_level():
        logits = leaf * 1
        packops.cross_entropy(logits, labels, inplace=True).backward()
        assert torch.equal(logits.detach(), want)
        assert torch.equal(leaf.grad, want)
        dual = forward_ad.make_dual(leaf * 1, torch.ones(5, 7))
        before = dual.detach().clone()
        with pytest.raises(RuntimeError, match=r"packops\.cross_entropy has no forward-mode derivative"):
            packops.cross_entropy(dual, labels, inplace=True)
        assert torch.equal(dual, before)


# --------------------------------------------------------------------------------------------------------------------------------
# torch.func


@pytest.mark.parametrize("name", [name for name, way in DIFFERENTIABLE if way == "function"])
def test_transforms(name):
    """grad, vmap, per-sample gradients and jacrev, or an error that names the op."""
    op = OPS[name]
    for argument in differentiable(op):
        values = inputs_of(op)

        def f(x, values=values, argument=argument):
            return call(op, "function", {**values, argument: x})

        x = values[argument]
        batch = torch.stack([x, x.flip(0) * 0.5, x * 2])
        if name in UNTRANSFORMED:
            cases = ((torch.func.grad(f), x), (torch.func.jacrev(f), x), (torch.func.vmap(f), batch))
            for transform, at in (*cases, (torch.func.vmap(torch.func.grad(f)), batch)):
                with pytest.raises(RuntimeError, match=f"packops.{name} does not work under the transforms of torch.func"):
                    transform(at)
            continue

        def by_autograd(x, f=f):
            x = x.clone().requires_grad_()
            return torch.autograd.grad(f(x), x)[0]

        torch.testing.assert_close(torch.func.grad(f)(x), by_autograd(x))
        torch.testing.assert_close(torch.func.vmap(f)(batch), torch.stack([f(x) for x in batch]))
        per_sample = torch.func.vmap(torch.func.grad(f))(batch)
        torch.testing.assert_close(per_sample, torch.stack([by_autograd(x) for x in batch]))
        torch.testing.assert_close(torch.func.grad(lambda b, f=f: torch.func.vmap(f)(b).sum())(batch), per_sample)
        torch.testing.assert_close(torch.func.jacrev(lambda b, f=f: torch.stack([f(b), 2 * f(b)]))(x)[1], 2 * by_autograd(x))
        if name not in LINEAR and (name, argument) not in (("gated_linear", "weight"), ("gated_linear", "bias")):
            with pytest.raises(RuntimeError, match=r"forward-mode|differentiable once"):
                torch.func.hessian(f)(x)
            with pytest.raises(RuntimeError, match="differentiable once"):
                torch.func.grad(lambda x, f=f: torch.func.grad(lambda x: f(x) ** 2)(x).square().sum())(x)


@pytest.mark.parametrize("name, way", [(name, way) for name, way in DIFFERENTIABLE if way == "op"])
def test_transforms_of_the_op_itself_raise(name, way):
    op = OPS[name]
    argument = differentiable(op)[0]
    values = inputs_of(op)
    with pytest.raises(RuntimeError, match=r"packops\.\w+ does not work under the transforms of torch.func"):
        torch.func.grad(lambda x: call(op, way, {**values, argument: x}))(values[argument])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_tensor_of_cross_entropy_may_have_a_batch(reduction):
    torch.manual_seed(1)
    x, y, w = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5)), torch.rand(3, 5)
    c, n, s = torch.rand(3, 7), torch.rand(3) + 1, torch.tensor([[0, 2, 5], [0, 1, 5], [0, 4, 4]])

    def f(x, y, w, c, n, s):
        given = {} if reduction == "none" else {"num_items": n}
        return packops.cross_entropy(
            x, y, token_weight=w, class_weight=c, cu_seqlens=s, reduction=reduction, shift=True, softcap=3.0, **given
        ).sum()

    grads = torch.func.vmap(torch.func.grad(f))(x, y, w, c, n, s)
    values = torch.func.vmap(f)(x, y, w, c, n, s)
    for i in range(3):
        leaf = x[i].clone().requires_grad_()
        loss = f(leaf, y[i], w[i], c[i], n[i], s[i])
        torch.testing.assert_close(values[i], loss.detach())
        torch.testing.assert_close(grads[i], torch.autograd.grad(loss, leaf)[0])


def test_functional_call_over_an_ensemble():
    """Per-sample gradients of parameters, as torch's tutorial makes them."""
    torch.manual_seed(2)
    head, norm = torch.nn.Linear(8, 11), torch.rand(8)
    x, y = torch.randn(4, 6, 8), torch.randint(0, 11, (4, 6))

    def loss(parameters, x, y):
        logits = torch.func.functional_call(head, parameters, (packops.rms_norm(x, norm, eps=1e-6),))
        return packops.cross_entropy(logits, y)

    parameters = {name: p.detach() for name, p in head.named_parameters()}
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for i in range(4):
        want = torch.autograd.grad(loss(dict(head.named_parameters()), x[i], y[i]), list(head.parameters()))
        for name, g in zip(parameters, want, strict=True):
            torch.testing.assert_close(grads[name][i], g)


# --------------------------------------------------------------------------------------------------------------------------------
# Tensors without a gradient


def constants(op: Op) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    found: dict[str, tuple[Tensor, dict[str, Any]]] = {name: (op.tensors[name], {}) for name in op.constant}
    for name in ("token_weight", "class_weight", "num_items"):
        if name in op.options:
            value = op.options[name].value
            found[name] = (value if value.is_floating_point() else value.float(), {})
    return found


@pytest.mark.parametrize("needs_gradient_itself", [True, False])
@pytest.mark.parametrize("name, way", WAYS)
def test_constants_that_need_a_gradient_are_named(name, way, needs_gradient_itself):
    """Also where nothing else needs one; not where no gradient is recorded."""
    op = OPS[name]
    if name == "cross_entropy_stats" and way == "function":
        return
    free = tuple(differentiable(op)) if needs_gradient_itself else ()
    for argument, (value, options) in constants(op).items():
        values = inputs_of(op, free, lambda x: x.clone().requires_grad_())
        with pytest.raises(ValueError, match=rf"packops\.\w+: {argument} needs a gradient, but the op has none for it"):
            call(op, way, {**values, **options, argument: value.clone().requires_grad_()})
        with torch.no_grad():
            call(op, way, {**values, **options, argument: value.clone().requires_grad_()})
        if needs_gradient_itself:
            continue
        with forward_ad.dual_level(), pytest.raises(ValueError, match=f"{argument} needs a gradient"):
            call(op, way, {**values, **options, argument: forward_ad.make_dual(value, torch.ones_like(value))})
    assert constants(op) or not op.constant


# --------------------------------------------------------------------------------------------------------------------------------
# In place

LOSSES = ("cross_entropy", "vocab_parallel_cross_entropy")
REDUCTIONS = ("none", "sum", "mean", "seq-mean-token-mean", "seq-mean-token-sum")


def loss_in_place(name: str, logits: Tensor, reduction: str, **options: Any) -> Tensor:
    return getattr(packops, name)(logits, torch.arange(6), reduction=reduction, **options).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_what_others_saved_is_not_overwritten_unseen(name, reduction, dtype):
    for activation in (torch.exp, torch.tanh, torch.sigmoid, torch.relu):
        x = torch.randn(6, 20).to(dtype).requires_grad_()
        loss = loss_in_place(name, activation(x), reduction, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    x = torch.randn(6, 20).to(dtype).requires_grad_()
    logits = x * 1
    aside = logits.square().sum()  # a second reader of the logits, whose backward comes later
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (aside.to(torch.float64) + loss_in_place(name, logits, reduction, inplace=True)).backward()
    # The other reader's backward alone, with logits that the forward has overwritten or will leave to the backward.
    logits = x * 1
    aside = logits.square().sum()
    loss_in_place(name, logits, reduction, inplace=True)
    if torch.equal(logits, x):
        assert torch.equal(torch.autograd.grad(aside, x)[0], 2 * x)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(aside, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_in_place_with_a_graph_that_is_kept(name, reduction, dtype):
    """Every backward gives the gradient of the form that is not in place."""
    x = torch.randn(6, 20).to(dtype).requires_grad_()
    (want,) = torch.autograd.grad(loss_in_place(name, x * 1, reduction), x)
    loss = loss_in_place(name, x * 1, reduction, inplace=True)
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if dtype in (torch.bfloat16, torch.float16) else {}
    for factor, keep in ((1.0, True), (3.0, True), (1.0, True), (2.0, False)):
        (got,) = torch.autograd.grad(loss, x, torch.full_like(loss, factor), retain_graph=keep)
        torch.testing.assert_close(got, want * factor, **tolerance)


@pytest.mark.parametrize("name", LOSSES)
def test_in_place_refuses_memory_that_overlaps(name):
    x = torch.randn(100, requires_grad=True) * 1
    for logits in (
        x[None, :20].expand(6, 20),
        x.as_strided((6, 20), (3, 1)),
        x[:20].expand(2, 3, 20)[0][:1].expand(6, 20),
        x.as_strided((6, 4), (4, 5)),
    ):
        for reduction in ("mean", "none"):
            with pytest.raises(ValueError, match="inplace=True needs logits"):
                loss_in_place(name, logits, reduction, inplace=True)
    rows = (torch.randn(6, 32, requires_grad=True) * 1)[:, :20]  # no overlap: a slice of a padded vocabulary
    loss_in_place(name, rows, "mean", inplace=True).backward()


def test_statistics_are_the_callers():
    """Written after the call, they change no gradient."""
    x, y = torch.randn(6, 20, requires_grad=True), torch.arange(6)
    (want,) = torch.autograd.grad(packops.cross_entropy(x, y, token_weight=torch.rand(6)), x)
    torch.manual_seed(0)
    weight = torch.rand(6)
    for reduction in ("mean", "none"):
        (want,) = torch.autograd.grad(packops.cross_entropy(x, y, reduction=reduction, token_weight=weight).sum(), x)
        loss, stats = packops.cross_entropy(x, y, reduction=reduction, token_weight=weight, return_stats=True)
        for value in stats:
            value.fill_(1)
        (got,) = torch.autograd.grad(loss.sum(), x)
        assert torch.equal(got, want)


def test_rope_in_place_names_views_that_cannot_be_written():
    cos, sin = packops.rope_table(8, 5)
    for make in (lambda x: x.unbind(1)[0], lambda x: x.split(1, 1)[0][:, 0], lambda x: x.chunk(2, 1)[1]):
        x = torch.randn(5, 2, 3, 8, requires_grad=True) * 1
        q = make(x).reshape(5, -1, 8) if make(x).dim() == 4 else make(x)
        before = x.detach().clone()
        if "Unbind" in type(q.grad_fn).__name__ or "Split" in type(q.grad_fn).__name__:
            with pytest.raises(ValueError, match="several views that unbind, split or chunk made"):
                packops.apply_rope(q, None, cos, sin, inplace=True)
            assert torch.equal(x, before)
    x = torch.randn(5, 2, 3, 8, requires_grad=True) * 1
    packops.apply_rope(x[:, 0], None, cos, sin, inplace=True)[0].sum().backward()


def test_boundaries_that_change_before_the_backward_are_an_error():
    """As with every tensor that autograd keeps: the buffer of the next batch, say."""
    bounds, values = torch.tensor([0, 2, 6]), torch.ones(6, requires_grad=True)
    sums = packops.document_sums(values, bounds)
    (grad,) = torch.autograd.grad(sums, values, torch.tensor([1.0, 10.0], requires_grad=True), create_graph=True)
    bounds[1] = 5
    for result in (sums, grad):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward(retain_graph=True)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("saved", [(), ("packops",), ("packops", "aten.mm")], ids=str)
def test_selective_checkpointing(saved, inplace):
    """What writes to its arguments runs again, since no result says what it wrote."""
    weight, head = torch.randn(16, 16), torch.randn(5, 16)
    labels, (cos, sin) = torch.arange(6) % 5, packops.rope_table(8, 16)

    def block(x):
        q, _ = packops.apply_rope((x @ weight).view(6, 2, 8), None, cos, sin, inplace=inplace)
        return torch.tanh(q).square().sum() + packops.cross_entropy(x @ head.t(), labels, inplace=inplace)

    def policy(_context, op, *arguments, **keywords):
        return CheckpointPolicy.MUST_SAVE if any(name in str(op) for name in saved) else CheckpointPolicy.PREFER_RECOMPUTE

    x = torch.randn(6, 16, requires_grad=True)
    (want,) = torch.autograd.grad(block(x), x)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    if inplace and "aten.mm" in saved:  # whose result is then overwritten
        with pytest.raises(RuntimeError, match="has been mutated"):
            torch.autograd.grad(checkpoint(block, x, use_reentrant=False, context_fn=contexts), x)
        return
    (got,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False, context_fn=contexts), x)
    torch.testing.assert_close(got, want)
