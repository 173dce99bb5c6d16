"""What a network looks at and what it misses: saliency maps, adversarial examples, dead channels, leak check."""
