"""ibxai: attribution by information bottlenecks and optimised masks, and everything it is compared with."""

from importlib.metadata import version

__version__ = version("ibxai")
