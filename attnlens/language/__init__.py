"""Language models of the project's own: a small causal transformer over bytes."""
