"""Measurements: ratios between things run side by side, as JSON with the machine they ran on."""
