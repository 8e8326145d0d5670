"""Fixtures of the plugin host's tests."""

from core.tests.plugins.made import site

__all__ = ["site"]
