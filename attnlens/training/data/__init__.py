"""The data of a comparison: read, held on the device, augmented, and served in an order of its own for every seed."""
