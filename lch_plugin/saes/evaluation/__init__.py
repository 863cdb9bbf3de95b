"""What an SAE on centroids is worth."""
