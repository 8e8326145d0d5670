"""Making quantised checkpoints. `recipe` is what a plugin builds on, `run` what does it."""
