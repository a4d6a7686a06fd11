"""Unsharded modules."""
