"""Packed training steps as one compiled graph each: no Python, and on a GPU one launch instead of hundreds.

    pip install '.[hf]'
    python examples/compiled_steps.py

Runs on a CPU in about a minute, most of which is the compiler's. The text is networkx's docstrings, and no two rows have the same
documents. The graph is made once all the same, because every shape and number that it sees is the same in every step: the
collator pads the row and its boundaries, and ``to_hf(static=True)`` gives bounds in place of what only this row has.
"""

import argparse
import time

import torch
import transformers

import packops
from packops.demo import corpus

TOKENS = 1024  # of a row


def main(steps: int = 12, documents: int = 400) -> list[float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = corpus.load(
        vocab_size=1024, max_tokens=256, num_training=documents, num_held_out=0, seed=0, packages=["networkx"]
    )  # fmt: skip
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=text.vocab_size, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).to(device)
    packops.hf.apply(model, attention="packops_varlen")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # "reduce-overhead" records CUDA graphs; on a CPU there are none.
    compiled = torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else "default", fullgraph=True)

    # Whatever documents a pack has: the row is of TOKENS tokens, and cu_seqlens of so many documents, the last ones empty.
    most = TOKENS // 8
    collate = packops.PackingCollator(pad_to_length=TOKENS, num_documents=most + 1)
    lengths = [len(document) for document in text.training]
    packs = [pack for epoch in range(steps) for pack in packops.pack(lengths, TOKENS, max_docs_per_pack=most, epoch=epoch)]

    history: list[float] = []
    first = seconds = 0.0
    for pack in packs[:steps]:
        batch = collate([text.training[i] for i in pack]).to(device)
        num_items = torch.tensor(float(batch.num_items), device=device)  # a tensor: a number would be a graph of its own
        begin = time.perf_counter()
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(**batch.to_hf(static=True), num_items_in_batch=num_items).loss
        loss.backward()
        if not history:
            compare(model, batch, num_items, loss)
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
        first, seconds = first or time.perf_counter() - begin, time.perf_counter() - begin
        print(f"step {len(history):2d}  {batch.num_documents:3d} documents  loss {history[-1]:.3f}", flush=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(f"{graphs} graph; first step {first:.1f} s with the compiler, last {1e3 * seconds:.0f} ms")
    return history


def compare(model: torch.nn.Module, batch: packops.PackedBatch, num_items: torch.Tensor, loss: torch.Tensor) -> None:
    """The compiled step's loss and gradients against the model as it is."""
    compiled = [parameter.grad for parameter in model.parameters()]
    eager = model(**batch.to_hf(), num_items_in_batch=num_items).loss
    torch.testing.assert_close(loss, eager, rtol=1e-4, atol=1e-5)
    for found, expected in zip(compiled, torch.autograd.grad(eager, list(model.parameters())), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    print("compiled and eager: loss and gradients agree")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--documents", type=int, default=400)
    main(**vars(parser.parse_args()))
