"""What a machine, an address or a cluster offers, and what is missing there."""
