"""Offline work on many items, shared among processes and machines; what is finished stays finished. No torch."""
