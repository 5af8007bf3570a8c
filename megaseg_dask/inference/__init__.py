"""A bundle on a device, applied to a block."""
