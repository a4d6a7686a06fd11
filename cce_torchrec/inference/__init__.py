"""Trained tables as serving has them: packed, quantised, read-only, without Python."""
