"""What the machine code of the kernels must not do, and no run shows reliably."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import packops

# What these read is overwritten by stores of threads, which do not overtake loads.
OVERWRITTEN_BY_STORES = ("long_split_kernel",)


# A line of the listing and the one below it: the instruction, and the higher of its two words.
LINES = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x([0-9a-f]{16}) \*/")


class Instruction(NamedTuple):
    text: str
    sets: int  # the barrier that says when it has its result, 7 for none
    awaits: int  # a bit for each of six barriers


def kernels(library: Path) -> Iterator[tuple[str, list[Instruction]]]:
    """Names of kernels and their machine code, of what the library holds for any architecture.

    An instruction is 16 bytes. Its highest 23 bits say how it is issued (Jia et al., Dissecting the NVIDIA Volta GPU
    Architecture via Microbenchmarking, 2018, section 2.1).
    """
    listing = subprocess.run(["cuobjdump", "-sass", library], capture_output=True, text=True, check=True).stdout
    for section in listing.split("Function : ")[1:]:
        code = []
        for text, high in LINES.findall(section):
            issue = int(high, 16) >> 41
            code.append(Instruction(text, issue >> 5 & 7, issue >> 11 & 63))
        yield section.split(maxsplit=1)[0], code


def early_arrivals(code: list[Instruction]) -> list[tuple[str, str]]:
    """Arrivals at an mbarrier, each with a load of 16 bytes or of matrices from shared memory that may still be under way."""
    found = []
    coming: dict[int, str] = {}
    for text, sets, awaits in code:
        coming = {barrier: load for barrier, load in coming.items() if not awaits >> barrier & 1}
        if "SYNCS.ARRIVE" in text:
            found += [(text, load) for load in coming.values()]
        elif re.match(r"(@!?U?P\d+ )?LDS(M|\.128)", text) and sets != 7:
            coming[sets] = text
    return found


@pytest.mark.gpu
def test_no_arrival_stands_behind_a_load_that_may_be_late():
    """A copy by the copy engine that waits for the arrival could be there before the load, which an arrival does not wait for."""
    if shutil.which("cuobjdump") is None:
        pytest.skip("needs cuobjdump")
    found, arrivals = {}, 0
    for name, code in kernels(Path(packops._C.__file__)):
        arrivals += sum("SYNCS.ARRIVE" in text for text, *_ in code)
        if not any(other in name for other in OVERWRITTEN_BY_STORES) and (early := early_arrivals(code)):
            found[name] = early
    if arrivals == 0:
        pytest.skip("this build has no machine code with mbarriers")
    assert not found
