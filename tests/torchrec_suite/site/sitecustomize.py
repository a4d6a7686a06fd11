"""Loaded by every Python process of a run: ranks that a test starts substitute as pytest does."""

import os

if "CCE_SUITE_SOURCE" in os.environ:
    from tests.torchrec_suite.rewriting import install

    install(os.environ["CCE_SUITE_SOURCE"], substitute=os.environ["CCE_SUITE_SUBSTITUTE"] == "1")
