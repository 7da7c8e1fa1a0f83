"""Quantisers: how a weight becomes few bits and scales. numpy in, numpy out; torch does the arithmetic inside.

`scheme.py` says which forms there are, `packing.py` how they lie in a bundle, `methods.py` finds a method by name.
Nothing here knows of checkpoints, recipes or files: rules and streaming belong to the weights stage.
"""
