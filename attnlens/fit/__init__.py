"""From inspected products to parameters: the parameter file, its figures, and the distance between two models."""
