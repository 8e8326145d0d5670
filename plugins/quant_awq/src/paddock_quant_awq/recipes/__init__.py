"""Recipes that make 4-bit checkpoints, each in the layout that other tools write and read."""
