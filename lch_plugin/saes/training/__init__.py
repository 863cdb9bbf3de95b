"""SAELens' runners and trainer, on centroids."""
