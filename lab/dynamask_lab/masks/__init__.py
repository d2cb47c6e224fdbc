"""What the masks of a trained model look like."""
