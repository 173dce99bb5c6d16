"""The frozen prior, its controlled UNet, the loss, guidance and samplers."""
