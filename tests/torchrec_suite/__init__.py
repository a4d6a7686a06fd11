"""TorchRec's own tests, run with CCE collections in the place of TorchRec's.

`python -m tests.torchrec_suite --source TREE` takes a source tree of TorchRec and runs its tests
twice: as they are, and with CCE tables in the identity configuration (no helper, one row an id,
codes equal to ids), which have to equal plain tables. None of TorchRec's files are copied.
"""
