"""Sizes that small steps are padded to, so that few of them need be captured as graphs."""

from __future__ import annotations

from bisect import bisect_left

from attrs import Factory, field, frozen

# A step with more tokens of prompts than this is to keep the device busy for longer than the host takes to launch it kernel by
# kernel. By arithmetic 512 tokens take Llama-3.1-8B 11 ms at 690 TFLOP/s, and 350 launches at 29 us 10; where the two meet has
# not been measured.
LARGEST_CHUNKS = 512
CHUNK_TOKENS = (8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, LARGEST_CHUNKS)
REHEARSED_CHUNKS = (CHUNK_TOKENS[0], 384)  # a short prompt's, and more tokens than decodes have but fewer than a full step
CHUNK_COUNTS = (1, 2, 4, 8)
# Shapes with prompts in them are many and some are met once: so many are captured, each when it is met again.
MIXED_GRAPHS = 32


def padded_sizes(most: int) -> list[int]:
    """Return the sizes steps of decodes alone are padded to.

    Powers of two to 8, then at most 7 rows too many, 15 above 256, 31 above 512.
    """
    steps = [1, 2, 4, *range(8, 256, 8), *range(256, 512, 16), *range(512, most, 32)]
    return [*(size for size in steps if size < most), most]


def rehearsed_sizes(most: int) -> list[int]:
    """Return the sizes whose kernels are compiled before the first step: powers of two, between which tiles seldom change."""
    sizes = [1]
    while 2 * sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    return [*sizes, most] if most > 1 else sizes


def mixed_sizes(most: int) -> list[int]:
    """Return the numbers of decodes that steps with prompts in them are padded to: none, or at most half as many again."""
    steps = [0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    return [*(size for size in steps if size < most), most]


@frozen(kw_only=True)
class StepShape:
    """A step's size: sequences that decode one token each, and chunks of prompts with so many tokens together."""

    decodes: int
    chunks: int = 0
    chunk_tokens: int = 0

    @property
    def sequences(self) -> int:
        """Return how many sequences the step has."""
        return self.decodes + self.chunks

    @property
    def tokens(self) -> int:
        """Return how many tokens the step has."""
        return self.decodes + self.chunk_tokens


@frozen
class Padding:
    """The shapes of an engine that runs at most `most` sequences at once."""

    most: int
    _alone: list[int] = field(init=False, default=Factory(lambda self: padded_sizes(self.most), takes_self=True))
    _mixed: list[int] = field(init=False, default=Factory(lambda self: mixed_sizes(self.most), takes_self=True))

    @property
    def largest(self) -> StepShape:
        """Return a shape that no padded step exceeds in any number."""
        return StepShape(decodes=self.most, chunks=CHUNK_COUNTS[-1], chunk_tokens=LARGEST_CHUNKS)

    def padded(self, shape: StepShape) -> StepShape | None:
        """Return the next larger shape of the list, None for a step that is better run as it comes."""
        if not shape.chunks:
            return StepShape(decodes=_next(self._alone, shape.decodes))
        if shape.chunks > CHUNK_COUNTS[-1] or shape.chunk_tokens > LARGEST_CHUNKS:
            return None
        return StepShape(
            decodes=_next(self._mixed, shape.decodes),
            chunks=_next(CHUNK_COUNTS, shape.chunks),
            chunk_tokens=_next(CHUNK_TOKENS, shape.chunk_tokens),
        )


def _next(sizes: list[int] | tuple[int, ...], size: int) -> int:
    return sizes[bisect_left(sizes, size)]
