"""Change a kernel, compile it, and hold it against the installed one, in one process and in half a minute.

    python examples/jit_your_kernel.py

The question here: the CPU kernel of the cross entropy goes through a row in blocks, so that a block is still in the L1 cache when
it is read for the second time (first for its maximum, then for its sum). How long should a block be? Put your own question in its
place: an edit of a copy of ``csrc/`` and a namespace for it is all it takes. Needs ``pip install '.[jit]'`` and a compiler.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch

import packops
from packops import jit


def edited_copy(folder: Path, block: int) -> Path:
    """A copy of packops' own csrc with another block length."""
    csrc = shutil.copytree(jit.installed_csrc(), folder / f"csrc_{block}")
    kernel = csrc / "ce_loss_simd.h"
    old, new = "kBlock = 1024;", f"kBlock = {block};"
    text = kernel.read_text()
    if text.count(old) != 1:
        raise SystemExit(f"{kernel.name} no longer has the line {old!r}: this example wants a look")
    kernel.write_text(text.replace(old, new))
    return csrc


def milliseconds(ops, logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The fastest of a few forward passes."""
    times = []
    for _ in range(7):
        started = time.perf_counter()
        ops.cross_entropy(logits, labels, reduction="none")
        times.append(time.perf_counter() - started)
    return 1e3 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description="Try other block lengths of the cross-entropy kernel on the CPU.")
    parser.add_argument("--blocks", type=int, nargs="+", default=[256], help="lengths to try; 1024 is the installed one")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    arguments = parser.parse_args()
    if min(*arguments.blocks, arguments.rows, arguments.vocab) < 1:  # a kernel in blocks of 0 never comes to an end
        parser.error("--blocks, --rows and --vocab must be positive")

    torch.manual_seed(0)
    logits = torch.randn(arguments.rows, arguments.vocab)
    labels = torch.randint(0, arguments.vocab, (arguments.rows,))
    installed = torch.ops.packops.cross_entropy(logits, labels, reduction="none")
    exact = packops.reference.cross_entropy(logits.double(), labels, reduction="none")

    candidates = {"1024 (installed)": torch.ops.packops}
    with tempfile.TemporaryDirectory() as folder:
        for block in arguments.blocks:
            candidates[str(block)] = jit.load(edited_copy(Path(folder), block), namespace=f"packops_block_{block}")

    print(f"\ncross entropy forward, {arguments.rows} x {arguments.vocab} float32")
    print(f"{'block':>18} {'ms':>8} {'against installed':>18} {'against fp64':>14}")
    for name, ops in candidates.items():
        loss = ops.cross_entropy(logits, labels, reduction="none")
        from_installed, from_exact = (loss - installed).abs().max(), (loss - exact).abs().max()
        print(f"{name:>18} {milliseconds(ops, logits, labels):>8.2f} {from_installed:>18.1e} {from_exact:>14.1e}")


if __name__ == "__main__":
    main()
