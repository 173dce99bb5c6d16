"""Features to conditions: embeddings on the latent grid, and their dropout and masks in training."""
