"""Codes of ids and hashes of codes: how they are stored, computed and saved."""
