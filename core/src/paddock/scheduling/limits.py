"""The numbers the scheduler keeps to, checked against each other once."""

from __future__ import annotations

from attrs import field, frozen, validators

from paddock.errors import PlanError

_positive = validators.ge(1)


@frozen(kw_only=True)
class SchedulerLimits:
    """What a step may hold at most: sequences, tokens, pages; and how many sequences may wait.

    `max_model_len` bounds prompt and generated tokens of one sequence together. Raises PlanError where the numbers leave no
    room for one whole sequence, or for one token of every running one.
    """

    max_num_seqs: int = field(validator=_positive)
    max_num_batched_tokens: int = field(validator=_positive)
    max_model_len: int = field(validator=_positive)
    num_pages: int
    page_size: int = field(validator=_positive)
    max_queue: int = field(default=65536, validator=_positive)
    enable_prefix_caching: bool = True

    @property
    def pages_per_sequence(self) -> int:
        """Return the pages a sequence of `max_model_len` tokens takes."""
        return -(-self.max_model_len // self.page_size)

    def __attrs_post_init__(self) -> None:
        """Check what concerns several numbers at once."""
        if self.num_pages < self.pages_per_sequence:
            room = max(self.num_pages, 0) * self.page_size
            raise PlanError(
                f"the KV cache has {self.num_pages} pages of {self.page_size} tokens: "
                f"one sequence of max_model_len {self.max_model_len} needs {self.pages_per_sequence}",
                fix="give the KV cache more memory" + (f", or lower max_model_len to {room}" if room else ""),
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise PlanError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs {self.max_num_seqs}: "
                "a step could not take one token of each running sequence",
                fix=f"raise max_num_batched_tokens to {self.max_num_seqs} or lower max_num_seqs to {self.max_num_batched_tokens}",
            )
