"""One LightningModule, its callbacks, caches and checkpoints."""
