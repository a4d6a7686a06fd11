"""Tables that cannot be read: what the message names, and that nothing is left behind."""

import json
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cce_torchrec.data import Share, TableDataset, TableOptions, load
from cce_torchrec.data.kept_scan import FILE
from cce_torchrec.train import data_options, options
from tests.support.tables import FLAT, OPTIONS, frame, write_criteo, write_csv, write_parquet

WRITERS = {"a.parquet": write_parquet, "a.csv": write_csv, "a.tsv": write_csv}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    for name, least in (("PIECE_ROWS", 100), ("BLOCK_ROWS", 70)):
        monkeypatch.setattr(f"cce_torchrec.data.parquet_files.{name}", least)
    for name in ("_PIECE_BYTES", "_LINE_BYTES"):
        monkeypatch.setattr(f"cce_torchrec.data.text_files.{name}", 2000)


def refused(path, folder, message, **changes):
    """`path` is refused with these words, and the folder of the run stays as it was."""
    given = TableOptions(**{**FLAT, **changes}, folder=folder / "run")
    with pytest.raises(ValueError, match=message):
        TableDataset(path, given)
    assert not (folder / "run").exists()


def written(folder, name, rows):
    return WRITERS[name](folder / name, rows)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    "missing, message",
    [
        ({"label": "clicked"}, r"\['clicked'\]; it has .*nearest: 'click' for"),
        ({"dense": ("PRICE",)}, r"\['PRICE'\]; .*nearest: 'price' for 'PRICE'"),
        ({"dense": ("prise", "ages")}, r"\['prise', 'ages'\].*'price' for 'prise', 'age' for"),
        ({"categorical": ("User",)}, r"\['User'\]; .*nearest: 'user' for 'User'"),
    ],
)
def test_missing_columns(tmp_path, name, missing, message):
    refused(
        written(tmp_path, name, frame(20)), tmp_path, f"{name} lacks columns {message}", **missing
    )


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("row", [0, 57, 349])
@pytest.mark.parametrize(
    "column, value, message",
    [
        ("click", 2, "the label is 2; it has to be 0 or 1"),
        ("click", 0.5, "the label is 0.5"),
        ("click", np.nan, "the label is missing"),
        ("user", -3, r"the id -3 .*is negative"),
        ("user", np.nan, "the id is missing; integers are ids as they are"),
        ("user", 7.25, "no integer"),
        ("price", np.inf, "the value is infinite"),
    ],
)
def test_bad_values(tmp_path, name, row, column, value, message):
    rows = frame(350)
    rows[column] = rows[column].astype("float64")
    rows.loc[row, column] = value
    if name != "a.parquet" and column == "user":  # of text files whole numbers as text
        rows[column] = rows[column].map(lambda x: "" if np.isnan(x) else f"{x:g}")
        if row < 100 and value == 7.25:
            return  # the first rows say that it is a column of text
    path = written(tmp_path, name, rows)
    refused(path, tmp_path, rf"{name}, row {row + 1}, column '{column}': .*{message}")


@pytest.mark.parametrize("row", [0, 99, 349])
@pytest.mark.parametrize("column, value", [("click", "yes"), ("price", "12,5"), ("age", "NA")])
def test_unparsable_text(tmp_path, row, column, value):
    rows = frame(350).astype({column: object})
    rows.loc[row, column] = value
    path = write_csv(tmp_path / "a.tsv", rows)
    path.write_text(path.read_text().replace("\n", "\n\n", 5))  # empty lines are no rows
    refused(path, tmp_path, rf"row {row + 1}, column '{column}': '{value}' is no number")


@pytest.mark.parametrize("row", [1, 200, 350])
@pytest.mark.parametrize("line", ["1,2,3", "1,2,3,4,5,6,7"])
def test_rows_of_other_lengths(tmp_path, row, line):
    path = write_csv(tmp_path / "a.csv", frame(350))
    lines = path.read_text().splitlines()
    lines[row] = line
    path.write_text("\n".join(lines) + "\n")
    refused(path, tmp_path, rf"a.csv(, row {row}: \d+ values, and the table has 5| cannot be read)")


