"""Matcher between its networks."""
