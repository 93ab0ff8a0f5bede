"""Files with a JSON object a line."""

import pytest

from shortv_llava.errors import ShortVError
from shortv_llava.files.json_lines import add_to_record, read_jsonl, read_record


def test_a_record_is_read_back_without_what_a_kill_cut_off(tmp_path):
    path = tmp_path / "record.jsonl"
    assert read_record(path) == []
    add_to_record(path, [{"a": 0.1 + 0.2}, {"b": "é\u2028"}])
    whole = path.read_bytes()
    assert read_record(path) == [(1, {"a": 0.1 + 0.2}), (2, {"b": "é\u2028"})]
    for torn in (b'{"c": [0.1, ', b'{"c": 1}', '{"é'.encode()[:-1]):
        path.write_bytes(whole + torn)
        assert len(read_record(path)) == 2 and path.read_bytes() == whole + torn  # who only reads changes nothing
        add_to_record(path, [{"c": 2}])
        assert path.read_bytes() == whole + b'{"c": 2}\n'
    path.write_bytes(b'{"a"')
    assert read_record(path) == []
    add_to_record(path, [{"a": 1}])
    assert read_record(path) == [(1, {"a": 1})]


def test_strangers_may_leave_out_the_last_end_of_line(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('\ufeff{"a": 1}\n\n{"b": 2}', encoding="utf-8")
    assert read_jsonl(path) == [(1, {"a": 1}), (3, {"b": 2})]


@pytest.mark.parametrize("read", [read_jsonl, read_record])
@pytest.mark.parametrize("line", ["[1]", "{", '"\\ud800"'])
def test_what_is_wrong_is_told_with_its_line(tmp_path, read, line):
    path = tmp_path / "lines.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n')
    with pytest.raises(ShortVError, match="line 2"):
        read(path)
    with pytest.raises(ShortVError, match="cannot be read"):
        (tmp_path / "folder").mkdir()
        read(tmp_path / "folder")
