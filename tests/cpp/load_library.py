"""libpackops.so serves Python too, without the package: ``torch.ops.load_library`` registers the ops (no gradients, no fakes)."""

import sys

import torch

torch.ops.load_library(sys.argv[1])
logits, labels = torch.randn(5, 100), torch.randint(0, 100, (5,))
want = torch.nn.functional.cross_entropy(logits, labels)
torch.testing.assert_close(torch.ops.packops.cross_entropy(logits, labels), want)
position_ids, seq_idx = torch.ops.packops.packed_metadata(torch.tensor([0, 3, 5], dtype=torch.int32), 6)
if position_ids.tolist() != [0, 1, 2, 0, 1, 0] or seq_idx.tolist() != [0, 0, 0, 1, 1, -1]:
    sys.exit(f"packed_metadata: {position_ids.tolist()}, {seq_idx.tolist()}")
if "packops" in sys.modules:
    sys.exit("this must not need the Python package")