@pytest.mark.parametrize("position, value, message", [(0, -1, "negative"), (2, None, "missing")])
def test_bad_values_in_lists(tmp_path, position, value, message):
    rows = frame(350)
    rows.at[211, "tags"] = [*[1] * position, value, 3]
    path = write_parquet(tmp_path / "a.parquet", rows)
    refused(path, tmp_path, rf"row 212, column 'tags': the id .*{message}", **OPTIONS)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda f: f / "none.csv", "none.csv does not exist"),
        (lambda f: f, r"the folder .* has no \*.parquet, .*; it holds nothing"),
        (lambda f: text(f / "empty.csv", ""), "empty.csv is empty"),
        (lambda f: text(f / "empty.parquet", ""), "empty.parquet is no parquet file"),
        (lambda f: text(f / "a.csv", "click,user\n"), "no rows"),
        (lambda f: written(f, "a.parquet", frame(0)), "no rows"),
        (lambda f: text(f / "a.csv.gz", "x"), "a.csv.gz ends in '.gz'.*unpack"),
        (lambda f: text(f / "a.csv", "user,user\n1,2\n"), r"more than one column .*\['user'\]"),
        (lambda f: text(f / "a.csv", "\x00" * 5000), "lacks columns|UTF-8|more than"),
        (
            lambda f: text(f / "a.csv", "click,user\r1,2\r"),
            r"a.csv: lines end in a carriage return",
        ),
        (lambda f: doubled(f / "a.parquet"), r"a.parquet has more than one column .*\['user'\]"),
    ],
)
def test_files_that_are_none(tmp_path, make, message):
    rest = {"dense": (), "categorical": ("user",)}
    (tmp_path / "data").mkdir()
    refused(make(tmp_path / "data"), tmp_path, message, **rest)


def doubled(path):
    rows = [pa.array([0, 1]), pa.array([1, 2]), pa.array([3, 4])]
    pq.write_table(pa.Table.from_arrays(rows, names=["click", "user", "user"]), path)
    return path


def text(path, content):
    path.write_text(content)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("row", [1, 57, 350])
@pytest.mark.parametrize(
    "item", ['"open', '"broken\nline"', '"a ""b'], ids=["open", "line", "twice"]
)
def test_quotes_that_go_on_over_the_end_of_a_line(tmp_path, name, row, item):
    path = written(tmp_path, name, frame(350))
    separator = "," if name == "a.csv" else "\t"
    lines = path.read_text().splitlines()
    values = lines[row].split(separator)
    # Of the next rows they would make the text of one value, and nobody would miss them.
    values[-1] = item
    lines[row] = separator.join(values)
    path.write_text("\n".join(lines) + "\n")
    refused(path, tmp_path, f"{name}, row {row}: a quote is not closed in its line")


@pytest.mark.parametrize("row", [1, 57, 350])
def test_a_quote_that_leaves_too_few_values(tmp_path, row):
    path = written(tmp_path, "a.csv", frame(350))
    lines = path.read_text().splitlines()
    lines[row] = '"' + lines[row]  # which makes one value of the whole line, and of more
    path.write_text("\n".join(lines) + "\n")
    refused(path, tmp_path, f"a.csv, row {row}: a quote is not closed in its line")


def test_quotes_inside_of_values(tmp_path):
    items = ["plain", '"with ""two"""', '"a, comma"', '5" screen', '""'] * 70
    lines = [f"{i % 2},1,2,{i},{item}" for i, item in enumerate(items)]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["click,price,age,user,item", *lines, "", "\r"]))
    dataset = TableDataset(path, TableOptions(**FLAT, folder=tmp_path / "run"))
    # An id more stands for those that were never seen, and for what is missing.
    assert dataset.features == {"user": len(items), "item": 4 + 1}
    assert dataset.num_train + dataset.num_validation == len(items)


@pytest.mark.parametrize("column", ["click", "price"])
def test_truth_values_in_text(tmp_path, column):
    rows = frame(350)
    truth = rows[column] > rows[column].median() - 0.5
    numbers, texts = rows.copy(), rows.copy()
    numbers[column], texts[column] = truth.astype(int), truth
    held_out = write_csv(tmp_path / "held_out.csv", numbers)
    made = [
        TableDataset(write_csv(tmp_path / name, own), TableOptions(**FLAT, validation=held_out))
        for name, own in (("numbers.csv", numbers), ("texts.csv", texts))
    ]
    found = [dataset.in_memory().train for dataset in made]
    one, other = (rows.take(rows.ids[:, 0].argsort()) for rows in found)  # by the user
    assert torch.equal(one.labels, other.labels) and torch.equal(one.dense, other.dense)
    texts[column] = texts[column].astype(object)
    texts.loc[7, column] = "perhaps"
    refused(write_csv(tmp_path / "b.csv", texts), tmp_path,
            f"b.csv, row 8, column '{column}': 'perhaps' is no number")  # fmt: skip


@pytest.mark.parametrize(
    ("path", "message"),
    [("", "the path of the data is empty"), (os.devnull, "is neither a file nor a folder")],
)
def test_paths_of_no_data(tmp_path, path, message):
    refused(path, tmp_path, message)


