"""Files as people save them: read right, or one sentence that says what is wrong and what to type."""

import gzip
import json

import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest

from rlhf_trl import data
from rlhf_trl.data.file_rows import read_file, resolve_paths
from rlhf_trl.data.rows import RowError
from rlhf_trl.errors import DataError

ROWS = [{"prompt": f"q; {i}", "completion": 'a,\t"é"\nb'} for i in range(3)]


def table(separator: str) -> str:
    quoted = [[row[name].replace('"', '""') for name in row] for row in ROWS]
    return "\n".join([separator.join(ROWS[0]), *(separator.join(f'"{value}"' for value in row) for row in quoted)])


LAYOUTS = {
    "semicolons.csv": table(";"),
    "tabs.csv": table("\t"),
    "tabs.tsv": table("\t"),
    "commas.tsv": table(","),
    "quoted.csv": table(";").replace("prompt;completion", '"prompt";"completion"'),
    "spreadsheet.csv": "\ufeff" + "\r\n".join(["prompt, completion,,", *(f'"q; {i}",a,,' for i in range(3))]),
    "wrapped.json": json.dumps({"version": 1, "tags": ["x"], "data": ROWS}),
    "wrapped_pretty.json": json.dumps({"version": 1, "rows": ROWS}, indent=2),
    "wrapped_pretty.jsonl": json.dumps({"data": ROWS}, indent=2),
    "list.jsonl": json.dumps(ROWS),
    "list_pretty.jsonl": json.dumps(ROWS, indent=2),
    "lines_pretty.jsonl": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "columns.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    "pandas.json": pandas.DataFrame(ROWS).to_json(),
    "lines.json": "\n".join(map(json.dumps, ROWS)),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True])
def test_layouts_are_told_by_what_the_file_holds(tmp_path, name, packed):
    content = LAYOUTS[name].encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)  # under a plain name
    rows = [row for _, row in read_file(str(tmp_path / name))]
    expected = ROWS if name != "spreadsheet.csv" else [{**row, "completion": "a"} for row in ROWS]
    assert rows == expected


def test_what_was_not_plain_is_said(tmp_path, capsys):
    for name in ("semicolons.csv", "tabs.tsv", "wrapped.json", "columns.json"):
        (tmp_path / name).write_text(LAYOUTS[name])
        list(read_file(str(tmp_path / name)))
    said = capsys.readouterr().out.replace(f"{tmp_path}/", "").splitlines()
    assert said == [
        "data: the values of semicolons.csv are separated by `;`, as its first line is",
        "data: the values of tabs.tsv are separated by tabs, as its first line is",
        "data: the rows of wrapped.json are those of `data` in it",
        "data: columns.json holds columns as lists, of which rows were made",
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"dialog": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"prompt": "a", "tools": [{"name": "f"}]},
        {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_one_row_is_no_list_of_rows(tmp_path, row, indent):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(row, indent=indent))
    assert list(read_file(str(path))) == [(f"{path}, line 1", row)]


def problem(path) -> str:
    """Return the one thing that is wrong with a file."""
    (found,) = [(place, row) for place, row in read_file(str(path)) if isinstance(row, RowError)]
    place, row = found
    return f"{place.removeprefix(str(path))}: {row.field} {row.what}" + (" (fatal)" if row.fatal else "")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "a", "prompt": "b"}', "prompt is there twice. Give one of the two another name"),
        ('{"prompt": "a", "info": [{"k": 1, "k": 2}]}', "info holds an object with the key `k` twice"),
        ('{"prompt": "a", "info": {"x": ["\\ud83d"]}}', "info holds half of a surrogate pair, which is no text"),
        ('{"prompt": "\\udc00"}', "prompt holds half of a surrogate pair, which is no text"),
        ('{"prompt": "a", "n": ' + "9" * 5000 + "}", "None holds a number of too many digits"),
        ('{"prompt": ' + "[" * 200 + "]" * 200 + "}", "prompt is nested more than 100 deep"),
        ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "None is nested too deeply"),
        ('{"prompt": "a"} {"prompt": "b"}', "None isn't valid JSON (Extra data, column 17)"),
    ],
)
def test_a_bad_line_is_one_bad_row(tmp_path, line, expected):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(['{"prompt": "a"}', line, '{"prompt": "c"}']))
    assert problem(path) == f", line 2: {expected}"
    kept = data.load_files("prompt", 0, str(path), bad_rows="drop")["train"]
    assert kept["prompt"][:] == ["a", "c"]
    # The same as the first line, and in a list
    path.write_text("\n".join([line, '{"prompt": "c"}']))
    assert problem(path) == f", line 1: {expected}"
    if expected.startswith(("prompt", "info")):
        path.write_text(f'[\n{{"prompt": "a"}},\n{line}\n]')
        assert problem(path) == f", row 2: {expected}"


