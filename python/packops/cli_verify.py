"""``packops verify MODEL``: is this model, packed, the same model? Exit status 0: yes, 1: no, 2: could not tell."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from .distributed import DENOMINATORS
from .verify import TOLERANCES, verify

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# Lengths of the random documents: uneven, one of a single token, more than one to a pack.
LENGTHS = (37, 5, 64, 1, 18, 90, 23, 41)


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "verify",
        help="prove for a model that packed equals unpacked",
        description="Run documents one by one and packed through a Hugging Face causal language model, and compare the loss, the "
        "gradient of every parameter, and whether one document sees another. Exit status 0: equal, 1: different, 2: not run.",
    )
    parser.add_argument("model", metavar="MODEL", help="what AutoModelForCausalLM.from_pretrained takes: a name or a folder")
    parser.add_argument("--random-weights", action="store_true", help="only MODEL's configuration is needed, not its weights")
    parser.add_argument("--attention", metavar="NAME", help="attn_implementation: sdpa, eager, flash_attention_2, ...")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the parameters (default fp32)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if there is one")
    parser.add_argument("--reduction", choices=DENOMINATORS, default="mean", help="the loss that is meant (default mean)")
    parser.add_argument("--documents", type=Path, metavar="FILE.jsonl", help="a list of token ids a line; default: random ones")
    parser.add_argument("--max-length", type=int, metavar="TOKENS", help="capacity of a pack; default: about two packs")
    parser.add_argument(
        "--tolerance", type=float, help=f"default {', '.join(f'{TOLERANCES[t]:.0e} ({n})' for n, t in DTYPES.items())}"
    )
    parser.add_argument("--no-gradients", action="store_true", help="compare losses and logits only")
    parser.add_argument("--trust-remote-code", action="store_true", help="let MODEL bring its own code")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    return parser


def main(args: argparse.Namespace) -> int:
    try:
        report = run(args)
    except (OSError, ValueError, TypeError, NotImplementedError, ImportError) as error:
        print(f"packops verify: {error}", file=sys.stderr)
        return 2
    print(report)
    if args.json:
        args.json.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    return 0 if report.ok else 1


def run(args: argparse.Namespace) -> Any:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ModuleNotFoundError:
        raise ValueError("needs transformers: pip install transformers") from None
    options: dict[str, Any] = {"dtype": DTYPES[args.dtype], "trust_remote_code": args.trust_remote_code}
    if args.attention:
        options["attn_implementation"] = args.attention
    torch.manual_seed(0)
    if args.random_weights:
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
        model = AutoModelForCausalLM.from_config(config, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, **options)
    model = model.to(args.device)
    documents = read_documents(args.documents) if args.documents else random_documents(model.config.get_text_config().vocab_size)
    return verify(
        model,
        documents,
        reduction=args.reduction,
        max_length=args.max_length,
        tolerance=args.tolerance,
        gradients=not args.no_gradients,
    )


def random_documents(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]


def read_documents(path: Path) -> list[list[int]]:
    documents = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        value = json.loads(line) if line.strip() else []
        if isinstance(value, dict):
            value = value.get("input_ids")
        if not isinstance(value, list) or not all(type(token) is int for token in value):
            raise ValueError(f"{path}, line {number}: want a list of token ids, or an object with input_ids")
        documents.append(value)
    return documents
