"""Native errors as Python errors.

The stable ABI reports every C++ exception as ``RuntimeError``; packops writes the intended type in front of the message
(``packops.IndexError: ...``), and :func:`raise_typed` raises that.
"""

from __future__ import annotations

import re
from typing import NoReturn

_TYPES = {t.__name__: t for t in (IndexError, ValueError, TypeError, RuntimeError, NotImplementedError)}
_PATTERN = re.compile(r"packops\.(\w+): (.*?)(?:\nException raised from|\Z)", re.DOTALL)


def raise_typed(error: RuntimeError) -> NoReturn:
    """Raise what ``error``'s message names, or ``error`` itself if it is not one of ours."""
    match = _PATTERN.search(str(error))
    if match is None or match[1] not in _TYPES:
        raise error
    raise _TYPES[match[1]](f"packops.{match[2].strip()}") from None
