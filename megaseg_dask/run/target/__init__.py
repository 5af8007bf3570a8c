"""What a run writes at its target: ownership, arrays, metadata and tables."""
