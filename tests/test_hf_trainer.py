"""Packed batches in ``transformers.Trainer`` and TRL: the weights after training are those of the loss that was meant.

What was meant is trained in plain torch, document by document, with the loss of the whole global batch.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch
import torch.nn.functional as F

import packops
from ranks import run_ranks

transformers = pytest.importorskip("transformers", reason="needs packops[hf]")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate: pip install 'packops[hf]'")

from packops import hf  # noqa: E402
from packops.hf import attention  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, PER_STEP, STEPS, RATE = 53, 8, 2, 0.5
# (documents in a micro-batch, micro-batches): all of them are one step of eight documents
SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]


def documents(masked: bool = False) -> list[dict[str, list[int]]]:
    """Two steps of documents of very different lengths; ``masked``: of some, only the end is scored, of one, nothing."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(PER_STEP * STEPS):
        length = [3, 40, 2, 11, 1, 25, 7, 4][number % 8] + number // 8
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        document = {"input_ids": ids}
        if masked:
            unscored = length if number == 5 else length // 2 if number % 3 else 0
            document["labels"] = [-100] * unscored + ids[unscored:]
        found.append(document)
    return found


def model(implementation: str = "eager"):
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    attention.register()
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def weights(trained) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trained.parameters()])


@functools.cache
def meant(reduction: str = "mean", masked: bool = False) -> torch.Tensor:
    """Weights after training on each document alone, with the losses of a global batch put together by their definition."""
    reference = model().double()
    data = documents(masked)
    for step in range(STEPS):
        means, sums, counts = [], [], []
        for document in data[PER_STEP * step : PER_STEP * (step + 1)]:
            ids = torch.tensor([document["input_ids"]])
            targets = torch.tensor(document.get("labels", document["input_ids"]))[1:]
            losses = F.cross_entropy(reference(input_ids=ids, use_cache=False).logits[0, :-1], targets, reduction="none")
            count = int((targets != -100).sum())
            if count:
                means, sums, counts = [*means, losses.sum() / count], [*sums, losses.sum()], [*counts, count]
        total = {
            "mean": sum(sums) / sum(counts),
            "seq-mean-token-mean": sum(means) / len(means),
            "seq-mean-token-sum": sum(sums) / len(sums),
        }
        rate = RATE / 8 if reduction == "seq-mean-token-sum" else RATE
        reference.zero_grad()
        total[reduction].backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= rate * parameter.grad
    return weights(reference).float()


def arguments(folder, per_device: int, accumulate: int, reduction: str = "mean"):
    return {
        "output_dir": str(folder), "per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulate,
        "max_steps": STEPS, "train_sampling_strategy": "sequential", "optim": "sgd", "lr_scheduler_type": "constant",
        "learning_rate": RATE / 8 if reduction == "seq-mean-token-sum" else RATE, "max_grad_norm": 0, "use_cpu": True,
        "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False, "ddp_find_unused_parameters": False,
    }  # fmt: skip


def trainer(folder, per_device, accumulate, *, trained, masked=False, reduction="mean", **options):
    settings = transformers.TrainingArguments(**arguments(folder, per_device, accumulate, reduction), remove_unused_columns=False)
    collator = packops.PackingCollator(names="hf")
    return transformers.Trainer(trained, settings, train_dataset=documents(masked), data_collator=collator, **options)


def assert_meant(found: torch.Tensor, reduction: str = "mean", masked: bool = False) -> None:
    expected = meant(reduction, masked)
    start = weights(model())
    assert (expected - start).abs().max() > 0.05  # it has learnt something
    assert (found - expected).abs().max() < 2e-5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("per_device, accumulate", SPLITS)
def test_token_mean(tmp_path, per_device, accumulate, masked):
    """The mean over the tokens of the global batch, however that is split."""
    trained = model(attention.NAME)
    trainer(tmp_path, per_device, accumulate, trained=trained, masked=masked, compute_loss_func=hf.compute_loss_func).train()
    assert_meant(weights(trained), masked=masked)


