"""Training steps of whole models: padded, packed with what transformers and torch bring, packed with packops.

    packops bench end-to-end                                   # three models, two corpora, every row: many minutes
    packops bench end-to-end --models llama --corpora short --rounds 5 --out bench/results/end_to_end_h200
    packops bench end-to-end --draw llama.json qwen3.json --out both
    packops bench end-to-end --tiny                            # on the CPU in seconds; its times say nothing

Models have the shapes of Llama-3.2-1B, Qwen3-0.6B and Gemma-2-2B, with random weights in bf16. Documents have the lengths of a
corpus (``document_lengths.json``; ``short`` and ``long``, of which nothing is longer than a pack) and random tokens. A step is
several packs that :func:`packops.pack` fills to 97 % or more, forward and backward, and one fused AdamW step. All rows train on
the same documents and on one set of weights, row by row in turn, round by round. The padded row takes up to 8 documents a
micro-batch, as many as fit the tokens of a pack. Useful tokens are those of documents, not padding. ``rest`` is what is left of
a step after the matrix products of the linear layers and the optimizer, which all rows share and which are timed alone in the
same rounds.

A row whose loss or gradient is not that of the others is measured and marked; one that is not installed, or does not fit into
memory, is left out and named. Every round is written down when it is over. After ``--seconds``, or at SIGTERM, the run ends
wherever it is, and the table shows what was measured: of a row that had no round yet, the second step.

Importing Unsloth changes transformers for all. Each of its rows has a run of its own: ``--rows "packed, Unsloth"``.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import command
import measuring
import packops
import peers
import reporting
from corpora import LENGTHS, draw_lengths, padded_groups, padded_inputs
from measuring import Clock, OutOfTime, device_state, time_limit
from models import MODELS, configuration
from packops.cli.program import positive

NAME = "end-to-end"
FULL = 0.97  # of a pack
FA4 = "flash_attention_4"
PEERS = {
    "transformers": peers.TRANSFORMERS,
    "FlashAttention-4": peers.FLASH_ATTENTION_4,
    "Liger": peers.LIGER,
    "Unsloth": peers.UNSLOTH,
}
PARTS = ("forward", "backward", "optimizer")
# Of the first row's: bf16 gradients of different kernels differ by far less, those of contaminated documents by more.
TOLERANCE = {"loss": 1e-2, "gradient": 5e-2}


# ---- documents -------------------------------------------------------------------------------------------------------------


def draw_packs(corpus: dict[str, Any], tokens: int, count: int, vocabulary: int) -> list[list[Tensor]]:
    """The documents of ``count`` packs, as :func:`packops.pack` makes them of a corpus of 64 packs or more: full to 97 %.

    No document is longer than a pack; those of the corpus that are, are cut. Packs are taken at even steps of the plan, which has
    long documents first.
    """
    rng = np.random.default_rng(0)
    lengths = np.minimum(draw_lengths(corpus, tokens * max(64, 2 * count), rng), tokens)
    plan = packops.pack(lengths, tokens, seed=None)
    full = [pack for pack in plan if lengths[pack].sum() >= FULL * tokens]
    chosen = [full[i] for i in np.linspace(0, len(full) - 1, count).round().astype(int)]
    return [[torch.from_numpy(rng.integers(3, vocabulary, lengths[i])) for i in pack] for pack in chosen]


# ---- rows ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One way to train: how a model is changed for it, and how documents are put together."""

    name: str
    attention: str
    padded: bool = False
    change: Callable[[nn.Module], None] | None = None
    not_for: tuple[str, ...] = ()
    compiled: bool = False
    make: Callable[[nn.Module, int], nn.Module] | None = None  # of a model with the weights, and the tokens of a pack
    alone: bool = False  # patches what other rows use: only in a run of its own


def with_liger(model: nn.Module, **parts: bool) -> None:
    transformers = importlib.import_module("liger_kernel.transformers")
    transformers._apply_liger_kernel_to_instance(model=model, **parts)


def with_packops(model: nn.Module) -> None:
    from packops import hf

    hf.apply(model, attention="packops_varlen")


def with_packops_compiled(model: nn.Module) -> None:
    with_packops(model)
    model.compile(mode="reduce-overhead", fullgraph=True)


def with_packed_attention(model: nn.Module) -> None:
    from packops.hf import attention

    model.set_attn_implementation(attention.register())  # type: ignore[operator]


