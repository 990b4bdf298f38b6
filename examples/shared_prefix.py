"""Answers to one prompt, in a row that holds the prompt once: the same gradients from a fraction of the tokens.

    pip install '.[hf]'
    python examples/shared_prefix.py

Runs on a CPU in under a minute. Prompts are the beginnings of networkx's docstrings. Each has a group of answers: how it really
goes on, and how others do. The true answer is rewarded, and the model learns from the advantage within the group by a clipped
ratio of whole answers (GSPO, Zheng et al. 2025). A step's documents are packed twice, flat and with shared prefixes.
"""

import argparse
import time

import torch
import transformers

import packops
from packops.demo import corpus

GROUP, PROMPT, ANSWER, CLIP = 8, 72, 16, 0.2


def documents_of(training: list[torch.Tensor], prompts: list[int], generator: torch.Generator) -> list[dict[str, torch.Tensor]]:
    """For each prompt its true answer, then the answers of others. Prompts are not scored."""
    documents = []
    for i in prompts:
        others = torch.randint(len(training), (GROUP - 1,), generator=generator).tolist()
        for j in [i, *others]:
            ids = torch.cat([training[i][:PROMPT], training[j][PROMPT : PROMPT + ANSWER]])
            documents.append({"input_ids": ids, "labels": torch.where(torch.arange(len(ids)) < PROMPT, -100, ids)})
    return documents


def objective(model: torch.nn.Module, batch: packops.PackedBatch, before: torch.Tensor) -> torch.Tensor:
    log_probs = batch.document_sums(packops.hf.log_probs(model, batch, entropy=False).log_probs)
    advantage = torch.full((GROUP,), -1.0 / (GROUP - 1))
    advantage[0] = 1.0
    advantage = advantage.repeat(len(log_probs) // GROUP)
    ratio = ((log_probs - before) / ANSWER).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()


def main(steps: int = 12, documents: int = 100, prompts: int = 4) -> float:
    text = corpus.load(vocab_size=512, max_tokens=PROMPT + ANSWER, num_training=documents, num_held_out=0, seed=0,
                       packages=["networkx"])  # fmt: skip
    training = [torch.from_numpy(document) for document in text.training if len(document) == PROMPT + ANSWER]
    transformers.set_seed(0)
    generator = torch.Generator().manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=text.vocab_size, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    model = packops.hf.apply(transformers.AutoModelForCausalLM.from_config(config), attention="packops_varlen")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    collators = {"flat": packops.PackingCollator(), "shared": packops.PackingCollator(share_prefixes=True)}
    seconds, tokens = dict.fromkeys(collators, 0.0), dict.fromkeys(collators, 0)
    for step in range(steps):
        chosen = torch.randperm(len(training), generator=generator)[:prompts].tolist()
        group = documents_of(training, chosen, generator)
        batches = {name: collate(group) for name, collate in collators.items()}
        with torch.no_grad():
            before = batches["shared"].document_sums(packops.hf.log_probs(model, batches["shared"], entropy=False).log_probs)
        gradients = {}
        for name, batch in batches.items():
            started = time.perf_counter()
            loss = objective(model, batch, before)
            gradients[name] = torch.autograd.grad(loss, list(model.parameters()))
            seconds[name] += time.perf_counter() - started
            tokens[name] += batch.num_tokens
        if step == 0:
            for flat, shared in zip(gradients["flat"], gradients["shared"], strict=True):
                torch.testing.assert_close(shared, flat, rtol=1e-3, atol=1e-5)
            print("shared and flat: gradients agree", flush=True)
        for parameter, gradient in zip(model.parameters(), gradients["shared"], strict=True):
            parameter.grad = gradient
        optimizer.step()
    saved = tokens["flat"] / tokens["shared"]
    print(f"tokens {tokens['flat']} -> {tokens['shared']}, {saved:.1f} times fewer")
    print(f"a step {seconds['flat'] / steps:.3f} s flat, {seconds['shared'] / steps:.3f} s shared")
    return saved


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--documents", type=int, default=100)
    main(**vars(parser.parse_args()))
