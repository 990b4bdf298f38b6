"""Direct preference optimisation (Rafailov et al. 2023) on packed rows: no padding, and no logits.

    pip install '.[hf]'
    python examples/dpo_step.py

Runs on a CPU in under a minute, on real text: of every docstring of networkx the model shall prefer the second half as it was
written to the same words in another order. All answers of a step, preferred and not, are one packed row. `packops.hf.log_probs`
gives each token's log-probability and `packops.document_sums` each document's. The first step is repeated one document at a time:
the same loss, the same gradient.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
import transformers

import packops
from packops.demo import corpus

BETA = 0.1


def pack_answers(documents: list[torch.Tensor], generator: torch.Generator) -> packops.PackedBatch:
    """Documents 2i and 2i + 1 of one row: the same prompt, which is not scored, before the preferred answer and the other."""
    ids, labels, bounds = [], [], [0]
    for document in documents:
        prompt, answer = document.tensor_split(2)
        for tokens in (answer, answer[torch.randperm(len(answer), generator=generator)]):
            ids += [prompt, tokens]
            labels += [torch.full_like(prompt, -100), tokens]
            bounds.append(bounds[-1] + len(document))
    return packops.PackedBatch.build(torch.cat(ids), torch.cat(labels), bounds)


def sequence_log_probs(model: torch.nn.Module, batch: packops.PackedBatch) -> torch.Tensor:
    token = packops.hf.log_probs(model, batch, entropy=False).log_probs
    return packops.document_sums(token, batch.cu_seqlens)


def loss_of(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    preferred, other = (policy - reference).view(-1, 2).unbind(1)
    return -F.logsigmoid(BETA * (preferred - other)).mean()


def check_against_unpacked(model: torch.nn.Module, batch: packops.PackedBatch, reference: torch.Tensor) -> None:
    packed = loss_of(sequence_log_probs(model, batch), reference)
    gradient = torch.autograd.grad(packed, model.get_parameter("lm_head.weight"))[0]
    alone = []
    for ids, labels in zip(batch.unpack(batch.input_ids), batch.unpack(batch.labels), strict=True):
        log_p = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        scored = labels[1:] != -100
        alone.append(log_p.gather(1, ids[1:, None])[:, 0][scored].sum())
    unpacked = loss_of(torch.stack(alone), reference)
    expected = torch.autograd.grad(unpacked, model.get_parameter("lm_head.weight"))[0]
    torch.testing.assert_close(packed, unpacked, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    print(f"packed {packed.item():.6f}, one document at a time {unpacked.item():.6f}; gradients agree", flush=True)


def main(steps: int = 12, documents: int = 200, pairs: int = 8) -> list[float]:
    text = corpus.load(vocab_size=1024, max_tokens=128, num_training=documents, num_held_out=0, seed=0, packages=["networkx"])
    training = [torch.from_numpy(document) for document in text.training if len(document) >= 16]
    transformers.set_seed(0)
    generator = torch.Generator().manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=text.vocab_size, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    model = packops.hf.apply(transformers.AutoModelForCausalLM.from_config(config), attention="packops_varlen")
    frozen = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history: list[float] = []
    for step in range(steps):
        chosen = torch.randint(len(training), (pairs,), generator=generator).tolist()
        batch = pack_answers([training[i] for i in chosen], generator)
        with torch.no_grad():
            reference = sequence_log_probs(frozen, batch)
        if step == 0:
            check_against_unpacked(model, batch, reference)
        loss = loss_of(sequence_log_probs(model, batch), reference)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    print(f"loss {history[0]:.4f} -> {history[-1]:.4f}")
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--documents", type=int, default=200)
    main(**vars(parser.parse_args()))
