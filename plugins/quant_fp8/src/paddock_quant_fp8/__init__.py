"""FP8 checkpoints for Paddock: the formats and their arithmetic."""
