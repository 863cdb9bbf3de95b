"""What ``lch demo`` shows of the embedded model, and how."""