def test_what_it_is_not(tmp_path):
    """The mean of micro-batches' means, or stock attention once the cache is on, end elsewhere: this data tells them apart."""
    trained = model(attention.NAME)

    def own_mean(outputs, labels, num_items_in_batch):
        return hf.compute_loss_func(outputs, labels) / 4

    trainer(tmp_path, 2, 4, trained=trained, compute_loss_func=own_mean).train()
    assert (weights(trained) - meant()).abs().max() > 1e-2


@pytest.mark.parametrize("reduction", ["mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("per_device, accumulate", [(8, 1), (2, 4)])
def test_applied(tmp_path, per_device, accumulate, reduction):
    """A model after ``packops.hf.apply``: its own loss, of tokens or of documents."""
    trained = model()
    hf.apply(trained, attention=attention.NAME, reduction=reduction)
    made = trainer(tmp_path, per_device, accumulate, trained=trained, masked=True, reduction=reduction)
    if reduction != "mean":
        hf.count_documents(made)
    made.train()
    assert_meant(weights(trained), reduction, masked=True)


def train_on_rank(rank, folder, expected):
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 0, "OMP_NUM_THREADS": 1}
    os.environ |= {name: str(value) for name, value in ours.items()}
    trained = model(attention.NAME)
    trainer(folder, 1, 4, trained=trained, masked=True, compute_loss_func=hf.compute_loss_func).train()
    assert torch.distributed.get_world_size() == 2
    assert (weights(trained) - expected["mean"]).abs().max() < 2e-5
    trained = model()
    hf.apply(trained, attention=attention.NAME, reduction="seq-mean-token-mean")
    made = trainer(folder, 2, 2, trained=trained, masked=True)
    hf.count_documents(made)
    made.train()
    assert (weights(trained) - expected["seq-mean-token-mean"]).abs().max() < 2e-5


@pytest.mark.slow
def test_data_parallel(tmp_path):
    """Two processes, each with a half of every global batch: another number of tokens and of scored documents in each."""
    expected = {reduction: meant(reduction, True) for reduction in ("mean", "seq-mean-token-mean")}
    run_ranks(2, tmp_path, train_on_rank, tmp_path, expected)


def sft(folder, per_device, accumulate, *, trained, own_loss=False, **options):
    """``own_loss``: the loss is the model's, after ``packops.hf.apply``, and not that of ``compute_loss_func``."""
    import datasets
    import trl

    class Trainer(trl.SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            return transformers.Trainer.compute_loss(self, *args, **kwargs)

    defaults = {"max_length": 64, "bf16": False, "gradient_checkpointing": False, "dataset_num_proc": None}
    settings = trl.SFTConfig(**{**arguments(folder, per_device, accumulate), **defaults, **options})
    rows = datasets.Dataset.from_list([{"input_ids": document["input_ids"]} for document in documents()])
    if own_loss:
        return Trainer(trained, settings, train_dataset=rows, processing_class=processing_class())
    with pytest.warns(FutureWarning, match="compute_loss_func"):
        return trl.SFTTrainer(
            trained, settings, train_dataset=rows, processing_class=processing_class(), compute_loss_func=hf.compute_loss_func
        )


def processing_class():
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{str(number): number for number in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def gather_documents(found: list[list[int]]) -> list[list[int]]:
    every: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, found)
    return [document for part in every for document in part]


class PackedTrainer(transformers.Trainer):
    """As docs/hugging_face.md shows: a batch sampler of whole packs, shared out by accelerate."""

    def get_train_dataloader(self):
        lengths = [len(document["input_ids"]) for document in self.train_dataset]
        self.sampler = packops.PackedBatchSampler(lengths, 48, all_ranks=True)
        loader = torch.utils.data.DataLoader(self.train_dataset, batch_sampler=self.sampler, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


def share_out_on_rank(rank, folder):
    import accelerate

    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 0, "OMP_NUM_THREADS": 1}
    os.environ |= {name: str(value) for name, value in ours.items()}
    accelerator = accelerate.Accelerator(cpu=True)
    data = [[number] * (1 + number % 17) for number in range(100)]
    lengths = list(map(len, data))
    orders = []
    sampler = packops.PackedBatchSampler(lengths, 64, all_ranks=True)
    loader = accelerator.prepare(torch.utils.data.DataLoader(data, batch_sampler=sampler, collate_fn=list))
    for epoch in range(2):
        loader.set_epoch(epoch)
        assert sampler.epoch == epoch
        steps = list(loader)
        assert len(steps) == len(loader) == len(sampler) // 2
        orders.append(gather_documents([document for step in steps for document in step]))
        assert sorted(orders[-1]) == sorted(data), "every document once, on one rank"
    assert orders[0] != orders[1]
    sampler = packops.PackedBatchSampler(lengths, 64)
    with pytest.raises(ValueError, match="all_ranks=True"):
        accelerator.prepare(torch.utils.data.DataLoader(data, batch_sampler=sampler, collate_fn=list))

    seen: list[list[int]] = []

    def collate(batch):
        seen.extend(document["input_ids"] for document in batch)
        return packops.PackingCollator(names="hf")(batch)

    settings = arguments(folder, 1, 1) | {"max_steps": -1, "num_train_epochs": 2}
    settings = transformers.TrainingArguments(**settings, remove_unused_columns=False)
    trained = hf.apply(model(), attention=attention.NAME)
    made = PackedTrainer(trained, settings, train_dataset=documents(), data_collator=collate)
    made.train()
    assert made.sampler.epoch == 1
    both = sorted(gather_documents(seen))
    assert both == sorted(2 * [document["input_ids"] for document in documents()])


@pytest.mark.slow
def test_packs_are_shared_out_by_accelerate(tmp_path):
    """Two processes: what trains is every document once an epoch, and each epoch packs anew."""
    run_ranks(2, tmp_path, share_out_on_rank, tmp_path)


TRL = pytest.mark.skipif(
    "not __import__('importlib').util.find_spec('trl')",
    reason="TRL is not installed, so nothing is shown about SFTTrainer: pip install trl",
)


@TRL
@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize("per_device, accumulate", [(8, 1), (2, 4)])
def test_trl_padding_free(tmp_path, per_device, accumulate, own_loss):
    trained = model(attention.NAME)
    if own_loss:
        hf.apply(trained)
    sft(tmp_path, per_device, accumulate, trained=trained, own_loss=own_loss, padding_free=True, max_length=None).train()
    assert_meant(weights(trained))


@TRL
def test_trl_packing(tmp_path):
    """TRL packs the documents itself, which mixes the steps: here one step of all of them."""
    trained = model(attention.NAME)
    made = sft(tmp_path, 1, 1, trained=trained, packing=True, max_length=256)
    assert len(made.train_dataset) == 1
    made.args.max_steps = 1
    made.train()
    expected = model().double()
    losses, count = 0.0, 0
    for document in documents():
        ids = torch.tensor([document["input_ids"]])
        logits = expected(input_ids=ids, use_cache=False).logits[0, :-1]
        losses, count = losses + F.cross_entropy(logits, ids[0, 1:], reduction="sum"), count + len(ids[0]) - 1
    (losses / count).backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= RATE * parameter.grad
    assert (weights(trained) - weights(expected)).abs().max() < 2e-5


@TRL
@pytest.mark.parametrize("reduction", ["seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("per_device, accumulate", [(8, 1), (2, 4)])
def test_trl_with_a_mean_of_documents(tmp_path, per_device, accumulate, reduction):
    """By the model's own loss; TRL's would ignore the reduction, and its count of tokens, divided by documents, be far off."""
    import trl

    trained = hf.apply(model(), attention=attention.NAME, reduction=reduction)
    options = {"padding_free": True, "max_length": None}
    learning_rate = RATE / 8 if reduction == "seq-mean-token-sum" else RATE
    made = sft(tmp_path, per_device, accumulate, trained=trained, own_loss=True, learning_rate=learning_rate, **options)
    hf.count_documents(made)
    made.train()
    assert_meant(weights(trained), reduction)

    plain = trl.SFTTrainer(
        hf.apply(model(), attention=attention.NAME, reduction=reduction), made.args, train_dataset=made.train_dataset,
        processing_class=processing_class(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="SFTTrainer computes a loss of its own"):
        hf.count_documents(plain)
    with pytest.raises(ValueError, match="TRL asked it for log-probabilities"):
        plain.train()
