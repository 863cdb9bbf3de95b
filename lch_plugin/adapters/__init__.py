"""Centroids in the toolkits people use: the only place that knows any of them.

Each adapter is a module or package of its own and imports no other. What they share knows no
toolkit: `structure`, which plain modules are MLPs; `passes`, gradients during one forward pass;
`arguments`, what of a call a centroid is about; `checks`, what it has to be; and `states`.
"""
