"""Rows of a table of quality."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import frozen


@frozen(kw_only=True)
class Row:
    """One way to compute a model: how it predicts the text, and how far it is from the plain model of the same library.

    `growth` is that of perplexity, as a share; `kl` the mean of KL(plain || this) in nats, `kl_max` the largest of a token.
    """

    model: str
    library: str
    recipe: str
    kv: str
    perplexity: float
    growth: float
    top1: float
    kl: float
    kl_max: float


def printed(rows: Iterable[Row]) -> str:
    """Return the rows as a table of Markdown."""
    lines = [
        "| model | library | recipe | keys, values | perplexity | growth | same first choice | KL, nats | largest KL |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join([*lines, *map(line, rows)])


def line(row: Row) -> str:
    """Return a row as a line of the table."""
    figures = f"{row.perplexity:.4f} | {row.growth:+.3%} | {row.top1:.4f} | {row.kl:.6f} | {row.kl_max:.4f}"
    return f"| {row.model} | {row.library} | {row.recipe} | {row.kv} | {figures} |"
