"""Measuring: how fast a model answers, how soon it is ready, how near each kernel comes to what the device can do."""
