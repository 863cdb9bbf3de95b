"""What nodes score: `attribution`, heads, neurons and MLPs for a metric; `features`, features of an
SAE on centroids; `neurons`, the paper's score; `stability`, how far that depends on the draw.
"""
