import pytest

from bnn_jax import files


@pytest.mark.parametrize(("binary", "content"), [(False, "grün\r\n"), (True, b"\xff")])
def test_a_file_is_replaced_when_the_whole_new_one_is_there(tmp_path, binary, content):
    path = tmp_path / "result.json"
    path.write_text("old")
    with files.replacing(path, binary=binary) as file:
        file.write(content)
        assert path.read_text() == "old"
    assert path.read_bytes() == (content if binary else content.encode())
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_old_file_stays_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), files.replacing(path) as file:
        file.write("new")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
