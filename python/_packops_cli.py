"""What the command ``packops`` starts. It reads the arguments before it imports packops, and torch with it.

``packops.cli`` uses nothing but the standard library until a command runs, so it is loaded here without its parent.
"""

import importlib.util
import sys
from pathlib import Path


def main() -> int:
    package = importlib.util.find_spec("packops")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "cli"
    spec = importlib.util.spec_from_file_location(
        "_packops_cli_alone", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return importlib.import_module("_packops_cli_alone.program").run()
