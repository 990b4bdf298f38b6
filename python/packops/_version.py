"""The version, here and nowhere else: pyproject.toml, the command line and the library read it."""

__version__ = "0.1.0"
