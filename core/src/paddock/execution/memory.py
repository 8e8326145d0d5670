"""What an engine really took of a device's memory, as the allocator counts it: held beside the ledger, which predicted it."""

from __future__ import annotations

from attrs import frozen


@frozen(kw_only=True)
class Loaded:
    """Bytes handed out once the weights were loaded, and the most the largest step took beside them."""

    weight_bytes: int
    workspace_bytes: int


NOTHING_LOADED = Loaded(weight_bytes=0, workspace_bytes=0)


@frozen(kw_only=True)
class MemoryUse:
    """Bytes of one device. `workspace_bytes` is the most a step has had beside weights, KV pages and graphs.

    `graph_bytes` is what captured steps keep; `peak_bytes` the most that was allocated at once; `reserved_bytes` what the
    allocator holds of the device now, freed blocks included.
    """

    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    graph_bytes: int
    peak_bytes: int
    reserved_bytes: int
