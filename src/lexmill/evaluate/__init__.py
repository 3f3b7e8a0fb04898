"""How good a model is: loss and bits per byte on held-out text, accuracy of its replies."""
