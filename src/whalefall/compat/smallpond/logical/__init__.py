"""smallpond.logical: data sets, nodes, plans."""