@pytest.mark.parametrize("row", [1, 120, 350])
def test_text_that_is_not_utf_8(tmp_path, row):
    path = write_csv(tmp_path / "a.csv", frame(350))
    lines = path.read_bytes().splitlines()
    lines[row] = lines[row].replace(b"item", b"\xe9t\xe9")
    path.write_bytes(b"\r\n".join(lines))
    refused(path, tmp_path, rf"a.csv, row {row} or after: it cannot be read as UTF-8")


def test_a_folder_of_other_files(tmp_path):
    (tmp_path / "data").mkdir()
    text(tmp_path / "data" / "readme.md", "x")
    text(tmp_path / "data" / "_SUCCESS", "")
    refused(tmp_path / "data", tmp_path, "it holds readme.md")
    write_csv(tmp_path / "data" / "a.csv", frame(20))
    write_parquet(tmp_path / "data" / "b.parquet", frame(20))
    refused(tmp_path / "data", tmp_path, r"kinds \['.csv', '.parquet'\]; give a folder of one")


@pytest.mark.parametrize(
    "column, other, message",
    [
        (
            "user",
            lambda c: c.astype(str),
            r"'user' holds text in .*2.parquet and integers in files",
        ),
        (
            "item",
            lambda c: range(len(c)),
            r"'item' holds integers in .*2.parquet and text in files",
        ),
        (
            "user",
            lambda c: [[i] for i in c],
            r"2.parquet: column 'user' is list<.*integers or text",
        ),
        ("user", pd.to_datetime, r"2.parquet: column 'user' is timestamp"),
        (
            "age",
            lambda c: [[i] for i in c],
            r"2.parquet, row 1, column 'age': values are list<.*numbers is needed",
        ),
    ],
)
def test_mixed_files(tmp_path, column, other, message):
    (tmp_path / "data").mkdir()
    rows = frame(100)
    write_parquet(tmp_path / "data" / "1.parquet", rows)
    rows[column] = other(rows[column])
    write_parquet(tmp_path / "data" / "2.parquet", rows)
    refused(tmp_path / "data", tmp_path, message)


def test_a_column_without_values_is_of_any_type(tmp_path):
    rows = frame(100)
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "2.parquet", rows)
    rows["item"], rows["tags"] = None, None
    write_parquet(tmp_path / "data" / "1.parquet", rows)
    dataset = TableDataset(tmp_path / "data", TableOptions(**OPTIONS))
    assert dataset.num_train + dataset.num_validation == 200 and dataset.features["item"] > 20


def test_ids_too_large_for_a_table(tmp_path):
    rows = frame(50)
    rows["user"] += 2**40
    path = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(ValueError, match=r"'user' has the id 1099511627825.*vocabulary, or hash"):
        TableDataset(path, TableOptions(**FLAT))


def test_files_to_validate_on(tmp_path):
    rows = frame(50)
    path = write_csv(tmp_path / "a.csv", rows)
    lacks = write_csv(tmp_path / "b.csv", rows.rename(columns={"click": "clicked"}))
    refused(path, tmp_path, r"b.csv lacks columns \['click'\]", validation=str(lacks))
    rows["user"] = rows["item"]
    text_ = write_csv(tmp_path / "c.csv", rows)
    refused(path, tmp_path, r"\['user'\] hold text in one", validation=str(text_))
    bad = write_csv(tmp_path / "d.csv", frame(50).assign(click=3))
    refused(path, tmp_path, "d.csv, row 1, column 'click': the label is 3", validation=str(bad))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_fractions(fraction):
    with pytest.raises(ValueError, match=rf"validation_fraction {fraction} is not between 0 and 1"):
        TableOptions(**FLAT, validation_fraction=fraction)


@pytest.mark.parametrize(
    "fraction, message", [(1e-6, "0 that validate"), (0.999999, ": 0 rows to")]
)
def test_parts_without_rows(tmp_path, fraction, message):
    path = write_parquet(tmp_path / "a.parquet", frame(30))
    with pytest.raises(ValueError, match=message):
        TableDataset(path, TableOptions(**FLAT, validation_fraction=fraction))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"categorical": ()}, "no categorical column and no sequence"),
        ({"dense": ("user",)}, r"columns \['user'\] are named twice"),
        ({"categorical": ("click",)}, r"columns \['click'\] are named twice"),
        ({"compressed": ("price",)}, r"\['price'\] are no features"),
        ({"ids": "plain"}, "ids='plain'; choose one of"),
        ({"hash_size": 1}, "hash_size 1 must be 2 or more"),
        ({"shuffle_rows": 0}, "shuffle_rows 0 must be 1 or more"),
    ],
)
def test_options(changes, message):
    with pytest.raises(ValueError, match=message):
        TableOptions(**{**FLAT, **changes})


