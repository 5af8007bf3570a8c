"""What runs the network; each engine is one file."""
