"""Values at hook points, computed once and read many times."""
