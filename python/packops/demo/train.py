"""Trains the three ways side by side and measures what they do."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from . import corpus
from .ways import Careless, Packops, Padded, Way

Documents = Sequence[NDArray[Any]]


@dataclass(frozen=True)
class Settings:
    """Sizes of a run. The optimizer is Llama 2's: AdamW with betas (0.9, 0.95) and eps 1e-5, gradients clipped at norm 1,
    a linear warm-up and a cosine down to a tenth (https://arxiv.org/abs/2307.09288, section 2.2), without weight decay.

    The defaults are for a CPU. Where weights are compared, two choices keep rounding from growing into something else. eps: Adam
    divides a gradient by its size, so that with torch's default of 1e-8 an entry whose gradient is no more than rounding noise
    moves by a noticeable part of a step. And embeddings start from N(0, 1), as torch's and torchtitan's do: some of those that
    start from N(0, 0.02^2) pass close to zero, where RMSNorm has a singularity.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    steps: int = 50
    seed: int = 0
    documents_per_step: int = 24
    padded_batch: int = 8
    pack_length: int = 2048
    max_tokens: int = 512
    vocab_size: int = 2048
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    learning_rate: float = 5e-3
    held_out: int = 96
    checkpoints: int = 10

    @classmethod
    def for_device(cls, device: str | torch.device, *, steps: int | None = None, seed: int = 0) -> Settings:
        """What suits the device."""
        chosen = torch.device(device)
        sizes: dict[str, Any] = {"device": chosen, "seed": seed}
        if chosen.type == "cuda":
            sizes |= {"steps": 200, "documents_per_step": 128, "padded_batch": 32, "pack_length": 8192}
            sizes |= {"vocab_size": 8192, "hidden_size": 512, "layers": 8, "heads": 8, "learning_rate": 1e-3, "held_out": 512}
        if steps is not None:
            sizes["steps"] = steps
        if sizes.get("steps", cls.steps) < 1:
            raise ValueError(f"steps must be positive, got {steps}")
        return cls(**sizes)


@dataclass
class Run:
    """One way's model and what was measured of it."""

    way: Way
    model: LlamaForCausalLM
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)  # (steps,) the training loss as this way computes it
    held_out: list[float] = field(default_factory=list)  # (checkpoints,) the same evaluation for all
    distances: list[float] = field(default_factory=list)  # (checkpoints,) largest difference of a weight to the padded run's
    seconds: float = 0.0  # training, without evaluation
    tokens: int = 0  # tokens the model processed, padding included


@dataclass
class Result:
    settings: Settings
    runs: dict[str, Run]
    checkpoints: list[int]  # optimizer steps before each evaluation
    useful_tokens: int
    initial: dict[str, Tensor]
    corpus: str
    model: str

    def weight_change(self) -> float:
        """Largest change of a weight over the padded run."""
        return largest_difference(self.runs["padded"].model.state_dict(), self.initial)

    def loss_difference(self, name: str, series: str = "held_out") -> float:
        """Largest difference to the padded run's losses, over all steps (``losses``) or checkpoints (``held_out``)."""
        pairs = zip(getattr(self.runs[name], series), getattr(self.runs["padded"], series), strict=True)
        return max(abs(own - padded) for own, padded in pairs)


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


def build_model(settings: Settings, vocab_size: int, attention: str = "sdpa") -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.hidden_size * 8 // 3 // 16 * 16,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads // 2,
        max_position_embeddings=settings.pack_length,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention)
    nn.init.normal_(model.get_input_embeddings().weight)
    return model.to(settings.device)


def build_runs(settings: Settings, vocab_size: int) -> dict[str, Run]:
    """The three ways, each with a model of the same weights and an optimizer of its own."""
    ways: list[Way] = [
        Padded(settings.padded_batch, settings.device),
        Careless(settings.pack_length, settings.seed, settings.device),
        Packops(settings.pack_length, settings.seed, settings.device),
    ]
    runs = {}
    for way in ways:
        model = build_model(settings, vocab_size, way.attention)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0
        )
        runs[way.name] = Run(way, model, optimizer)
    return runs


