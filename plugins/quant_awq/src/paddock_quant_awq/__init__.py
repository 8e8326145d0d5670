"""INT4 AWQ checkpoints for Paddock: the format and its arithmetic."""
