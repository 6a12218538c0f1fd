import pytest

from consistency_lens.atomic_write import atomic_file, write_json, write_text


def test_what_cannot_be_written_whole_leaves_the_old_file_and_no_other(tmp_path):
    file = tmp_path / "figures.json"
    write_json(file, {"fve": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, {"fve": float("nan")})
    with pytest.raises(OSError, match="No space left"), atomic_file(file) as stream:
        stream.write(b"half")
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"] and '"fve": 1' in file.read_text()


def test_a_file_takes_the_place_of_another(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "one")
    write_text(tmp_path / "a" / "b.txt", "two")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]
    assert (tmp_path / "a" / "b.txt").read_text() == "two"
