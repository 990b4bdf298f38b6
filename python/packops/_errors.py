"""Native errors as Python errors.

The stable ABI reports every C++ exception as ``RuntimeError``; packops writes the intended type in front of the message
(``packops.IndexError: ...``), and :func:`raise_typed` raises that.
"""

from __future__ import annotations

import re
from typing import NoReturn

_TYPES = {t.__name__: t for t in (IndexError, ValueError, TypeError, RuntimeError, NotImplementedError)}
_PATTERN = re.compile(r"packops\.(\w+): (.*?)(?:\nException raised from|\Z)", re.DOTALL)


def raise_typed(error: RuntimeError, op: str | None = None) -> NoReturn:
    """Raise what ``error``'s message names, or ``error`` itself if it is not one of ours.

    ``op``: the op that the user called, where it is made of others; the message names it instead.
    """
    match = _PATTERN.search(str(error))
    if match is None or match[1] not in _TYPES:
        raise error
    message = match[2].strip()
    if op is not None:
        message = re.sub(r"^\w+", op, message)
    raise _TYPES[match[1]](f"packops.{message}") from None
