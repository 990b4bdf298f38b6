"""The device that a command runs on."""

from __future__ import annotations

import torch

from .. import has_cuda


def choose_device(text: str | None) -> torch.device:
    """``--device`` as a device that packops can use here, or a ValueError; None takes a GPU if there is one."""
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() and has_cuda else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(f"--device: {text!r} is no device; cpu, cuda or cuda:1 are") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: packops runs on cpu and cuda, not on {device.type}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: there is no {text} here; this torch sees {torch.cuda.device_count()} GPUs")
    if device.type == "cuda" and not has_cuda:
        raise ValueError(f"--device: {text} needs CUDA kernels, and this packops was built without them")
    return device
