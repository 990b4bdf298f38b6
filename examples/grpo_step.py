"""Group relative policy optimisation (Shao et al. 2024) on packed rows: no padding, no logits, entropy from the same pass.

    pip install '.[hf]'
    python examples/grpo_step.py

Runs on a CPU in under a minute. Prompts are the beginnings of networkx's docstrings. For each the model samples some answers
of different lengths, and is rewarded for tokens that are among the most common of all docstrings. All answers of a step are one
packed row. The first step is repeated one answer at a time: the same loss, the same gradient.
"""

import argparse

import torch
import transformers

import packops
from packops.demo import corpus

GROUP, PROMPT, COMMON, CLIP, ENTROPY = 4, 8, 50, 0.2, 1e-3
TEMPERATURE = 0.9


@torch.no_grad()
def sample(model: torch.nn.Module, prompt: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    ids = prompt[None]
    for _ in range(length):
        p = (model(input_ids=ids).logits[0, -1] / TEMPERATURE).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)[None]], dim=1)
    return ids[0, len(prompt) :]


def objective(
    log_probs: torch.Tensor, entropy: torch.Tensor, before: torch.Tensor, advantage: torch.Tensor, tokens: int
) -> torch.Tensor:
    """Of tokens: the clipped ratio times the advantage, and a bonus for entropy; divided by all tokens of the step."""
    ratio = (log_probs - before).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    return -(gain + ENTROPY * entropy).sum() / tokens


def check_against_unpacked(
    model: torch.nn.Module, batch: packops.PackedBatch, before: torch.Tensor, advantages: torch.Tensor, per_token: torch.Tensor
) -> None:
    tokens = batch.num_valid
    ours = packops.hf.log_probs(model, batch, temperature=TEMPERATURE)
    assert ours.entropy is not None
    packed = objective(ours.log_probs, ours.entropy, before, per_token, tokens)
    gradient = torch.autograd.grad(packed, model.get_parameter("lm_head.weight"))[0]
    unpacked = torch.zeros(())
    pieces = (batch.unpack(x) for x in (batch.input_ids, batch.labels, before))
    for ids, labels, old, advantage in zip(*pieces, advantages, strict=True):
        log_p = (model(input_ids=ids[None]).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
        scored = labels[1:] != -100
        taken = log_p.gather(1, ids[1:, None])[:, 0][scored]
        entropy = -(log_p.exp() * log_p).sum(-1)[scored]
        unpacked = unpacked + objective(taken, entropy, old[:-1][scored], advantage, tokens)
    expected = torch.autograd.grad(unpacked, model.get_parameter("lm_head.weight"))[0]
    torch.testing.assert_close(packed, unpacked, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    print(f"packed {packed.item():.6f}, one answer at a time {unpacked.item():.6f}; gradients agree", flush=True)


def main(steps: int = 12, documents: int = 100, prompts: int = 3) -> list[float]:
    text = corpus.load(vocab_size=512, max_tokens=96, num_training=documents, num_held_out=0, seed=0, packages=["networkx"])
    training = [torch.from_numpy(document) for document in text.training if len(document) > 2 * PROMPT]
    transformers.set_seed(0)
    generator = torch.Generator().manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=text.vocab_size, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    model = packops.hf.apply(transformers.AutoModelForCausalLM.from_config(config), attention="packops_varlen")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    common = torch.cat(training).bincount().topk(COMMON).indices
    history: list[float] = []
    for step in range(steps):
        ids, labels, bounds, rewards = [], [], [0], []
        for i in torch.randint(len(training), (prompts,), generator=generator).tolist():
            prompt = training[i][:PROMPT]
            for _ in range(GROUP):
                answer = sample(model, prompt, int(torch.randint(4, 12, (), generator=generator)), generator)
                rewards.append(torch.isin(answer, common).float().mean())
                ids += [prompt, answer]
                labels += [torch.full_like(prompt, -100), answer]
                bounds.append(bounds[-1] + PROMPT + len(answer))
        batch = packops.PackedBatch.build(torch.cat(ids), torch.cat(labels), bounds)
        groups = torch.stack(rewards).view(-1, GROUP)
        advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
        per_token = advantages.repeat_interleave(batch.cu_seqlens.diff()).view(batch.input_ids.shape)
        with torch.no_grad():
            before = packops.hf.log_probs(model, batch, temperature=TEMPERATURE, entropy=False).log_probs
        if step == 0:
            check_against_unpacked(model, batch, before, advantages, per_token)
        for _ in range(2):
            ours = packops.hf.log_probs(model, batch, temperature=TEMPERATURE)
            assert ours.entropy is not None
            objective(ours.log_probs, ours.entropy, before, per_token, batch.num_valid).backward()
            optimizer.step()
            optimizer.zero_grad()
        history.append(groups.mean().item())
    few = max(1, steps // 3)
    print(f"reward {sum(history[:few]) / few:.3f} -> {sum(history[-few:]) / few:.3f}")
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--documents", type=int, default=100)
    main(**vars(parser.parse_args()))
