"""Models, data and scripts that reproduce what the README reports."""
