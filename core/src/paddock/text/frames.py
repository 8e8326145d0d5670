"""How two processes talk over pipes: eight bytes of length, big-endian, then that many bytes of JSON."""

from __future__ import annotations

LENGTH_BYTES = 8


def frame(body: bytes) -> bytes:
    """Return `body` with its length before it."""
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def length(head: bytes) -> int:
    """Return how many bytes follow a frame's head."""
    return int.from_bytes(head, "big")
