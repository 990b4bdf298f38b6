"""``packops verify MODEL``: is this model, packed, the same model? Exit status 0: yes, 1: no, 2: could not tell."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..verify import default_max_length, packs_of, verify
from .device import choose_device
from .pack import json_value

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# Lengths of the random documents: uneven, one of a single token, more than one to a pack.
LENGTHS = (37, 5, 64, 1, 18, 90, 23, 41)
EXPECTED = (OSError, ValueError, TypeError, NotImplementedError, ImportError)  # whose message is enough


def main(args: argparse.Namespace) -> int:
    try:
        report = run(args)
        if args.json:
            args.json.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    except Exception as error:  # whatever happens, it must not look like "different", which is 1
        if isinstance(error, BrokenPipeError):
            raise
        if not isinstance(error, EXPECTED):
            traceback.print_exc()
        print(f"packops verify: {error if isinstance(error, EXPECTED) else f'crashed: {error!r}'}", file=sys.stderr)
        return 2
    print(report)
    if args.json:
        print(f"wrote {args.json}")
    return 0 if report.ok else 1


def run(args: argparse.Namespace) -> Any:
    """Check what is cheap to check first: the device, the documents, the token ids, all before the weights are loaded."""
    device = choose_device(args.device)
    check_is_there(args.model)
    given = read_documents(args.documents) if args.documents else None
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ModuleNotFoundError:
        raise ValueError("needs transformers: pip install transformers") from None
    from ..hf import apply, attention

    config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    vocabulary = config.get_text_config().vocab_size
    documents = random_documents(vocabulary) if given is None else check_token_ids(given, vocabulary, args.documents)
    options: dict[str, Any] = {"dtype": DTYPES[args.dtype], "trust_remote_code": args.trust_remote_code}
    if args.attention == attention.NAME:
        attention.register()
    if args.attention:
        options["attn_implementation"] = args.attention
    torch.manual_seed(0)
    if args.random_weights:
        model = AutoModelForCausalLM.from_config(config, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, **options)
    model = model.to(device)
    if args.apply:
        apply(model, reduction=args.reduction)
    lengths = [len(document) for document in documents if document]
    packs = packs_of(lengths, args.max_length or default_max_length(lengths)) if lengths else []
    with progress(model, passes(len(lengths), len(packs)), device):
        return verify(
            model,
            documents,
            reduction=args.reduction,
            max_length=args.max_length,
            tolerance=args.tolerance,
            gradients=not args.no_gradients,
        )


def check_is_there(model: str) -> None:
    """ValueError for a folder that is not there, which transformers takes for a name on the Hub, and then for a wrong one."""
    is_path = Path(model).is_absolute() or model.startswith(".") or model.count("/") > 1
    if is_path and not Path(model).exists():
        raise ValueError(f"MODEL: there is no folder {model}")


# ---- progress --------------------------------------------------------------------------------------------------------------


def passes(documents: int, packs: int) -> int:
    """Forward passes of :func:`packops.verify`: documents alone and changed; packs for loss, logits and twice for noise."""
    return 2 * documents + 4 * packs


@contextmanager
def progress(model: nn.Module, total: int, device: torch.device) -> Iterator[None]:
    """Count the model's forward passes on stderr, and say after the first ones how long all will take."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"packops verify: {parameters / 1e6:,.1f} M parameters on {device}, {total} forward passes ...",
        file=sys.stderr,
        flush=True,
    )
    terminal, started, done, said = sys.stderr.isatty(), time.monotonic(), 0, False

    def count(*_: Any) -> None:
        nonlocal done, said
        done += 1
        seconds = time.monotonic() - started
        left = seconds / done * max(0, total - done)
        if terminal:
            print(f"\r  {done} of {total}, about {left:.0f} s left   ", end="", file=sys.stderr, flush=True)
        elif not said and done >= 3:
            said = True
            print(f"  about {left:.0f} s left after {done} of {total}", file=sys.stderr, flush=True)

    hook = model.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()
        if terminal:
            print("\r" + " " * 48 + "\r", end="", file=sys.stderr, flush=True)


# ---- documents -------------------------------------------------------------------------------------------------------------


def random_documents(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]


def read_documents(path: Path) -> list[list[int]]:
    """One document a line; the list's index is the line's number less one."""
    documents = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):  # JSON may hold other ends of lines
        where = f"{path}, line {number}"
        value = json_value(line, where) if line.strip() else []
        if isinstance(value, dict):
            value = value.get("input_ids")
        if not isinstance(value, list) or not all(type(token) is int for token in value):
            raise ValueError(f"{where}: want a list of token ids, or an object with input_ids")
        documents.append(value)
    if sum(map(bool, documents)) < 2:
        raise ValueError(f"{path}: want at least two documents with a token, got {sum(map(bool, documents))}")
    return documents


def check_token_ids(documents: list[list[int]], vocabulary: int, path: Path) -> list[list[int]]:
    for number, document in enumerate(documents, 1):
        for token in document:
            if not 0 <= token < vocabulary:
                raise ValueError(f"{path}, line {number}: token id {token} is outside the model's vocabulary [0, {vocabulary})")
    return documents
