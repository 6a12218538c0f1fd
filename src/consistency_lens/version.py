"""The version of the package, apart from what it imports, so that its build and an artifact's code can read it."""

__version__ = "0.1.0"
