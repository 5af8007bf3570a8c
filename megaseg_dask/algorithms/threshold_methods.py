"""The names of the automatic thresholds, apart from the code that finds them.

The declaration of the options needs the names, and must not import NumPy:
``megaseg --help`` would wait for it.
"""

METHODS = ("otsu", "yen", "isodata", "minimum", "triangle", "li")
