"""`cce-torchrec`: the command line."""
