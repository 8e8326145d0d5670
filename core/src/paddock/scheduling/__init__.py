"""What runs now: sequences, pages, steps and the scheduler. Free of torch."""
