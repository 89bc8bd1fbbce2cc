"""GF-SAM between its networks."""
