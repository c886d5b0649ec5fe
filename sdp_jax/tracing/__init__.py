"""From the jaxpr of any function to its channels, and to the smaller function."""
