"""A packed training loop in plain torch: documents of any length, no padding, and exactly the loss you meant.

    python examples/plain_loop.py

Runs on a CPU in seconds. The documents here count upwards from a random number, so that there is something to learn; the model is
one layer of attention. Put your own in their places: the lines that packing needs are the ones that say packops.
"""

import torch
import torch.nn.functional as F
from torch import nn

import packops


class TinyLM(nn.Module):
    def __init__(self, vocab_size: int, heads: int = 4, head_dim: int = 16) -> None:
        super().__init__()
        self.heads, width = heads, heads * head_dim
        self.embed, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.cos, self.sin = packops.rope_table(head_dim, 4096)

    def forward(self, ids: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(x).view(len(ids), 3, self.heads, -1).unbind(1)
        q, k = packops.apply_rope(q, k, self.cos, self.sin, position_ids=position_ids)
        attended = packops.attention(q, k, v, cu_seqlens)
        return self.head(x + self.out(attended.flatten(1)))


def main(steps: int = 30, vocab_size: int = 100, documents_per_step: int = 16) -> list[float]:
    torch.manual_seed(0)
    model = TinyLM(vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for step in range(steps):
        lengths = torch.randint(2, 100, (documents_per_step,))
        documents = [(torch.arange(n) + torch.randint(vocab_size, ())) % vocab_size for n in lengths]
        total = 0.0
        for chosen in packops.pack(lengths, 512, epoch=step):  # every pack is a micro-batch
            ids = torch.cat([documents[i] for i in chosen])
            cu_seqlens = F.pad(lengths[chosen].cumsum(0), (1, 0)).int()
            position_ids, _ = packops.packed_metadata(cu_seqlens, len(ids))
            loss = packops.cross_entropy(
                model(ids, position_ids, cu_seqlens), ids, cu_seqlens=cu_seqlens, shift=True,
                reduction="seq-mean-token-mean", num_items=documents_per_step,  # of all micro-batches together
            )  # fmt: skip
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        history.append(total)
        if step % 5 == 0 or step == steps - 1:
            print(f"step {step:2d}  loss {total:.3f}", flush=True)
    return history


if __name__ == "__main__":
    main()
