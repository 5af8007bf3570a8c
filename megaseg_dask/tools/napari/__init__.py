"""The plugin for napari: a reader and a panel that segments. ``napari.yaml`` tells napari of both.

Only this package imports napari and its libraries, which the extra ``napari`` installs.
"""
