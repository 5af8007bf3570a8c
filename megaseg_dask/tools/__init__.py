"""Before and after a run: report, viewer, napari, tracks, tasks of Fractal, training, demo."""
