"""Bundles in the forms that cyto-dl leaves on a disk."""
