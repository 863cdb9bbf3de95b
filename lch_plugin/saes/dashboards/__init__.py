"""What single features are about."""
