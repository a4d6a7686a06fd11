"""Alignment of networks and of tables, measured and estimated."""