def test_a_vocabulary_of_other_data(tmp_path):
    path, run = write_parquet(tmp_path / "a.parquet", frame(100)), tmp_path / "run"
    TableDataset(path, TableOptions(**FLAT, folder=run))
    write_parquet(path, frame(100, seed=1))
    with pytest.raises(ValueError, match=rf"{FILE} is of other data \(files were .*a.parquet"):
        TableDataset(path, TableOptions(**FLAT, folder=run, resumes=True))
    other = TableOptions(**{**FLAT, "dense": ()}, folder=run, split_seed=3, resumes=True)
    with pytest.raises(ValueError, match=r"dense were \['price', 'age'\], are \[\]; split were"):
        TableDataset(path, other)
    TableDataset(path, TableOptions(**FLAT, folder=run))  # a new run has its own
    TableDataset(path, TableOptions(**FLAT, folder=run, resumes=True))
    (run / FILE).write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=rf"{FILE} cannot be read .* remove it"):
        TableDataset(path, TableOptions(**FLAT, folder=run))


def test_a_vocabulary_that_the_disk_has_no_room_for(tmp_path, monkeypatch):
    path, run = write_parquet(tmp_path / "a.parquet", frame(100)), tmp_path / "run"

    def full(table, file):
        file.write(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cce_torchrec.data.kept_scan.pq.write_table", full)
    with pytest.raises(ValueError, match=rf"{FILE} cannot be written .*No space left"):
        TableDataset(path, TableOptions(**FLAT, folder=run))
    assert not list(run.iterdir())


def test_a_vocabulary_that_is_damaged(tmp_path):
    """Another key is another id: parquet itself reads it, and would train other rows."""
    path, run = write_parquet(tmp_path / "a.parquet", frame(100)), tmp_path / "run"
    options = TableOptions(**{**FLAT, "ids": "vocabulary"}, folder=run)
    TableDataset(path, options)
    kept = pq.read_table(run / FILE)
    keys = kept["key"].to_numpy().copy()
    keys[3] += 1
    pq.write_table(kept.set_column(1, "key", [keys]), run / FILE)
    with pytest.raises(ValueError, match=rf"{FILE} cannot be read \(its checksum differs\)"):
        TableDataset(path, options)
    entry = json.loads(kept.schema.metadata[b"cce_torchrec"])
    entry["train"][0] += 1
    pq.write_table(kept.replace_schema_metadata({"cce_torchrec": json.dumps(entry)}), run / FILE)
    with pytest.raises(ValueError, match=rf"{FILE} cannot be read \(its checksum differs\)"):
        TableDataset(path, options)
    (run / FILE).unlink()
    os.mkfifo(run / FILE)  # to read it would not end
    with pytest.raises(ValueError, match=rf"{FILE} cannot be read \(it is no file\)"):
        TableDataset(path, options)


def test_criteo_s_test_file_has_no_labels(tmp_path):
    path = write_criteo(tmp_path / "test.txt")
    lines = [line.partition("\t")[2] for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"row 1: 39 values, and the table has 40 columns"):
        TableDataset(path, data_options.criteo_options())


def test_a_file_that_shrinks_meanwhile(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", frame(300))
    dataset = TableDataset(path, TableOptions(**FLAT))
    write_parquet(path, frame(100))
    with pytest.raises(ValueError, match=r"fewer rows than it had|cannot be read"):
        list(dataset.batches(Share(batch_size=32), seed=0, epoch=1))


@pytest.mark.parametrize(
    "words, message",
    [
        ("--dataset table", "give --data a file or a folder"),
        ("--dataset criteo", "give --data a file or a folder"),
        ("--dataset table --data a", "--label names the column"),
        ("--dataset table --data a --label b", "--categorical or --sequence names"),
        ("--dataset table --data a --label b --categorical b", "are named twice"),
        ("--dataset criteo --data a --label b", "--label: --dataset criteo has columns of its own"),
        ("--ids hash --dense a", "--dense, --ids: --dataset flights has columns"),
        ("--dataset criteo --data a --validation-fraction 1", "is not between 0 and 1"),
        (
            "--dataset criteo --data a --hash-size 9",
            "--hash-size 9: no ids are hashed; give --ids hash, or leave it out",
        ),
        (
            "--dataset criteo --data a --validation b --validation-fraction .2",
            "--validation-fraction is of the rows of --data",
        ),
    ],
)
def test_options_of_the_program(words, message, capsys):
    with pytest.raises(SystemExit):
        options.parse(words.split())
    assert message in capsys.readouterr().err


def test_without_pyarrow(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"by pyarrow, which is not installed; pip install"):
        load("table", "a.csv", "dlrm", 0, TableOptions(**FLAT))
