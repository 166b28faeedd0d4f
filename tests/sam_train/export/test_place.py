"""An export is there whole or not at all, and takes no one's place unasked."""

import pytest

from sam_train.export.place import check_free, write_whole


def test_what_is_there_is_refused_unless_told(tmp_path):
    file, folder = tmp_path / "sam.pth", tmp_path / "hf"
    file.write_text("old")
    folder.mkdir()
    check_free(folder, is_folder=True, overwrite=False)
    (folder / "config.json").write_text("old")

    with pytest.raises(FileExistsError, match="is there already.*overwrite=true"):
        check_free(file, is_folder=False, overwrite=False)
    with pytest.raises(FileExistsError, match="is there already"):
        check_free(folder, is_folder=True, overwrite=False)
    check_free(file, is_folder=False, overwrite=True)
    check_free(folder, is_folder=True, overwrite=True)
    check_free(tmp_path / "new", is_folder=True, overwrite=False)


def test_a_file_is_no_folder_and_a_folder_no_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(NotADirectoryError, match="this format is a folder"):
        check_free(tmp_path / "file", is_folder=True, overwrite=True)
    with pytest.raises(IsADirectoryError, match=r"say out=.*sam\.pth"):
        check_free(tmp_path, is_folder=False, overwrite=True)


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, is_folder):
    out = tmp_path / "out"
    if is_folder:
        out.mkdir()
    kept = out / "a" if is_folder else out
    kept.write_text("old")

    def broken(made):
        if is_folder:
            made.mkdir()
        (made / "a" if is_folder else made).write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(out, broken)

    assert kept.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_files_of_a_folder_are_replaced_and_others_but_the_formats_own_stay(tmp_path):
    out = tmp_path / "deep" / "out"

    def written(text):
        def write(made):
            made.mkdir()
            (made / "a").write_text(text)
            return text

        return write

    assert write_whole(out, written("first")) == "first"
    (out / "notes.md").write_text("mine")
    (out / "b").write_text("of an earlier export")
    write_whole(out, written("second"), owned=["a", "b"])

    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "a": "second",
        "notes.md": "mine",
    }
    assert list(out.parent.iterdir()) == [out]
