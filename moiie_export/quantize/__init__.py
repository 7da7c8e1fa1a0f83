"""Quantisation: which weights get which form (`rules.py`), and how a block of rows becomes few bits and scales.

`scheme.py` says which forms there are, `packing.py` how they lie in a bundle, `methods.py` finds a method by name: numpy
in, numpy out, torch does the arithmetic inside. `calibration.py` measures what reaches each weight, `folding.py` says
where AWQ's factors go, `islands.py` what stays float32. Reading and writing files in blocks belongs to the weights stage.
"""
