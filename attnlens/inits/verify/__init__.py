"""Whether a network is what an initialiser requested, and which known mistakes it shows."""
