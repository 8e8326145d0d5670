"""What holds for every model holds for quantised ones: however a prompt is cut, whoever runs beside it, over one rank or two."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from paddock import axes
from paddock.errors import PlanError
from paddock.layers import Communicator
from paddock.testing.contracts import MODEL_BOUND, check_batching, check_chunking, check_wanted
from paddock.testing.oracle import relative_rms
from paddock.testing.paging import step
from paddock.testing.ranks import run_ranks
from tests.zoo.formats import WRITTEN, Written, store_blocks
from tests.zoo.test_quantised_checkpoints import BOUND, TOKENS, loaded, logits, plain, written_to

CUTS = frozenset({axes.HEADS, axes.KV_HEADS, axes.FFN, axes.VOCAB})
FP8 = [name for name in WRITTEN if not name.startswith("awq")]
# A sum in another order may fall on the other side of a rounding to FP8, and what depends on it then differs by roundings: of
# 2^-4 at most. That rows of one product do not touch each other is tested to the last bit where the products are.
ONE_ROUNDING = 2.0**-4
BLOCKS = ("fp8-block", "fp8-block-128", "compressed-block")  # of 20 and 24, 128, and 16 and 24: two ranks do not meet their edges


@pytest.mark.parametrize("name", FP8)
def test_chunks_and_neighbours_change_nothing(tmp_path: Path, name: str) -> None:
    """The contracts every Llama keeps are kept by one in FP8: to the same bound where activations are not rounded."""
    written_to(tmp_path, "llama", WRITTEN[name])
    built = loaded(tmp_path, "llama", WRITTEN[name].entry)
    bound = MODEL_BOUND if name == "compressed-weights" else ONE_ROUNDING
    check_chunking(built, bound=bound)
    check_batching(built, bound=bound)
    check_wanted(built, bound=bound)


def rank_logits(folder: Path, entry: dict[str, Any], rank: int, communicator: Communicator) -> Tensor:
    """Return the logits one of two ranks computes."""
    built = loaded(folder, "llama", entry, axes.Shard(rank, 2, CUTS), communicator)
    (found,) = step(built.model, built.pages(kv_heads=1), built.backend, [("a", TOKENS)])
    return found


@pytest.mark.parametrize("name", [name for name in FP8 if name not in BLOCKS])
def test_two_ranks_compute_what_their_shares_mean(tmp_path: Path, name: str) -> None:
    """Scales are cut, repeated and spread over rows; a rank scales each token by the largest of the inputs it holds."""
    meant = written_to(tmp_path, "llama", WRITTEN[name])
    expected = logits(plain("llama", WRITTEN[name], meant, ranks=2))
    for shared in run_ranks(2, partial(rank_logits, tmp_path, WRITTEN[name].entry)):
        assert relative_rms(shared, expected) < BOUND


@pytest.mark.parametrize("block", [(8, 8), (4, 8), (8, 4)])
def test_ranks_that_meet_the_edges_of_blocks_give_the_logits_of_one(tmp_path: Path, block: tuple[int, int]) -> None:
    """Shares of whole blocks have the scales, and round their inputs by the groups, that the whole has."""
    written = Written(
        entry=WRITTEN["fp8-block"].entry | {"weight_block_size": list(block)},
        store=lambda weight_OI: store_blocks(weight_OI, block, "weight_scale_inv"),
    )
    written_to(tmp_path, "llama", written)
    whole = logits(loaded(tmp_path, "llama", written.entry))
    for shared in run_ranks(2, partial(rank_logits, tmp_path, written.entry)):
        assert relative_rms(shared, whole) < BOUND


@pytest.mark.parametrize("name", BLOCKS)
def test_ranks_that_break_blocks_are_refused(tmp_path: Path, name: str) -> None:
    """A share that begins inside a block has no scales of its own: an error, never a wrong number."""
    written_to(tmp_path, "llama", WRITTEN[name])
    with pytest.raises(PlanError, match="do not fall on the groups"):
        run_ranks(2, partial(rank_logits, tmp_path, WRITTEN[name].entry))
