"""PerSAM and PerSAM-F between their networks."""
