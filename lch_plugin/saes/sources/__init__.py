"""What SAEs are trained on: models with hook points, texts, images, rows of any model."""
