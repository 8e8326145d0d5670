"""How much one step takes: tokens and sequences; and whether small steps are captured as graphs."""

from __future__ import annotations

from paddock.config import EngineConfig
from paddock.errors import PlanError
from paddock.planning.hardware import Hardware
from paddock.planning.ledger import Batch
from paddock.planning.notes import ASKED, Notes
from paddock.planning.plan import Rejected
from paddock.plugins.descriptors import AttentionSpec

MAX_NUM_SEQS = 256
# A GPU reaches its full arithmetic rate with some thousand tokens a step; on a CPU more tokens only make others wait longer.
MAX_NUM_BATCHED_TOKENS = {"cuda": 8192, "cpu": 2048}


def choose_batch(config: EngineConfig, hardware: Hardware, notes: Notes) -> Batch:
    """Return the largest step. Raises PlanError when it could not take one token of each sequence that may run."""
    tokens, seqs = config.max_num_batched_tokens, config.max_num_seqs
    if tokens is not None and seqs is not None and tokens < seqs:
        raise PlanError(
            f"max_num_batched_tokens {tokens} is below max_num_seqs {seqs}: a step could not take one token of each",
            fix=f"raise max_num_batched_tokens to {seqs}, or lower max_num_seqs to {tokens}",
        )
    usual = MAX_NUM_BATCHED_TOKENS[hardware.device]
    chosen_seqs = seqs or min(MAX_NUM_SEQS, tokens or MAX_NUM_SEQS)
    chosen_tokens = tokens or max(usual, chosen_seqs)
    reason = f"{usual} tokens a step suit a {hardware.device}" if chosen_tokens == usual else "one token of each sequence"
    notes.choose("max_num_batched_tokens", chosen_tokens, ASKED if tokens else reason)
    reason = "the default" if chosen_seqs == MAX_NUM_SEQS else "no more sequences than tokens in a step"
    notes.choose("max_num_seqs", chosen_seqs, ASKED if seqs else reason)
    return Batch(tokens=chosen_tokens, sequences=chosen_seqs)


def choose_graphs(config: EngineConfig, hardware: Hardware, attention: AttentionSpec, notes: Notes) -> bool:
    """Return whether decodes, and small steps with prompts in them, are captured as CUDA graphs."""
    reasons = [f"a {hardware.device} has no graphs"] if hardware.device != "cuda" else []
    reasons += ["enforce_eager was asked for"] if config.enforce_eager else []
    reasons += [] if attention.graph_capturable else [f"attention {attention.name} cannot be captured"]
    if reasons:
        notes.choose("graphs", "no", "; ".join(reasons), [Rejected("yes", "; ".join(reasons))])
    else:
        notes.choose("graphs", "yes", "decode steps replay without launch overhead", [Rejected("no", "slower decode")])
    return not reasons
