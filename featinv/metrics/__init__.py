"""Metrics: how close is a reconstruction to its original, in features, in pixels and as a distribution.

Every paired function takes `(original, reconstruction)` in this order and returns a float64 per image. In the modules,
for some of them need torchmetrics, which takes a second to import.
"""