def learning_rate(settings: Settings, step: int) -> float:
    warm_up = min(1.0, (step + 1) / max(1, settings.steps // 10))
    return settings.learning_rate * warm_up * (0.55 + 0.45 * math.cos(math.pi * step / settings.steps))


def gradients(run: Run, documents: Documents, step: int) -> tuple[Tensor, int]:
    """Set the gradients of one step; returns its loss and how many tokens the model processed."""
    run.optimizer.zero_grad()
    total, tokens = torch.zeros((), device=run.model.device), 0
    for batch in run.way.batches(documents, step):
        loss = run.way.loss(run.model, batch)
        loss.backward()
        total += loss.detach()
        tokens += batch.input_ids.numel()
    return total, tokens


def train_step(run: Run, documents: Documents, step: int, rate: float) -> None:
    synchronize(run.model.device)
    start = time.perf_counter()
    loss, tokens = gradients(run, documents, step)
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    synchronize(run.model.device)
    run.seconds += time.perf_counter() - start
    run.tokens += tokens
    run.losses.append(loss.item())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Evaluation:
    """The loss that is meant, on held-out documents: padded, in plain torch, with one model into which each run's weights go."""

    def __init__(self, settings: Settings, vocab_size: int, documents: Documents) -> None:
        self.model = build_model(settings, vocab_size)
        self.way = Padded(4 * settings.padded_batch, settings.device)
        self.batches = self.way.batches(sorted(documents, key=len))

    @torch.no_grad()
    def __call__(self, model: LlamaForCausalLM) -> float:
        self.model.load_state_dict(model.state_dict())
        return sum(self.way.loss(self.model, batch).item() for batch in self.batches)


def steps_of(documents: Documents, settings: Settings) -> list[list[NDArray[Any]]]:
    """The documents of every step, each document once before any comes again."""
    need = settings.steps * settings.documents_per_step
    rng = np.random.default_rng(settings.seed)
    order = np.concatenate([rng.permutation(len(documents)) for _ in range(math.ceil(need / len(documents)))])[:need]
    return [[documents[i] for i in chosen] for chosen in order.reshape(settings.steps, -1)]


def run(settings: Settings) -> Result:
    """Read the corpus and train the three ways on it."""
    text = corpus.load(
        vocab_size=settings.vocab_size,
        max_tokens=settings.max_tokens,
        num_training=settings.steps * settings.documents_per_step,
        num_held_out=settings.held_out,
        seed=settings.seed,
    )
    return train(settings, text)


def train(settings: Settings, text: corpus.Corpus) -> Result:
    """Train the three ways step by step in turn, so that whatever else the machine does slows them all alike."""
    runs = build_runs(settings, text.vocab_size)
    evaluate = Evaluation(settings, text.vocab_size, text.held_out)
    steps = steps_of(text.training, settings)
    padded = runs["padded"].model
    config, parameters = padded.config, sum(weight.numel() for weight in padded.parameters())
    model = (
        f"LlamaForCausalLM of {parameters / 1e6:.2f} M parameters ({config.num_hidden_layers} layers, hidden size "
        f"{config.hidden_size}), fp32, random weights; {settings.documents_per_step} documents a step, {settings.steps} steps"
    )
    print(f"corpus  {text.description}\nmodel   {model}\ndevice  {describe(settings.device)}", flush=True)
    initial = copy.deepcopy(padded.state_dict())
    evaluate_at = {round(i * settings.steps / settings.checkpoints) for i in range(settings.checkpoints + 1)}
    result = Result(settings, runs, [], 0, initial, text.description, model)
    started = time.perf_counter()
    for each in runs.values():
        gradients(each, steps[0], 0)  # first calls allocate and choose kernels; without an optimizer step they train nothing
    seconds = 1.5 * settings.steps * (time.perf_counter() - started)  # the half is for the evaluations
    print(f"time    {settings.steps} steps of each of the three, in turn: about {seconds:.0f} s", flush=True)
    with tqdm(total=settings.steps, desc="training", unit="step") as progress:
        for step in range(settings.steps + 1):
            if step in evaluate_at:
                result.checkpoints.append(step)
                for each in runs.values():
                    each.held_out.append(evaluate(each.model))
                    each.distances.append(largest_difference(each.model.state_dict(), padded.state_dict()))
                progress.set_postfix({name: f"{each.held_out[-1]:.3f}" for name, each in runs.items()})
            if step == settings.steps:
                break
            for each in runs.values():
                train_step(each, steps[step], step, learning_rate(settings, step))
            result.useful_tokens += sum(map(len, steps[step]))
            progress.update()
    return result


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}"
