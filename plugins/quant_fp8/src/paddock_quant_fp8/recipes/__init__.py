"""Recipes that make FP8 checkpoints, each in the layout that other tools write and read."""
