"""The verb: features -> images."""
