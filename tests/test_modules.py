"""Modules add nothing to the functions: same options, same values, state where torch's users look for it."""

from __future__ import annotations

import inspect

import pytest
import torch

import packops
from packops import modules

PER_CALL = {"logits", "labels", "cu_seqlens", "num_items", "token_weight"}


def test_loss_module_has_every_option_of_the_function():
    """An option that is added to the function and forgotten here would be missing without a word."""
    function = inspect.signature(packops.cross_entropy).parameters
    made = inspect.signature(packops.CrossEntropyLoss).parameters
    called = set(inspect.signature(packops.CrossEntropyLoss.forward).parameters) - {"self"}
    assert called == PER_CALL
    assert set(made) | called == set(function)
    assert {name: made[name].default for name in made} == {name: function[name].default for name in made}


@pytest.mark.parametrize(
    "option",
    [
        {"shift": True},
        {"reduction": "sum"},
        {"ignore_index": 3},
        {"class_weight": torch.rand(11) + 0.1},
        {"label_smoothing": 0.1},
        {"z_loss": 0.01},
        {"softcap": 2.0},
        {"logit_scale": 0.5},
    ],
    ids=lambda option: next(iter(option)),
)
def test_loss_module_passes_each_option_on(device, option):
    """One option at a time, each of which changes the loss."""
    option = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in option.items()}
    logits, labels = torch.randn(9, 11, device=device, requires_grad=True), torch.randint(0, 11, (9,), device=device)
    labels[1] = 3
    loss, expected = packops.CrossEntropyLoss(**option)(logits, labels), packops.cross_entropy(logits, labels, **option)
    assert loss.item() != packops.cross_entropy(logits, labels).item()
    assert torch.equal(loss, expected)
    assert torch.equal(*(torch.autograd.grad(x, logits)[0] for x in (loss, expected)))


def test_loss_module_passes_tensors_and_switches_on(device):
    logits, labels = torch.randn(9, 11, device=device), torch.randint(0, 11, (9,), device=device)
    arguments = {
        "cu_seqlens": torch.tensor([0, 7, 9], device=device),
        "num_items": 5,
        "token_weight": torch.rand(9, device=device),
    }
    module = packops.CrossEntropyLoss(reduction="seq-mean-token-mean", return_stats=True)
    loss, stats = module(logits, labels, **arguments)
    assert torch.equal(loss, packops.cross_entropy(logits, labels, reduction="seq-mean-token-mean", **arguments))
    assert stats.num_sequences == 2
    source = logits.requires_grad_() * 1
    before = source.detach().clone()
    packops.CrossEntropyLoss(inplace=True)(source, labels)
    assert not torch.equal(source.detach(), before)


def test_class_weight_is_state():
    weight = torch.rand(11) + 0.1
    module = packops.CrossEntropyLoss(class_weight=weight)
    assert list(module.state_dict()) == ["class_weight"]
    assert list(packops.CrossEntropyLoss().state_dict()) == []
    assert module.to("meta").class_weight.device.type == "meta"
    assert list(module.parameters()) == []
    assert repr(packops.CrossEntropyLoss(shift=True)) == "CrossEntropyLoss(reduction='mean', shift=True, ignore_index=-100)"


def test_modules_are_the_public_ones():
    assert packops.RotaryEmbedding is modules.RotaryEmbedding
    for name in modules.__all__:
        assert issubclass(getattr(packops, name), torch.nn.Module)
        assert name in packops.__all__


@pytest.mark.slow
def test_loss_module_compiles(device):
    module = packops.CrossEntropyLoss(shift=True, class_weight=torch.rand(11, device=device))
    logits, labels = torch.randn(9, 11, device=device), torch.randint(0, 11, (9,), device=device)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(logits, labels), module(logits, labels))
