"""Models, data and scripts that reproduce what the docs report."""
