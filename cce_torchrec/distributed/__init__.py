"""Sharded modules and their sharders."""
