"""`moiie check`: what a target makes of a model, before anything is exported; needs neither torch nor TensorRT."""
