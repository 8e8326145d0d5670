"""Real models and data for the demo and the tests: fetched, checked, converted, never committed."""
