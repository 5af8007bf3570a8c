"""Settings become a plan: pure, printable, recorded."""
