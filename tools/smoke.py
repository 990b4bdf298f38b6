"""Does an installed packops work? Every public op once on the CPU, forward and backward, against plain torch.

Run by tools/check_wheel.sh and tools/check_abi_range.sh outside the source tree; prints where packops came from.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import packops


def main() -> None:
    source = Path(__file__).resolve().parents[1] / "python"
    assert source not in Path(packops.__file__).resolve().parents, f"packops comes from the source tree: {packops.__file__}"
    sources = packops.jit.installed_csrc()  # what packops.jit compiles
    digest = packops._C.build_info()["sources"]
    assert packops._build.source_digest(sources) == digest, f"{sources} is not what the library was built from"
    torch.manual_seed(0)

    logits = torch.randn(7, 1003, requires_grad=True)
    labels = torch.randint(0, 1003, (7,))
    labels[3] = -100
    want = F.cross_entropy(logits, labels)
    (want_grad,) = torch.autograd.grad(want, logits)
    for cross_entropy in (packops.cross_entropy, torch.ops.packops.cross_entropy):
        got = cross_entropy(logits, labels)
        (got_grad,) = torch.autograd.grad(got, logits)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(got_grad, want_grad)

    try:
        packops.cross_entropy(logits, labels + 2000)
    except IndexError:
        pass
    else:
        raise AssertionError("a label outside the vocabulary must raise IndexError")

    if hasattr(packops, "apply_rope"):
        cos, sin = packops.rope_table(64, 100)
        q, k = torch.randn(10, 4, 64, requires_grad=True), torch.randn(10, 2, 64)
        rotated, _ = packops.apply_rope(q, k, cos, sin, cu_seqlens=torch.tensor([0, 6, 10]))
        torch.testing.assert_close(rotated.norm(dim=-1), q.norm(dim=-1))  # a rotation
        torch.testing.assert_close(rotated[6], q[6])  # position 0 again
        (gradient,) = torch.autograd.grad(rotated.square().sum(), q)
        torch.testing.assert_close(gradient, 2 * q)

    if hasattr(packops, "packed_metadata"):
        position_ids, seq_idx = packops.packed_metadata(torch.tensor([0, 3, 5], dtype=torch.int32), 6)
        assert position_ids.tolist() == [0, 1, 2, 0, 1, 0], position_ids
        assert seq_idx.tolist() == [0, 0, 0, 1, 1, -1], seq_idx

    if hasattr(packops, "pack"):
        plan = packops.pack([700, 300, 1024, 24, 1000], 1024)
        assert plan is not None

    python = sys.version.split()[0]
    print(f"packops {packops.__version__} works under torch {torch.__version__}, Python {python}: {packops.__file__}")


if __name__ == "__main__":
    main()
