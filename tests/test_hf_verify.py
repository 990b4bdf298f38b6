"""packops.verify on patched models: what is right is green, and what is wrong is caught."""

from __future__ import annotations

import pytest
import torch

import packops
import packops.hf
from packops import PackingCollator

transformers = pytest.importorskip("transformers")

from hf_models import documents, make  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("reduction", ["mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_verify_is_green(reduction, fused):
    model = packops.hf.apply(make("qwen3"), reduction=reduction)
    report = packops.verify(model, documents(), reduction=reduction)
    assert report.ok, report
    assert report.worst_leak == 0


def test_verify_runs_what_training_runs(monkeypatch):
    """A mistake in the path without logits is seen, although verify has the model in evaluation mode."""

    right = packops.linear_cross_entropy
    monkeypatch.setattr(packops, "linear_cross_entropy", lambda *inputs, **options: right(*inputs, **options) * 1.01)
    assert not packops.verify(packops.hf.apply(make("llama")), documents()).ok


def test_positions_that_do_not_restart_are_caught():
    def collate(texts):
        batch = PackingCollator()(texts)
        batch.position_ids = torch.arange(batch.num_tokens)[None]
        return batch

    report = packops.verify(make("llama"), documents(), collator=collate)
    assert not report.ok
    assert report.worst_leak > 1e-3
    with pytest.raises(ValueError, match="position_ids go on from one document of cu_seq_lens_q to the next"):
        packops.verify(packops.hf.apply(make("llama")), documents(), collator=collate)


def test_a_loss_across_the_boundary_is_caught(monkeypatch):
    """The last token of a document scored against the first of the next, as labels without boundaries have it."""

    def careless(self, logits, labels, vocab_size=None, num_items_in_batch=None, **kwargs):
        ids = kwargs["shift_labels"]
        return packops.cross_entropy(logits, ids, num_items=num_items_in_batch)

    def forward(model, batch, num_items):
        ids = torch.nn.functional.pad(batch.input_ids[:, 1:], (0, 1), value=-100)
        return model(**batch.to_hf(), shift_labels=ids, num_items_in_batch=num_items).loss

    report = packops.verify(packops.hf.apply(make("llama")), documents(), loss=forward)
    assert not report.ok
    assert "boundary" in report.findings[0]


def test_a_denominator_of_the_micro_batch_is_caught():
    def forward(model, batch, num_items):
        return model(**batch.to_hf()).loss

    report = packops.verify(packops.hf.apply(make("llama")), documents(), loss=forward)
    assert not report.ok
    assert "its own count" in report.findings[0]
