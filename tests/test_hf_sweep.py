"""Families that have something of their own: what packops.hf accepts gives the losses and gradients that were meant.

``python tests/sweep_families.py`` runs every causal language model of the installed transformers.
"""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import packops
import packops.hf
from packops.hf import families
from sweep_families import alone, build, difference, documents, outcome, packed

pytestmark = pytest.mark.usefixtures("one_thread")

# family: what comes of (rope, and attention as it is), of packops_varlen, and of packops_varlen without rope
RIGHT, MASK, ROTATION, NONE, NOT_SO = (
    "right",
    "with the attention mask itself",
    "also calls",
    "no layer of it calls",
    "never looks",
)
CASES = {
    "deepseek_v32": (ROTATION, ROTATION, MASK),  # a second rotary function, beside the one of its indexer
    "axk2": (ROTATION, ROTATION, MASK),
    "deepseek_v3": (ROTATION, ROTATION, RIGHT),
    "ctrl": (NONE, NONE, RIGHT),
    "doge": (NOT_SO, MASK, MASK),
    "glm_moe_dsa": (NONE, NONE, MASK),
    "hy_v4": (RIGHT, MASK, MASK),
    "jetmoe": (RIGHT, RIGHT, RIGHT),  # goes on with .view()
    "afmoe": (NOT_SO, RIGHT, RIGHT),
    "gpt_oss": (NOT_SO, RIGHT, RIGHT),
    "granite_swa": (RIGHT, RIGHT, RIGHT),  # a table for each kind of layer
    "flint": (RIGHT, RIGHT, RIGHT),
    "opt": (NONE, NONE, RIGHT),
    "biogpt": (NONE, NONE, RIGHT),
    "bloom": (NONE, NONE, "does not take attention"),
    "falcon": (NOT_SO, "does not take attention", "does not take attention"),
    "bart": (NONE, NONE, "have wrong positions"),
    "phimoe": (RIGHT, RIGHT, RIGHT),
    "cohere2_moe": (RIGHT, RIGHT, RIGHT),
    "minimax_m3_vl_text": (RIGHT, RIGHT, RIGHT),
    "gemma3n_text": ("in a way of its own", "in a way of its own", RIGHT),
    "kolibri1": (RIGHT, RIGHT, RIGHT),
    "moshi": (RIGHT, RIGHT, RIGHT),
}
WAYS = ({}, {"attention": "packops_varlen"}, {"attention": "packops_varlen", "rope": False})


@pytest.mark.parametrize("family", CASES)
def test_right_or_refused(family):
    try:
        model = build(family)
    except KeyError:
        pytest.skip(f"this transformers has no {family}")
    expected = alone(model)
    for way, wanted in zip(WAYS, CASES[family], strict=True):
        if wanted == NOT_SO and not families.never_looks(model):
            wanted = RIGHT
        assert wanted in outcome(model, expected, **way), way
    # What is said to let documents see each other does, without packops; and nothing that is said not to.
    unsound = families.never_looks(model) or family in families.NO_POSITIONS
    assert (difference(packed(model), expected) > 0.1) == unsound


def test_a_model_that_makes_its_own_mask_is_refused(monkeypatch):
    """As some of transformers 5.0 and 5.1 do, and remote code that was written for older ones."""
    model = build("llama")
    inputs = packops.PackingCollator(names="hf")(documents())
    monkeypatch.setattr(type(model.model), "_update_causal_mask", None, raising=False)
    with pytest.raises(ValueError, match="it makes its mask by itself"):
        packops.hf.apply(model, attention="packops_varlen")
    with pytest.raises(ValueError, match=r"'llama' of transformers [\d.]+ never looks where packed documents"):
        packops.hf.apply(model)(**inputs)
    monkeypatch.undo()
    assert packops.hf.apply(packops.hf.revert(model))(**inputs).loss.isfinite()


def test_masks_are_looked_for_without_weights():
    """This family is not tiny with any sizes; it is asked on the meta device."""
    model = build("dots3_note", device="meta")
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn \(Dots3NoteTextAttention\) computes with the attention mask itself"
    ):
        packops.hf.apply(model, rope=False, attention="packops_varlen")


def test_cross_attention_is_refused():
    sizes = {"vocab_size": 64, "d_model": 32, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4}
    transformers = pytest.importorskip("transformers")
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    with pytest.raises(ValueError, match="attends to more than its own tokens"):
        packops.hf.apply(model, rope=False, cross_entropy=False, attention="packops_varlen")


@pytest.mark.parametrize("family", ["mamba", "minimax"])
def test_layers_with_a_state_are_told(family):
    model = packops.hf.apply(build(family), rope=family == "minimax")
    (note,) = [note for note in packops.hf.report(model).notes if "state" in note]
    assert "carry a state from token to token" in note
    assert difference(packed(model), alone(model)) > 0.1
