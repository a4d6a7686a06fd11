"""Calls of `cce-torchrec` in the process of a test."""

from click.testing import CliRunner

from cce_torchrec.cli.main import command


def called(*words, status=0):
    """What a call prints, which ends with `status`; stdout and stderr together."""
    result = CliRunner().invoke(command, [str(word) for word in words])
    crashed = result.exception is not None and not isinstance(result.exception, SystemExit)
    if crashed:
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output
