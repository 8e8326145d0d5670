"""Rows of a table of quality, and how sure their figures are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from attrs import frozen

from paddock.evaluation import Comparison

HEADS = ("model", "library", "recipe", "keys, values", "perplexity", "growth", "same first choice", "KL, nats", "largest KL")


@frozen(kw_only=True)
class Growth:
    """By what share perplexity is larger, and the standard error of that: None where there is one window to judge by."""

    share: float
    error: float | None

    def __str__(self) -> str:
        """Return both in percent."""
        return f"{self.share:+.3%}" + ("" if self.error is None else f" ± {self.error:.3%}")


@frozen(kw_only=True)
class Scored:
    """One window: the tokens scored, and the mean negative log-likelihood of one by the plain model and by this."""

    tokens: int
    nats_plain: float
    nats: float


@frozen(kw_only=True)
class Row:
    """One way to compute a model: how it predicts the text, and how far it is from the plain model of the same library.

    `growth` is that of perplexity; `kl` the mean of KL(plain || this) in nats, `kl_max` the largest of a token.
    """

    model: str
    library: str
    recipe: str
    kv: str
    perplexity: float
    growth: Growth
    top1: float
    kl: float
    kl_max: float
    windows: tuple[Scored, ...]

    @classmethod
    def of(cls, found: Sequence[Comparison], *, model: str, library: str, recipe: str, kv: str) -> Row:
        """Return the row of what was found in each window, the plain model being A."""
        tokens = [each.tokens for each in found]
        return cls(
            model=model,
            library=library,
            recipe=recipe,
            kv=kv,
            perplexity=math.exp(_mean(tokens, [each.nats_b for each in found])),
            growth=growth(tokens, [each.nats_b - each.nats_a for each in found]),
            top1=_mean(tokens, [each.top1 for each in found]),
            kl=_mean(tokens, [each.kl for each in found]),
            kl_max=max(each.kl_max for each in found),
            windows=tuple(Scored(tokens=each.tokens, nats_plain=each.nats_a, nats=each.nats_b) for each in found),
        )


@frozen(kw_only=True)
class Difference:
    """How much further perplexity grows in a row than in the reference's row, each from its own library's plain model."""

    model: str
    recipe: str
    reference: str
    kv: str
    growth: Growth
    windows: int


def growth(tokens: Sequence[int], nats: Sequence[float]) -> Growth:
    """Return what nats a token more, in windows of so many tokens each, make of perplexity.

    The standard error is that of a mean over windows drawn one by one, weighed by their tokens (a ratio of sums), times the
    slope of exp there.
    """
    count, mean = len(tokens), _mean(tokens, nats)
    error = None
    if count > 1:
        squares = math.fsum((each * (value - mean)) ** 2 for each, value in zip(tokens, nats, strict=True))
        error = math.exp(mean) * math.sqrt(squares * count / (count - 1)) / sum(tokens)
    return Growth(share=math.expm1(mean), error=error)


def further(row: Row, reference: Row) -> Growth:
    """Return how much further perplexity grows in a row, window by window: what both find hard or easy in one drops out."""
    tokens = [each.tokens for each in row.windows]
    assert tokens == [each.tokens for each in reference.windows], "both score the same windows"
    pairs = zip(row.windows, reference.windows, strict=True)
    return growth(tokens, [(ours.nats - ours.nats_plain) - (theirs.nats - theirs.nats_plain) for ours, theirs in pairs])


def difference(row: Row, reference: Row) -> Difference:
    """Return how a row differs from another library's."""
    return Difference(
        model=row.model,
        recipe=row.recipe,
        reference=f"{reference.library} {reference.recipe}",
        kv=row.kv,
        growth=further(row, reference),
        windows=len(row.windows),
    )


def differences(rows: Sequence[Row], reference: str | None) -> list[Difference]:
    """Return how each quantised row of Paddock differs from that library's row of the same model, keys and values."""
    theirs = {(row.model, row.kv): row for row in rows if row.library == reference}
    ours = [row for row in rows if row.library == "paddock" and row.recipe != "plain" and (row.model, row.kv) in theirs]
    return [difference(row, theirs[row.model, row.kv]) for row in ours]


def printed(rows: Iterable[Row], beside: Iterable[Difference] = ()) -> str:
    """Return the rows as a table of Markdown, and below it how they differ from a reference."""
    lines = [f"| {' | '.join(HEADS)} |", f"| {' | '.join(['---'] * 4 + ['---:'] * (len(HEADS) - 4))} |", *map(line, rows)]
    said = [
        f"{each.model}, keys and values in {each.kv}: growth of {each.recipe} is {each.growth} from that of {each.reference}, "
        f"± one standard error over {each.windows} windows"
        for each in beside
    ]
    return "\n".join([*lines, *([""] if said else []), *said])


def line(row: Row) -> str:
    """Return a row as a line of the table; the growth is ± its standard error over windows."""
    figures = f"{row.perplexity:.4f} | {row.growth} | {row.top1:.4f} | {row.kl:.6f} | {row.kl_max:.4f}"
    return f"| {row.model} | {row.library} | {row.recipe} | {row.kv} | {figures} |"


def _mean(tokens: Sequence[int], values: Sequence[float]) -> float:
    """Return the mean over all tokens, from the means of each window's."""
    return math.fsum(each * value for each, value in zip(tokens, values, strict=True)) / sum(tokens)
