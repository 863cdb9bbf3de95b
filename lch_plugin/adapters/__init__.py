"""Toolkits at the edge, one module each. An adapter never imports another."""
