"""Which models of transformers packops.hf knows: the versions, the tested families, and how a family rotates its heads.

A family shares its modelling file. Sharing the signature of ``apply_rotary_pos_emb`` is not enough to be replaced (NanoChat's
turns the other way), so the function itself is asked: it rotates a few numbers, and the convention that gives the same is the
family's.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import re
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from .record import decoder_of

OLDEST, NEWEST = (5, 0), (5, 24)

# config.model_type -> the name people know. Each is in tests/test_hf_families.py: packed against padded, stock against patched.
TESTED = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
    "phi3": "Phi-3",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "smollm3": "SmolLM3",
    "granite": "Granite",
    "cohere": "Cohere",
    "gpt_neox": "GPT-NeoX",
    "glm4": "GLM-4",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3-MoE",
    "olmo": "OLMo",
    "olmoe": "OLMoE",
    "stablelm": "StableLM",
    "starcoder2": "StarCoder 2",
    "phi": "Phi",
    "cohere2": "Cohere 2",
    "ernie4_5": "ERNIE 4.5",
    "glm": "GLM",
    "glm4_moe": "GLM-4 MoE",
    "helium": "Helium",
    "exaone4": "EXAONE 4",
    "seed_oss": "Seed-OSS",
    "nemotron": "Nemotron",
    "persimmon": "Persimmon",
    "apertus": "Apertus",
    "hunyuan_v1_dense": "HunYuan",
    "qwen2_moe": "Qwen2-MoE",
    "granitemoe": "Granite MoE",
    "dots1": "dots.llm1",
    "ministral": "Ministral",
    "arcee": "Arcee",
}

# Found by tests/sweep_families.py. These never look at position_ids to tell packed documents apart, so that sdpa, eager and
# flex_attention let documents see each other ...
NEVER_LOOK = frozenset(
    {
        "afmoe", "bert", "bert-generation", "big_bird", "biogpt", "bloom", "cpmant", "ctrl", "deepseek_v4", "doge", "electra",
        "ernie", "falcon", "gpt_oss", "megatron-bert", "mpt", "openai-gpt", "opt", "qwen2_5_vl", "qwen2_vl", "rembert",
        "roformer", "xglm", "xlnet",
    }
)  # fmt: skip
LOOKS_SINCE = {"ctrl": (5, 13), "doge": (5, 18), "falcon": (5, 24)}
# ... these learn a table of positions and take none, so that a later document has those of the row ...
NO_POSITIONS = frozenset(
    {
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart", "trocr",
        "whisper",
    }
)  # fmt: skip
# ... and these carry a state from token to token, like those that transformers itself calls stateful.
STATEFUL = frozenset({"lfm3", "minimax"})


def never_looks(model: nn.Module) -> bool:
    """Whether the installed transformers lets packed documents of this model see each other."""
    return _family_never_looks(cast(Any, model).config.model_type) or makes_own_mask(model)


@cache
def _family_never_looks(family: str) -> bool:
    since = LOOKS_SINCE.get(family)
    return family in NEVER_LOOK and (since is None or _version(installed()) < since)


def makes_own_mask(model: nn.Module) -> bool:
    """Whether a model makes its mask by itself, from no positions, as some of transformers 5.1 and older do."""
    return hasattr(type(decoder_of(model)), "_update_causal_mask")


def supported() -> str:
    """The tested families, for messages."""
    return ", ".join(TESTED.values())


def installed() -> str:
    """The version of transformers."""
    return importlib.metadata.version("transformers")


def _version(text: str) -> tuple[int, int]:
    numbers = re.findall(r"\d+", text)
    return int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0


@cache
def require_transformers() -> None:
    """Raise unless transformers is installed; warn, once, where packops was not tested with its version."""
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("packops.hf needs transformers, which is not installed: pip install '.[hf]'")
    found = installed()
    if not OLDEST <= _version(found) <= NEWEST:
        warnings.warn(
            f"packops.hf is tested with transformers {_dotted(OLDEST)} to {_dotted(NEWEST)}, found {found}. What it does not "
            "recognise it refuses; packops.verify(model, documents) shows whether what it replaced is right",
            stacklevel=3,
        )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


class Convention(NamedTuple):
    """How a family's ``apply_rotary_pos_emb`` reads its table and which features it pairs."""

    interleaved: bool  # pairs are (2i, 2i+1), not (i, i + R/2)
    table: Literal["cat", "repeat", "half"]  # of c: (c, c); each element of c twice; c

    def spread(self, half: Tensor) -> Tensor:
        """A table of R/2 columns as the family has it."""
        if self.table == "cat":
            return torch.cat((half, half), dim=-1)
        return half.repeat_interleave(2, dim=-1) if self.table == "repeat" else half

    def gather(self, table: Tensor) -> Tensor:
        """The R/2 columns of the family's table."""
        if self.table == "cat":
            return table[..., : table.shape[-1] // 2]
        return (table[..., ::2] if self.table == "repeat" else table).contiguous()


CONVENTIONS = tuple(
    Convention(interleaved, table)  # type: ignore[arg-type]
    for table, interleaved in itertools.product(("cat", "repeat", "half"), (False, True))
)


@cache
def convention_of(apply_rotary_pos_emb: Callable) -> Convention | None:
    """The convention under which packops gives what ``apply_rotary_pos_emb(q, k, cos, sin)`` gives; None if there is none."""
    from ..functional import apply_rope

    generator = torch.Generator().manual_seed(0)
    width, tokens = 12, 5

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    q, k = numbers(2, 3, tokens, width), numbers(2, 1, tokens, width)
    cos, sin = numbers(2, tokens, width // 2), numbers(2, tokens, width // 2)  # no angles: nothing may rest on cos² + sin² = 1
    with torch.no_grad():
        for convention in CONVENTIONS:
            try:
                theirs = apply_rotary_pos_emb(q, k, convention.spread(cos), convention.spread(sin))
            except Exception:  # it takes no such table
                continue
            ours = apply_rope(
                q, k, cos, sin, layout="bhsd", interleaved=convention.interleaved, rotary_dim=width, per_token_table=True
            )
            if all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(theirs, ours, strict=True)):
                return convention
    return None
