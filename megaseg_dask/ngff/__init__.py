"""OME-Zarr 0.4 and 0.5, read and written, and 0.6, read."""