def test_a_key_and_a_pair_of_surrogates_that_are_whole_stay(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "\\ud83d\\ude00", "a": {"prompt": 1}}\n{"prompt": "b", "a": {"x": {"x": 1}}}')
    assert [row for _, row in read_file(str(path))] == [
        {"prompt": "\U0001f600", "a": {"prompt": 1}},
        {"prompt": "b", "a": {"x": {"x": 1}}},
    ]


def test_files_that_are_wrong_as_a_whole(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion, completion\na,b,c\n")
    twice = "completion is the name of two columns. Give one of them another name (fatal)"
    assert problem(path) == f", line 1: {twice}"
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    names = ["prompt", "completion", "completion"]
    pa.parquet.write_table(pa.Table.from_arrays(columns, names=names), tmp_path / "a.parquet")
    assert problem(tmp_path / "a.parquet") == f": {twice}"

    path = tmp_path / "a.json"
    path.write_text('{\n"data": [\n{"prompt": "a"},\n{"prompt" "b"}\n]}')
    assert problem(path) == ", line 4: None isn't valid JSON (Expecting ':' delimiter, column 11) (fatal)"
    path.write_text('{"data": [{"prompt": "a"}],\n"data": [{"prompt": "b"}]}')
    assert problem(path) == ", line 1: data is there twice. Give one of the two another name"
    path.write_text(json.dumps({"train": ROWS, "test": ROWS}))
    with pytest.raises(DataError, match="several lists of rows, `train`, `test`. Save each as a file of its own, and"):
        list(read_file(str(path)))
    path.write_text(json.dumps({"prompt": ["a", "b"], "completion": ["c", "d", "e"]}))
    with pytest.raises(DataError, match="differ in length: `prompt` 2, `completion` 3"):
        list(read_file(str(path)))
    path.write_bytes("[]".encode("utf-16"))
    with pytest.raises(DataError, match="is text in UTF-16, and UTF-8 is read. Save it as UTF-8."):
        list(read_file(str(path)))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 10_000)[:-20])
    assert problem(path).endswith("(fatal)") and "is a damaged gzip file (" in problem(path)
    path.write_text('{"prompt": "a"}')  # isn't compressed, whatever its name says
    assert [row for _, row in read_file(str(path))] == [{"prompt": "a"}]


def test_paths_that_can_not_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a[1].jsonl").write_text("{}")
    assert resolve_paths("a[1].jsonl") == ["a[1].jsonl"]
    (tmp_path / "link.jsonl").symlink_to("nothing.jsonl")
    with pytest.raises(DataError, match="`data.paths`: `link.jsonl` is a link to no file."):
        resolve_paths("*.jsonl")
    for paths in (5, None, ["a", 5]):
        with pytest.raises(DataError, match=r"where files should be. Set `data.paths=\[FILE,...\]`"):
            resolve_paths(paths)


def test_the_columns_of_alpaca(tmp_path, capsys):
    path = tmp_path / "alpaca.jsonl"
    rows = [
        {"instruction": "Sum", "input": "1 and 2", "output": "3"},
        {"instruction": "Hi", "input": "", "output": "Oh"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    loaded = data.load_files("prompt_completion", 0, str(path))["train"].to_list()
    assert loaded == [{"prompt": "Sum\n1 and 2", "completion": "3"}, {"prompt": "Hi", "completion": "Oh"}]
    said = capsys.readouterr().out
    assert "`data.columns.prompt=NAME` says otherwise (2 rows)" in said
    assert "`input` came below its `instruction` (1 rows)" in said and "columns dropped" not in said
    prompts = data.load_files("prompt", 0, str(path))["train"].to_list()  # a reward function may read the rest
    assert prompts[0] == {"prompt": "Sum\n1 and 2", "input": "1 and 2", "output": "3"}
    pairs = [{"instruction": "Sum", "input": "1 and 2", "chosen": "3", "rejected": "4"}]
    path.write_text("\n".join(map(json.dumps, pairs)))
    loaded = data.load_files("preference", 0, str(path))["train"].to_list()
    assert loaded == [{"prompt": "Sum\n1 and 2", "chosen": "3", "rejected": "4"}]


def test_columns_that_no_format_has_say_what_to_type(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,answer\na,b\n")
    with pytest.raises(DataError) as caught:
        data.load_files("prompt_completion", 0, str(path))
    assert "Set `data.columns.prompt=NAME data.columns.completion=NAME` to say which" in str(caught.value)
    assert "If the file has no header, give it one: its first line is read as" in str(caught.value)


def test_integers_of_any_size_are_exact(tmp_path):
    path = tmp_path / "a.jsonl"
    numbers = [1, 2**63, -(2**70), [2**64, 1], {"n": 2**65}]
    for number in numbers:
        rows = [{"prompt": "a", "answer": number}, {"prompt": "b", "answer": type(number)()}]
        path.write_text("\n".join(map(json.dumps, rows)))
        assert list(data.load_files("prompt", 0, str(path))["train"]) == rows
    # Beyond the first batch of rows
    rows = [{"prompt": f"{i}", "answer": i} for i in range(1200)] + [{"prompt": "last", "answer": 2**64}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert list(data.load_files("prompt", 0, str(path))["train"]) == rows
