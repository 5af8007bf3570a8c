"""MegaSeg 3D segmentation of any volume, split over Dask workers, identical to predicting it whole."""
