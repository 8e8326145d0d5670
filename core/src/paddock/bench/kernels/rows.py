"""What one implementation at one size is told by, what each figure means, and the rows a run will fill."""

from __future__ import annotations

from collections.abc import Callable

from attrs import field, frozen

DEFINITIONS = {
    "error": (
        "error",
        "1",
        "how far the result is from the float32 or float64 twin's: relative RMS, or the share of FP8 values or tokens unlike it; "
        "of all values, but of a prompt's attention those of 96 queries: the first, middle and last 32, of every head",
    ),
    "microseconds": ("time", "us", "of one call in a captured graph of many, median of 12 rounds; by the wall on a CPU, of 5"),
    "rate": ("rate", "TB/s or TFLOP/s", "the least bytes, or the operations where those bound the call, over the time"),
    "percent_of_roof": ("roof", "%", "the limit over the time"),
    "limit_microseconds": (
        "limit",
        "us",
        "the least bytes over the bandwidth of the device, or operations over its rate if longer",
    ),
    "twin_microseconds": (
        "twin",
        "us",
        "of the plain-torch definition, median of 3 rounds; attention's is launched anew each time",
    ),
    "library_microseconds": (
        "torch",
        "us",
        "of the quickest of torch's own calls for the same work; attention's has no pages",
    ),
    "check_seconds": ("check", "s", "on the wall: arguments made, the kernel compiled or loaded, its result compared"),
    "wall_seconds": ("case", "s", "on the wall: all of the case, its check included"),
}


@frozen(kw_only=True)
class Row:
    """One implementation at one size. `problem` says why there is no time: a wrong result, or an error."""

    subject: str
    implementation: str
    plugin: str
    case: str
    error: float | None = None
    allowed: float | None = None
    problem: str | None = None
    microseconds: float | None = None
    rate: float | None = None
    unit: str = "TB/s"
    percent_of_roof: float | None = None
    limit_microseconds: float | None = None
    twin_microseconds: float | None = None
    library_microseconds: float | None = None
    library: str | None = None
    check_seconds: float | None = None
    wall_seconds: float | None = None

    @property
    def name(self) -> str:
        """Return the plugin, where it is not the core, and the op or the backend."""
        kernel = self.implementation if self.subject == "attention" else self.subject
        return kernel if self.plugin == "builtin" else f"{self.plugin} {kernel}"


@frozen(eq=False, kw_only=True)
class Planned:
    """A row with nothing but its names yet, and what fills it."""

    row: Row
    measure: Callable[[Row], Row] = field(repr=False)

    def measured(self) -> Row:
        """Return the row as measured now; what the kernel raises becomes its `problem`."""
        return self.measure(self.row)
