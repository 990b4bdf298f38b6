"""What a type checker says of a user's code: README and examples pass, and a misspelt name does not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import packops

pytest.importorskip("mypy")

ROOT = Path(__file__).resolve().parents[1]
WRONG = """
import torch
import packops
logits, labels = torch.randn(3, 5), torch.tensor([1, 2, 3])
packops.cross_entropi(logits, labels)
packops.no_such_module
packops.cross_entropy(logits, labels, reduction="average")
packops.cross_entropy(logits, labels, return_stats=True).backward()
packops.linear_cross_entropy(logits, logits, labels, return_stats=True).backward()
packops.PackingCollator(names="hf")([[1, 2]]).cu_seqlens
packops.PackingCollator(pad_to=3)
packops.apply_rope(logits, None, logits, logits)[1].sum()
"""
RIGHT = """
import torch
import packops
logits, labels = torch.randn(3, 5), torch.tensor([1, 2, 3])
loss, stats = packops.cross_entropy(logits, labels, return_stats=True)
entropy: torch.Tensor = stats.entropy
packops.cross_entropy(logits, labels, reduction="sum").backward()
packops.linear_cross_entropy(logits, logits, labels, bias=None, chunk_tokens=8).backward()
entropy = packops.linear_cross_entropy(logits, logits, labels, return_stats=True)[1].entropy
q, k = packops.apply_rope(logits, logits, logits, logits, rotary_offset=1)
k.sum(), packops.apply_rope(q, None, q, q)[0].sum()
ids: torch.Tensor = packops.PackingCollator()([[1, 2]]).input_ids
rows: dict = packops.PackingCollator(names="hf", pad_token_id=3)([[1, 2]])
print(packops.hf.report, packops.jit.load, packops.testing, packops.vocab_parallel_cross_entropy, packops.__version__)
"""


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    """mypy's errors by file, of one run over all of them."""
    folder = tmp_path_factory.mktemp("types")
    for page in (ROOT / "README.md", ROOT / "docs" / "hugging_face.md"):
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        (folder / f"{page.stem.lower()}_page.py").write_text("\n".join(blocks))
    (folder / "wrong.py").write_text(WRONG)
    (folder / "right.py").write_text(RIGHT)
    for example in (ROOT / "examples").glob("*.py"):
        (folder / example.name).write_text(example.read_text())
    files = sorted(map(str, folder.glob("*.py")))
    config = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    done = subprocess.run([sys.executable, "-m", "mypy", *config, *files], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: dict[str, list[str]] = {Path(file).name: [] for file in files}
    for line in done.stdout.splitlines():
        if ": error: " in line:
            found.setdefault(Path(line.partition(":")[0]).name, []).append(line.partition(":")[2])
    return found


def test_what_we_show_passes(complaints):
    assert len(complaints) > 8
    assert {file: lines for file, lines in complaints.items() if lines and file != "wrong.py"} == {}


def test_mistakes_are_found(complaints):
    """One in each line from the fifth on."""
    lines = [int(complaint.partition(":")[0]) for complaint in complaints["wrong.py"]]
    assert sorted(set(lines)) == list(range(5, 5 + WRONG.count("packops.")))


def test_dir_shows_the_public_names():
    assert dir(packops) == sorted([*packops.__all__, "distributed", "hf", "jit", "reference", "testing"])
    assert all(hasattr(packops, name) for name in dir(packops) if name != "hf")
