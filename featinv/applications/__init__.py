"""What an inverter is good for: steering, composites, posterior maps, refinement, subset inversion, layer curves."""
