"""A packed training loop with Accelerate: gradient accumulation and several processes, and still one mean over the whole step.

    pip install '.[hf]'
    python examples/accelerate_loop.py                                            # one process
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py         # two share every step

Runs on a CPU in well under a minute, on real text: networkx's docstrings. ``num_items`` is the number of documents in a step over
all micro-batches and processes; dividing each loss by it is all that makes them add up.
"""

import argparse
import contextlib

import accelerate
import torch
import transformers
from torch.utils.data import DataLoader

import packops
from packops.demo import corpus
from packops.hf import attention


def main(steps: int = 15, documents: int = 400, accumulate: int = 2) -> list[float]:
    accelerator = accelerate.Accelerator(cpu=True)
    text = corpus.load(
        vocab_size=1024, max_tokens=256, num_training=documents, num_held_out=0, seed=0, packages=["networkx"]
    )  # fmt: skip
    lengths = [len(document) for document in text.training]

    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=text.vocab_size, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention.register())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)

    # The sampler deals packs to the processes itself, evened out by their cost, so Accelerate must not deal them again.
    sampler = packops.PackedBatchSampler(lengths, 1024, rank=accelerator.process_index, world_size=accelerator.num_processes)
    loader: DataLoader = DataLoader(text.training, batch_sampler=sampler, collate_fn=packops.PackingCollator())  # type: ignore[arg-type]
    history: list[float] = []
    epoch = 0
    while len(history) < steps:
        sampler.set_epoch(epoch)
        epoch += 1
        batches = iter(loader)
        while len(history) < steps and (step := [batch for _, batch in zip(range(accumulate), batches, strict=False)]):
            num_items = packops.loss_normalizer(step, reduction="seq-mean-token-mean")  # of all processes
            total = torch.zeros(())
            for number, batch in enumerate(step):
                inputs = batch.to_hf()
                labels = inputs.pop("labels")
                is_last = number == len(step) - 1  # of the step: only then do the processes exchange gradients
                with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                    loss = packops.cross_entropy(
                        model(**inputs).logits, labels, cu_seqlens=batch.cu_seqlens, shift=True,
                        reduction="seq-mean-token-mean", num_items=num_items,
                    )  # fmt: skip
                    accelerator.backward(loss)
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            history.append(accelerator.reduce(total, "mean").item())
            if len(history) % 5 == 1:
                accelerator.print(f"step {len(history):3d}  loss {history[-1]:.3f}", flush=True)
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--documents", type=int, default=400)
    main(**vars(parser.parse_args()))
