"""Real text that every machine with torch already has: the docstrings of packages that torch brings along."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

PACKAGES = ("numpy", "networkx", "sympy")
MIN_CHARACTERS = 40
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents; each ends in the end-of-text token, unless it was cut at the longest length asked for."""

    training: list[NDArray[np.int64]]
    held_out: list[NDArray[np.int64]]
    vocab_size: int
    description: str


def docstrings(tree: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Docstrings of a module, its classes and its functions, in the order of the source."""
    if text := ast.get_docstring(tree):
        yield text
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from docstrings(node)


def read_documents(packages: Sequence[str] = PACKAGES) -> list[str]:
    """Every distinct docstring of the packages, tests left out; the order depends on the installed versions alone."""
    files: list[Path] = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                f"packops demo reads the docstrings of {package}, which is not installed: pip install {package}"
            )
        root = Path(spec.origin).parent
        files += sorted(path for path in root.rglob("*.py") if "tests" not in path.relative_to(root).parts)
    documents: dict[str, None] = {}
    for path in tqdm(files, desc="reading docstrings", unit="file", leave=False):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for text in docstrings(tree):
            clean = "\n".join(line.rstrip() for line in text.splitlines()).strip()
            if len(clean) >= MIN_CHARACTERS:
                documents.setdefault(clean)
    return list(documents)


def load(
    *, vocab_size: int, max_tokens: int, num_training: int, num_held_out: int, seed: int, packages: Sequence[str] = PACKAGES
) -> Corpus:
    """Documents shuffled by ``seed``, and a byte-level BPE vocabulary learnt from those that are not held out.

    A longer document keeps its first ``max_tokens`` tokens. There are ``num_training`` documents, or all there are.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if num_training < 1:
        raise ValueError(f"packops demo: the number of documents to train on must be positive, got {num_training}")
    documents = read_documents(packages)
    order = np.random.default_rng(seed).permutation(len(documents))
    texts = [documents[i] for i in order]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    print(f"text    {len(documents)} docstrings read; learning {vocab_size} tokens from them takes some seconds ...", flush=True)
    tokenizer.train_from_iterator(texts[num_held_out:], trainer)
    end = tokenizer.token_to_id(END_OF_TEXT)
    used = texts[: num_held_out + num_training]
    tokens = [np.array([*encoding.ids, end][:max_tokens], dtype=np.int64) for encoding in tokenizer.encode_batch(used)]
    lengths = np.array([len(document) for document in tokens])
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()[:8]
    description = (
        f"{len(documents)} docstrings of {', '.join(f'{name} {version(name)}' for name in packages)} (sha256 {digest}); "
        f"byte-level BPE of {tokenizer.get_vocab_size()} tokens learnt from them; used: {len(used)} documents, "
        f"median {int(np.median(lengths))}, mean {lengths.mean():.0f} tokens, cut at {max_tokens}"
    )
    return Corpus(tokens[num_held_out:], tokens[:num_held_out], tokenizer.get_vocab_size(), description)
