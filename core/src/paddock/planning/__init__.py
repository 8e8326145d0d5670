"""What will run, and does it fit: plans, the memory ledger and how choices are made. Free of torch."""
