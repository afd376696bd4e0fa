"""Whether a network is what an initialiser asked for, and which known mistakes it shows."""