def unsloth_model(base: nn.Module, tokens: int, attention: str | None = None) -> nn.Module:
    """Unsloth's own model, for training of all weights without checkpointing, packed as its trainer does. It loads from files."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from unsloth import FastLanguageModel
    from unsloth.utils.hf_packed_attention import enable_hf_packed_attention

    enable_hf_packed_attention()
    dtype = next(base.parameters()).dtype
    more = {} if attention is None else {"attn_implementation": attention}
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)  # type: ignore[operator]
        words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
        tokenizer.save_pretrained(folder)
        model, _ = FastLanguageModel.from_pretrained(
            folder,
            max_seq_length=tokens,
            dtype=dtype,
            load_in_4bit=False,
            full_finetuning=True,
            use_gradient_checkpointing=False,
            **more,
        )
    return model  # type: ignore[no-any-return]


# transformers has no sdpa for a softcap: Gemma 2 is padded in eager attention, whose scores do not fit into memory when packed.
# What compiles for minutes comes last, so that a run with little time has the others.
ROWS = [
    Row("padded", "default", padded=True),
    Row("packed, sdpa", "sdpa", not_for=("gemma2",)),
    Row("packed, packops attention", "default", change=with_packed_attention),
    Row("packed, packops", "default", change=with_packops),
    Row("packed, packops, compiled", "default", change=with_packops_compiled, compiled=True),
    Row("packed, FlashAttention-4", FA4),  # TRL's packing and inputs
    Row("packed, FlashAttention-4, Liger", FA4, change=with_liger),
    Row("packed, flex", "flex_attention"),
    Row("packed, flex, compiled", "flex_attention", change=lambda model: model.compile(), compiled=True),
    Row("packed, flex, Liger", "flex_attention", change=with_liger),
    # RoPE and the fused loss, without norms and gates
    Row(
        "packed, flex, Liger in part",
        "flex_attention",
        change=functools.partial(with_liger, rms_norm=False, swiglu=False, geglu=False),
    ),
    Row("packed, Unsloth", "default", make=unsloth_model, alone=True),
    Row("packed, Unsloth, FlashAttention-4", "default", make=functools.partial(unsloth_model, attention=FA4), alone=True),
]


def block_masks(config: Any, documents: Tensor) -> Any:
    """FlexAttention's masks of a row in which token i belongs to ``documents[i]``, as ``attention_mask`` takes them.

    Made here, eagerly and outside of what is timed: transformers compiles it, and Triton (torch 2.11, 16384 tokens) was still at
    that kernel after two minutes.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (documents[query] == documents[key]) & (query >= key)

    def sliding(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return causal(batch, head, query, key) & (query - key < config.sliding_window)

    def make(function: Callable[..., Tensor]) -> Any:
        return create_block_mask(function, 1, None, len(documents), len(documents), device=documents.device)

    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return make(causal)
    return {kind: make(sliding if kind == "sliding_attention" else causal) for kind in kinds}


def micro_batches(packs: list[list[Tensor]], row: Row, tokens: int, config: Any, device: torch.device) -> list[dict[str, Any]]:
    """Keyword arguments of the model for each micro-batch of a step."""
    documents = [document for pack in packs for document in pack]
    count = torch.tensor(float(sum(len(d) - 1 for d in documents)), device=device)
    if not row.padded:
        most = max(map(len, packs)) + 1  # one is padding
        collate = packops.PackingCollator(pad_to_length=tokens, num_documents=most if row.compiled else None)
        batches = []
        for pack in packs:
            batch = collate([d.numpy() for d in pack]).to(device)
            batches.append({**batch.to_hf(static=row.compiled), "num_items_in_batch": count})
            if row.make is not None:  # as Unsloth's collator names it
                batches[-1]["packed_seq_lengths"] = batch.cu_seqlens.diff()
            if row.attention == "flex_attention":
                batches[-1]["attention_mask"] = block_masks(config, batch.seq_idx.flatten())
        return batches
    groups = padded_groups(range(len(documents)), list(map(len, documents)), tokens)
    return [{**padded_inputs([documents[i] for i in group], device), "num_items_in_batch": count} for group in groups]


class Floor:
    """What every row must do: the products of its linear layers, forward and backward, and the optimizer's step."""

    def __init__(self, base: nn.Module, packs: int, tokens: int):
        self.shared = list(base.parameters())
        self.weights = [module.weight for module in base.modules() if isinstance(module, nn.Linear)]
        self.packs, self.tokens = packs, tokens
        self.times: list[dict[str, float]] = []

    def step(self, optimizer: torch.optim.Optimizer, laps: Laps) -> None:
        # Random: the power that products take, and with it the clock, depends on what they multiply.
        widths = {width for weight in self.weights for width in weight.shape}
        of_width = {n: torch.randn(self.tokens, n, dtype=self.weights[0].dtype, device=self.weights[0].device) for n in widths}
        laps.start()
        with torch.no_grad():
            for number in range(self.packs):
                for weight in self.weights:
                    of_width[weight.shape[1]] @ weight.t()
                laps.lap("forward")
                for weight in reversed(self.weights):
                    x, gradient = of_width[weight.shape[1]], of_width[weight.shape[0]]
                    gradient @ weight
                    if number == 0:
                        weight.grad = gradient.t() @ x
                    else:
                        weight.grad.addmm_(gradient.t(), x)  # type: ignore[union-attr]
                laps.lap("backward")
            for parameter in self.shared:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            laps.lap("optimizer")
        optimizer.zero_grad()


class Prepared:
    """A row's model on the shared weights, its batches, and what of transformers' modules it replaced for all of them."""

    def __init__(self, row: Row, model_name: str, base: nn.Module, packs: list[list[Tensor]], tokens: int):
        from transformers import AutoModelForCausalLM

        device = next(base.parameters()).device
        stock = "eager" if model_name == "gemma2" else "sdpa"
        name = stock if row.attention == "default" else row.attention
        if row.make is not None:
            self.model = row.make(base, tokens)
        else:
            with torch.device(device):
                # of its own configuration, or the attention of the last row would be that of all
                self.model = AutoModelForCausalLM.from_config(
                    copy.deepcopy(base.config),
                    attn_implementation=name,
                    dtype=base.dtype,  # type: ignore[arg-type]
                )
        self.model.train()
        self.compiled = row.compiled
        self.shared = list(base.parameters())
        for own, shared in zip(self.model.parameters(), self.shared, strict=True):
            own.data = shared.data
        self.module = sys.modules[type(self.model).__module__]
        before = dict(vars(self.module))
        if row.change is not None:
            row.change(self.model)
        self.patched = {k: v for k, v in vars(self.module).items() if before.get(k) is not v}
        self._swap(before)
        self.batches = micro_batches(packs, row, tokens, base.config, device)
        self.times: list[dict[str, float]] = []  # seconds by part of the steps that count

    def _swap(self, values: dict[str, Any]) -> dict[str, Any]:
        old = {name: vars(self.module).get(name) for name in values}
        vars(self.module).update(values)
        return old

    def step(self, optimizer: torch.optim.Optimizer, laps: Laps) -> tuple[Tensor, Tensor]:
        """One training step; returns its loss and the norm of its gradient."""
        before = self._swap(self.patched)
        try:
            total = torch.zeros((), device=self.shared[0].device)
            laps.start()
            if self.compiled:  # a graph's gradients are where the next replay writes: they are added to memory of our own
                for own in self.model.parameters():
                    own.grad = torch.zeros_like(own)
            for batch in self.batches:
                if self.compiled:
                    torch.compiler.cudagraph_mark_step_begin()
                loss = self.model(**batch).loss
                laps.lap("forward")
                loss.backward()
                laps.lap("backward")
                total += loss.detach()
            for own, shared in zip(self.model.parameters(), self.shared, strict=True):
                shared.grad, own.grad = own.grad, None
            optimizer.step()
            laps.lap("optimizer")
            norm = torch.stack([shared.grad.float().norm() for shared in self.shared]).norm()
            return total, norm
        finally:
            optimizer.zero_grad()
            self._swap(before)


# ---- measuring -------------------------------------------------------------------------------------------------------------


class Laps:
    """Seconds of each part of a step."""

    def __init__(self, device: torch.device):
        self.clock = Clock(device)
        self.marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        self.marks = [("", self.clock.now())]

    def lap(self, part: str) -> None:
        self.marks.append((part, self.clock.now()))

    def seconds(self) -> dict[str, float]:
        found = dict.fromkeys(PARTS, 0.0)
        for (_, a), (part, b) in zip(self.marks, self.marks[1:], strict=False):
            found[part] += self.clock.milliseconds(a, b) / 1e3
        return found


def release(device: torch.device) -> None:
    """Give back the memory that nobody uses. Patched models and failures are cycles, which wait for the collector."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(
    model_name: str,
    packs: list[list[Tensor]],
    rows: list[Row],
    case: dict[str, Any],
    args: argparse.Namespace,
    tell: Callable[[str], None],
) -> None:
    """The rows of one model and corpus, first each on its own and then in turns. ``case`` has what is known at any time, and
    ``tell`` hears of every change."""
    from transformers import AutoModelForCausalLM

    device = torch.device(args.device)
    config = configuration(model_name, args.tiny)
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if args.tiny else torch.bfloat16)
    # so small a rate that all rows see about the same weights throughout
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-8, fused=True)
    laps, results, floor = Laps(device), case["results"], Floor(base, len(packs), args.tokens)

    def measure_floor() -> None:
        floor.step(optimizer, laps)
        floor.times.append(laps.seconds())
        summarise(case["floor"], floor.times, case["useful_tokens"])

    def attempt(row: Row, result: dict[str, Any], prepared: Prepared | None = None) -> tuple[Prepared, dict[str, float]] | None:
        """A step, and its seconds by part; None if it failed."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            prepared = prepared or Prepared(row, model_name, base, packs, args.tokens)
            loss, norm = prepared.step(optimizer, laps)
            seconds = laps.seconds()
            result["loss"], result["gradient"] = loss.item(), norm.item()
        except torch.cuda.OutOfMemoryError:
            result["left_out"] = "out of memory"
        except Exception as error:
            result["left_out"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        else:
            if device.type == "cuda":
                result["peak_gib"] = max(result.get("peak_gib", 0.0), torch.cuda.max_memory_allocated() / 2**30)
            return prepared, seconds
        return None

    running: list[tuple[Row, dict[str, Any], Prepared]] = []
    for row, result in zip(rows, results, strict=True):
        if model_name in row.not_for:
            result["left_out"] = "transformers has no sdpa with a softcap"
            continue
        begin = time.perf_counter()
        try:
            with time_limit(args.patience):
                done = attempt(row, result)  # compiles, allocates
                done = done and attempt(row, result, done[0])
        except OutOfTime as end:
            if end.terminated or time.perf_counter() - begin < args.patience:
                raise  # it is the end of the run
            result["left_out"] = f"not ready after {args.patience:.0f} s"
            done = None
        result["seconds_to_prepare"] = time.perf_counter() - begin
        if done:
            prepared, seconds = done
            summarise(result, [seconds], case["useful_tokens"])
            running.append((row, result, prepared))
        prepared = done = None  # one that failed is gone before the next
        release(device)
        mark(results)
        tell(format_result(result, case))
    order = random.Random(0)
    for number in range(args.rounds + 1):  # the first warms up
        order.shuffle(running)
        measure_floor()
        if number == 0:
            floor.times.clear()
        for _ in range(len(running)):
            row, result, prepared = running.pop(0)
            if done := attempt(row, result, prepared):
                running.append((row, result, prepared))
                if number:
                    prepared.times.append(done[1])
                    summarise(result, prepared.times, case["useful_tokens"])
            prepared = done = None
            if "left_out" in result:
                release(device)
        mark(results)
        tell(f"round {number} of {args.rounds}: " + "; ".join(f"{row.name} {1e3 * r['seconds']:.1f} ms" for row, r, _ in running))


def summarise(result: dict[str, Any], times: list[dict[str, float]], useful_tokens: int) -> None:
    totals = [sum(parts.values()) for parts in times]
    result["rounds"] = len(totals)
    result["seconds"] = statistics.median(totals)
    result["seconds_spread"] = [min(totals), max(totals)]
    result["samples"] = totals
    result["seconds_by_part"] = {name: statistics.median(parts[name] for parts in times) for name in PARTS}
    result["tokens_per_second"] = useful_tokens / result["seconds"]
    result.pop("left_out", None)  # last: the end may come in between


def mark(results: list[dict[str, Any]]) -> None:
    """What of each row's is not as the first one's."""
    found = [result for result in results if "loss" in result]
    for result in found:
        result["wrong"] = [k for k, most in TOLERANCE.items() if not abs(result[k] - found[0][k]) <= most * abs(found[0][k])]


def best(results: list[dict[str, Any]]) -> float:
    """Tokens a second of the fastest row without packops."""
    return max((r["tokens_per_second"] for r in results if "left_out" not in r and "packops" not in r["row"]), default=math.nan)


def rest(result: dict[str, Any], case: dict[str, Any]) -> float:
    """Seconds of a step that are neither products of linear layers nor the optimizer."""
    return float(result["seconds"] - case["floor"].get("seconds", math.nan))


def least_rest(case: dict[str, Any]) -> float:
    """Of the rows without packops."""
    others = [rest(r, case) for r in case["results"] if "left_out" not in r and "packops" not in r["row"]]
    return min(others, default=math.nan)


def format_result(result: dict[str, Any], case: dict[str, Any]) -> str:
    if "left_out" in result:
        return f"{result['row']:<28} -- {result['left_out']}"
    parts = " ".join(f"{1e3 * result['seconds_by_part'][name]:>10.1f}" for name in PARTS)
    peak = f"{result['peak_gib']:>7.1f}" if "peak_gib" in result else f"{'':>7}"
    wrong = f"  WRONG {', '.join(result['wrong'])}" if result["wrong"] else ""
    return (
        f"{result['row']:<28}{result['tokens_per_second']:>10,.0f}{result['tokens_per_second'] / best(case['results']):>7.2f}"
        f"{1e3 * result['seconds']:>10.1f} {1e3 * rest(result, case):>8.1f}{rest(result, case) / least_rest(case):>7.2f}"
        f"{parts}{peak}  {result['loss']:.4f}{wrong}"
    )


def table(data: dict[str, Any]) -> str:
    lines = []
    for case in data["cases"]:
        lines.append(
            f"\n{case['model']}, {case['corpus']} documents: {case['documents']} of mean "
            f"{case['useful_tokens'] / case['documents']:.0f} tokens in {data['micro_batches']} x {data['tokens']}, "
            f"{100 * case['useful_tokens'] / (data['micro_batches'] * data['tokens']):.1f} % full; products of linear layers and "
            f"optimizer alone {1e3 * case['floor'].get('seconds', math.nan):.1f} ms"
        )
        lines.append(
            f"{'':<28}{'tokens/s':>10}{'/best':>7}{'step ms':>10} {'rest ms':>8}{'/best':>7}"
            f"{'forward':>10} {'backward':>10} {'optim.':>10}{'GiB':>7}  loss"
        )
        lines += [format_result(result, case) for result in case["results"]]
    return "\n".join(lines)


def draw(data: dict[str, Any], path: Path) -> None:
    """Useful tokens a second of every row, a panel for each model and corpus."""
    pyplot = reporting.pyplot()
    cases = [case for case in data["cases"] if any("left_out" not in r for r in case["results"])]
    if not cases:
        return
    columns = min(2, len(cases))
    lines = -(-len(cases) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(7.2 * columns, 2.7 * lines), constrained_layout=True, squeeze=False)
    for axis in axes.flat[len(cases) :]:
        axis.axis("off")
    for axis, case in zip(axes.flat, cases, strict=False):
        rows = [r for r in case["results"] if "left_out" not in r][::-1]
        speeds = [r["tokens_per_second"] for r in rows]
        axis.barh([r["row"] for r in rows], speeds, color=["#0b7a75" if "packops" in r["row"] else "#b0b7bf" for r in rows])
        for place, row in enumerate(rows):
            label = f" {row['tokens_per_second'] / 1e3:,.1f} k/s" + (f", {row['peak_gib']:.0f} GiB" if "peak_gib" in row else "")
            axis.text(speeds[place], place, label + (" (wrong)" if row["wrong"] else ""), va="center", fontsize=8)
        axis.set(xlim=(0, 1.35 * max(speeds)), xlabel="useful tokens a second")
        axis.set_title(f"{case['model']} shape, {case['corpus']} documents", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.suptitle(
        f"training steps on {data['environment']['device']}, {data['micro_batches']} x {data['tokens']:,} tokens a step, "
        f"{data['dtype']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], help="which shapes")
    parser.add_argument("--corpora", nargs="+", choices=["short", "long"], default=["short", "long"], help="lengths of documents")
    parser.add_argument(
        "--rows", nargs="+", metavar="WORD", help="only rows of this name, or whose name has this in it: padded flex packops"
    )
    parser.add_argument(
        "--tokens", type=int, help="tokens of a pack, and of a padded micro-batch (default 16384; 512 with --tiny)"
    )
    parser.add_argument("--micro-batches", type=int, default=4, help="packs of a step (default 4)")
    parser.add_argument("--rounds", type=positive, default=5, help="timed steps of each row (default 5)")
    parser.add_argument(
        "--seconds", type=command.seconds, default=float("inf"), help="end the run after so many, compilation included"
    )
    parser.add_argument(
        "--patience", type=command.seconds, default=float("inf"), help="leave out a row whose first two steps take more seconds"
    )
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--tiny", action="store_true", help="small fp32 models: to see that it runs")
    parser.add_argument("--out", type=Path, metavar="STEM", help="write STEM.json and STEM.png")
    command.add_draw(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    if args.draw is not None:
        return reporting.redraw(args.draw or sorted(reporting.RESULTS.glob("end_to_end_*.json")), draw, table, args.out)
    begin = time.perf_counter()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.tokens = args.tokens or (512 if args.tiny else 16384)
    device = torch.device(args.device)
    names = {row.name for row in ROWS}
    rows = [row for row in ROWS if not args.rows or any(row.name == w if w in names else w in row.name for w in args.rows)]
    if len(rows) > 1:
        rows = [row for row in rows if not row.alone]
    elif rows and rows[0].alone:
        import unsloth  # noqa: F401  # type: ignore[import-not-found]  # before transformers
    if not rows:
        print(f"no row's name has {' or '.join(args.rows)}; there are: {'; '.join(row.name for row in ROWS)}", file=sys.stderr)
        return 2
    data: dict[str, Any] = {
        "benchmark": "end-to-end",
        "environment": measuring.environment(device.type, PEERS),
        "tokens": args.tokens,
        "micro_batches": args.micro_batches,
        "dtype": "fp32" if args.tiny else "bf16",
        "tiny": args.tiny,
        "settings": {"arguments": command.without_output(sys.argv[1:]), "data": "random tokens, documents of a corpus's lengths"},
        "state": {"before": device_state(device.type)},
        "cases": [],
    }
    corpora = json.loads(LENGTHS.read_text())
    work: list[tuple[str, list[list[Tensor]], dict[str, Any]]] = []
    for model in args.models:
        for name in args.corpora:
            corpus = corpora[name]
            if args.tiny:
                corpus = {**corpus, "quantiles": [max(2, n // 16) for n in corpus["quantiles"]]}
            packs = draw_packs(corpus, args.tokens, args.micro_batches, configuration(model, args.tiny).vocab_size)
            case = {
                "model": f"tiny {MODELS[model]}" if args.tiny else MODELS[model],
                "corpus": name,
                "documents": sum(map(len, packs)),
                "useful_tokens": sum(len(document) for pack in packs for document in pack),
                "floor": {},
                "results": [{"row": row.name, "left_out": "no time left"} for row in rows],
            }
            data["cases"].append(case)
            work.append((model, packs, case))

    def tell(case: dict[str, Any], text: str) -> None:
        print(f"{time.perf_counter() - begin:6.0f} s  {case['model']}, {case['corpus']}: {text}", file=sys.stderr, flush=True)
        reporting.write(data, args.out)

    try:
        with time_limit(begin + args.seconds - time.perf_counter()):
            for model, packs, case in work:
                measure(model, packs, rows, case, args, functools.partial(tell, case))
                torch.compiler.reset()
                release(device)
                if device.type == "cuda":
                    tell(case, f"freed, but for {torch.cuda.memory_allocated() / 2**30:.2f} GiB")
    except OutOfTime:
        print(f"out of time after {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    for case in data["cases"]:
        mark(case["results"])
    data["state"]["after"] = device_state(device.type)
    reporting.write(data, args.out)
    if args.out:
        try:
            draw(data, args.out.with_suffix(".png"))
        except ModuleNotFoundError as error:
            print(f"no picture: {error}", file=sys.stderr)
    print(table(data))
    return 0


if __name__ == "__main__":
    sys.exit(
        main(
            add_arguments(
                argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
            ).parse_args()
        )
    )
