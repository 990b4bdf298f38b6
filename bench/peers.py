"""Other libraries' kernels: what to install, and how to get at single files of packages that do more than that when imported.

    pip install liger-kernel==0.8.5 quack-kernels==0.6.5 cut-cross-entropy==25.1.1
    pip install --no-deps unsloth==2026.10.9 flash-attn==2.8.3.post2
    pip install flash-attn-4==4.0.0b36

``import unsloth`` patches torch and transformers in the whole process, and ``import flash_attn`` wants its CUDA extension. The
kernels measured here need neither, so these packages are entered without running what they do on import.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Peer:
    """Another library: what ``pip install`` calls it, and the version this was written for."""

    distribution: str
    pinned: str = ""
    cuda_only: bool = True

    @property
    def requirement(self) -> str:
        return self.distribution + (f"=={self.pinned}" if self.pinned else "")

    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


LIGER = Peer("liger-kernel", "0.8.5")
QUACK = Peer("quack-kernels", "0.6.5")
FLASH_ATTENTION = Peer("flash-attn", "2.8.3.post2")
TRL = Peer("trl", "1.16.0")
FLASH_ATTENTION_4 = Peer("flash-attn-4", "4.0.0b36")
UNSLOTH = Peer("unsloth", "2026.10.9")
APPLE_CCE = Peer("cut-cross-entropy", "25.1.1")
TORCH = Peer("torch", cuda_only=False)
TRANSFORMERS = Peer("transformers", "5.23.0", cuda_only=False)


def folder_of(package: str) -> Path:
    """Where an installed package lies; nothing is imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no package {package}")
    return Path(next(iter(spec.submodule_search_locations)))


def functions_of(package: str, file: str, names: list[str], scope: dict[str, Any]) -> dict[str, Any]:
    """The named functions and classes of one installed file, compiled without importing its package."""
    path = folder_of(package) / file
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    if len(tree.body) != len(names):
        raise ModuleNotFoundError(f"{package} has no {', '.join(names)} in {file} any more")
    tree.body = ast.parse("from __future__ import annotations").body + tree.body
    exec(compile(tree, str(path), "exec"), scope)
    return scope


def enter(name: str, folder: Path | None = None, **contents: Any) -> None:
    """Put a module into ``sys.modules`` that has these contents and, as a package, this folder; an imported one stays."""
    if name not in sys.modules:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=folder is not None)
        if folder:
            module.__path__ = module.__spec__.submodule_search_locations = [str(folder)]
        vars(module).update(contents)
        sys.modules[name] = module


def quack(module: str) -> Any:
    """``quack.<module>``. QuACK 0.6.5 hashes what its epilogues depend on, and cannot be imported where nvidia-cutlass-dsl has a
    logger (4.7) or a context variable (4.8) among it. Their types stand for them here."""
    identity = importlib.import_module("quack.gemm_runtime.identity")
    exact = identity.semantic_value_key

    def key(value: Any, *rest: Any) -> Any:
        try:
            return exact(value, *rest)
        except TypeError:
            return "opaque", type(value).__module__, type(value).__qualname__

    identity.semantic_value_key = key
    return importlib.import_module(f"quack.{module}")


def quack_linear_cross_entropy() -> Any:
    """``quack.linear_cross_entropy``. Where its chunks (4096 tokens) are as long as hidden states are wide, QuACK 0.6.5 stops: it
    cannot tell a factor of each row from one of each column. Here it is told."""
    module = quack("linear_cross_entropy")
    frontend = importlib.import_module("quack.epilogue.frontend")
    pin = frontend.gemm_epilogue(ops={"v": frontend.ColVecLoad("v")})
    module._lce_vscale_epi = pin(module._lce_vscale_epi.fn)
    return module


def trl(module: str) -> Any:
    """``trl.<module>`` of those that need torch and Triton only, without the trainers around them."""
    folder = folder_of("trl")
    enter("trl", folder)
    enter("trl.trainer", folder / "trainer")
    enter("trl.trainer.utils", maybe_gather_lm_head_ctx=lambda *parameters: contextlib.nullcontext())  # DeepSpeed's
    return importlib.import_module(f"trl.{module}")


def flash_attention(module: str) -> Any:
    """``flash_attn.<module>`` of those that do not need its CUDA extension."""
    if "flash_attn" not in sys.modules:
        enter("flash_attn", folder_of("flash_attn"))
    return importlib.import_module(f"flash_attn.{module}")


def flash_attention_4() -> Any:
    """FlashAttention-4's interface, ``flash_attn.cute``.

    The compiler that it needs adds its own folder to the path in a ``.pth`` file, which is read in ``site-packages`` only.
    """
    if importlib.util.find_spec("cutlass") is None:
        sys.path.append(str(folder_of("nvidia_cutlass_dsl") / "dsl_packages"))
    return flash_attention("cute.interface")


def unsloth(module: str) -> Any:
    """``unsloth.kernels.<module>``, with the parts of Unsloth around it that the kernels use."""
    folder = folder_of("unsloth")
    if "unsloth" not in sys.modules:
        import torch
        import triton
        import triton.language
        from packaging.version import Version
        from triton.language.extra import libdevice

        enter("unsloth", folder)
        enter("unsloth.kernels", folder / "kernels")
        enter("unsloth.device_type", DEVICE_COUNT=1, DEVICE_TYPE="cuda", DEVICE_TYPE_TORCH="cuda", is_hip=lambda: False)
        enter("unsloth_zoo", folder / "kernels")
        enter("unsloth_zoo.utils", Version=Version)
        enter("unsloth_zoo.loss_utils", patch_loss_functions=None, post_patch_loss_function=None)
        indexing = importlib.import_module("unsloth.kernels.indexing")
        scope = {"MAX_FUSED_SIZE": 65536, "next_power_of_2": triton.next_power_of_2}
        functions = functions_of("unsloth", "kernels/utils.py", ["calculate_settings"], scope)
        enter(
            "unsloth.kernels.utils",
            **functions,
            triton_tanh=libdevice.tanh,
            triton_cast=triton.language.cast,
            torch_gpu_device=torch.cuda.device if torch.cuda.device_count() > 1 else lambda device: contextlib.nullcontext(),
            torch_device_stream=torch.cuda.current_stream,
            DEVICE_TYPE="cuda",
            long_indexing=indexing.long_indexing,
            is_cdna=lambda: False,
            norm_num_warps=lambda *_: 4,  # of the RMS norm, which is not called
        )
    return importlib.import_module(f"unsloth.kernels.{module}")
