"""Structured logging: events with values, on standard error, quiet by default."""

from __future__ import annotations

from typing import Any


def configure(level: str) -> None:
    """Set the level of every Paddock logger: debug, info, warning or error."""
    import logging
    import sys

    import structlog

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S"),
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # whatever standard error is at the time
    )


def configure_once(level: str) -> None:
    """Set the level unless somebody did before: a program that uses Paddock keeps the logging it chose."""
    import structlog

    if not structlog.is_configured():
        configure(level)


def get_logger() -> Any:
    """Return a logger whose methods take an event name and values: `log.info("kv_cache_sized", pages=8192)`."""
    import structlog

    return structlog.get_logger("paddock")
