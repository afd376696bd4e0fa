"""What is said of a product: the fit of alpha and beta, its uncertainty, its verdict, and tables of both."""
