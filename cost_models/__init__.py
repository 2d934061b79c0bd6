"""What hardware takes: clusters, operations, and models that price them."""
