"""Tasks of Fractal, which calls them as scripts; the manifest beside the package lists them."""
