"""Fixtures of the integration tests."""

from core.tests.plugins.made import site

__all__ = ["site"]
