"""The version: the one place that says it, for packaging and for summaries.

It holds a string and does nothing.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
