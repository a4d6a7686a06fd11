"""Options from a file in YAML, from the command line, and what a run's folder says of them."""

import os
from unittest import mock

import pytest
from click.testing import CliRunner

from cce_torchrec.cli.main import command
from cce_torchrec.train import config_file, options, run_folder
from cce_torchrec.yaml_files import read_yaml

CALL = ("resume", "overwrite")


def parsed(tmp_path, text, *words):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return options.parse(["--config", str(file), *words])


def run_settings(args):
    return {name: value for name, value in vars(args).items() if name not in CALL}


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        parsed(*arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_file_and_the_command_line_give_the_same_run(tmp_path):
    words = (
        "--dataset table --data a.parquet --label y --categorical a,b --hash-size 50 --ids hash "
        "--table-bytes 1000 --lr 1e-3 --joint no --finalize --epochs 3 --validation-fraction 0.25"
    )
    text = (
        "dataset: table\ndata: a.parquet\nlabel: y\ncategorical: [a, b]\nhash-size: 50\nids: hash\n"
        "table_bytes: 1000\nlr: 1e-3\njoint: no\nfinalize: true\nepochs: 3\n"
        "validation_fraction: 0.25\nseed:\n"
    )
    assert vars(parsed(tmp_path, text)) == vars(options.parse(words.split()))


def test_the_command_line_wins_and_says_so(tmp_path, capsys):
    args = parsed(tmp_path, "lr: 0.5\nepochs: 3\nseed: 4\n", "--lr", "0.25", "--seed", "4")
    assert (args.lr, args.epochs, args.seed) == (0.25, 3, 4)
    said = capsys.readouterr().err
    assert "--lr 0.25 is taken, not 0.5 as" in said and "seed" not in said


def test_a_budget_of_the_command_line_is_taken_alone(tmp_path, capsys):
    args = parsed(tmp_path, "num_rows: 8\n", "--table-bytes", "1000")
    assert (args.num_rows, args.table_bytes) == (None, 1000)
    assert "--table-bytes is taken, not --num-rows 8" in capsys.readouterr().err


def test_one_rank_says_what_wins(tmp_path, capsys):
    with mock.patch.dict(os.environ, RANK="1"):
        parsed(tmp_path, "lr: 0.5\n", "--lr", "0.25")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("clusterngs: 3", "unknown option 'clusterngs'; did you mean 'clusterings'?"),
        ("7: 3", "unknown option 7"),
        ("resume: true", "--resume is for the command line only"),
        ("epochs: 2.5", "epochs: '2.5' is not a valid integer"),
        ("epochs: true", "epochs: 'yes' is not a valid integer"),
        ("epochs: [2, 3]", "epochs: '2,3' is not a valid integer"),
        ("epochs: {a: 1}", "epochs is dict, and has to be one value"),
        ("finalize: 1", "finalize is 1; write true or false"),
        ("method: cee", "method: 'cee' is not one of"),
        ("lr: fast", "lr: 'fast' is not a valid float"),
        ("batch-size: 1\nbatch_size: 2", "batch_size stands there in two spellings"),
        ("lr: 1\nlr: 2", "line 2 is no YAML that can be read: the key 'lr' stands twice"),
        ("num_rows: 1\ncompression: 2", "--compression: not allowed with argument --num-rows"),
        ("- lr", "options are lines `name: value`, which these are not"),
        ("lr: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("lr: &a 1\nseed: *a", "aliases are refused"),
        ("epochs: 0", "--epochs 0 must be at least 1"),
    ],
)
def test_a_bad_file_is_refused_in_a_sentence(text, said, tmp_path, capsys):
    found = refused(capsys, tmp_path, text)
    assert said in found and "Traceback" not in found


def test_files_that_are_no_text_or_not_there(tmp_path, capsys):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for file, said in (("none", "No such file"), ("bytes", "is no text"), (".", "directory")):
        with pytest.raises(SystemExit):
            options.parse(["--config", str(tmp_path / file)])
        assert said in capsys.readouterr().err


def test_an_empty_file_changes_nothing(tmp_path):
    assert vars(parsed(tmp_path, "# nothing\n")) == vars(options.parse([]))


def claimed(folder, *words):
    args = options.parse(list(words))
    args.out = folder
    run_folder.claim(args)
    return args


def test_a_run_leaves_the_configuration_that_repeats_it(tmp_path):
    args = claimed(tmp_path / "run", "--lr", "0.1", "--num-rows", "4", "--finalize")
    again = options.parse(["--config", str(tmp_path / "run" / "config.yaml")])
    again.out = args.out
    assert run_settings(again) == run_settings(args)


def test_a_folder_keeps_the_run_of_one_configuration(tmp_path):
    claimed(tmp_path, "--lr", "0.1")
    claimed(tmp_path, "--lr", "0.1", "--pipeline", "none")
    for more in ([], ["--resume"]):
        with pytest.raises(ValueError, match=r"--lr was 0\.1 and is 0\.2; give another --out"):
            claimed(tmp_path, "--lr", "0.2", *more)
    claimed(tmp_path, "--lr", "0.2", "--overwrite")
    assert read_yaml(tmp_path / "config.yaml")["lr"] == 0.2


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/run cannot be written"):
        claimed(tmp_path / "file" / "run")


def test_ranks_are_started_with_the_options_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)  # which other tests may have set
    (tmp_path / "c.yaml").write_text("lr: 0.5\n")
    words = ["--config", str(tmp_path / "c.yaml"), "--finalize", "--seed", "-3"]
    with (
        mock.patch("os.execv") as execv,
        mock.patch("cce_torchrec.train.run.run", return_value=None),
    ):
        CliRunner().invoke(command, ["train", *words, "--nproc-per-node", "2"])
    started = execv.call_args.args[1]
    assert started[started.index("--nproc-per-node") + 1] == "2"
    rest = started[started.index("cce_torchrec.train") + 1 :]
    assert vars(options.parse(rest)) == vars(options.parse(words))


def test_a_rank_starts_no_ranks():
    with mock.patch.dict(os.environ, RANK="0"):
        result = CliRunner().invoke(command, ["train", "--nproc-per-node", "2"])
    assert result.exit_code == 2 and "torchrun has started" in result.output


def test_help_of_train_says_every_option_and_its_default():
    text = CliRunner().invoke(command, ["train", "--help"], terminal_width=200).output
    for name in config_file.names():
        assert config_file.option_name(name) in text
