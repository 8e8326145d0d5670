"""INT4 checkpoints for Paddock: the formats, the layout in memory and the arithmetic."""
