"""Make README.md and pyproject.toml fit for a package index, in place: for the checkout that a release is built from.

    python tools/publishable.py https://host/owner/packops v0.1.0

An index page shows README.md alone, so its relative links and images get the repository's address, at the tag; the same address
becomes [project.urls]. The repository itself keeps relative links, which work in every fork and at every commit.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def absolute_links(text: str, repository: str, tag: str) -> str:
    """Markdown with every relative link made absolute: pages as pages, images as raw files."""

    def replace(match: re.Match[str]) -> str:
        image, label, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        return f"{image}[{label}]({repository}/{'raw' if image else 'blob'}/{tag}/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", replace, text)


def with_urls(pyproject: str, repository: str, tag: str) -> str:
    urls = {
        "Homepage": repository,
        "Documentation": f"{repository}/tree/{tag}/docs",
        "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }
    table = "\n".join(f'{name} = "{url}"' for name, url in urls.items())
    return pyproject.replace("[project.scripts]", f"[project.urls]\n{table}\n\n[project.scripts]", 1)


def main(repository: str, tag: str) -> None:
    for name, change in (("README.md", absolute_links), ("pyproject.toml", with_urls)):
        path = ROOT / name
        path.write_text(change(path.read_text(encoding="utf-8"), repository.rstrip("/"), tag), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
