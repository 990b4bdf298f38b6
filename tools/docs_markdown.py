"""Docstrings have roles and formulas as Sphinx reads them; mkdocs wants Markdown's. An extension of griffe, see mkdocs.yml."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe


def markdown(text: str) -> str:
    """The docstring with ``:func:`x``` as code, and ``:math:`` and ``.. math::`` as what MathJax looks for."""
    text = re.sub(r":math:`([^`]+)`", r"\\(\1\\)", text)
    text = re.sub(r":(?:func|class|meth|mod|attr|data):`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"^\.\. math::((?: .+)?(?:\n(?: +.+|(?=\n)))*)", lambda match: formula(match[1]), text, flags=re.MULTILINE)


def formula(body: str) -> str:
    first, _, rest = body.strip("\n").partition("\n")
    lines = [first.strip(), *textwrap.dedent(rest).splitlines()]
    return "\n\\[\n" + "\n".join(line.strip() for line in lines if line.strip()) + "\n\\]\n"


class Markdown(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
