"""Files of microscopes become OME-Zarr, by the readers that exist for them."""
