"""Fixtures of the command line's tests."""

from core.tests.plugins.made import site

__all__ = ["site"]
