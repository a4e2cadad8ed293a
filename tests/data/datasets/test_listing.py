# SPDX-License-Identifier: Apache-2.0
"""Folders and lists of images, and each mistake in them told in one sentence."""

import os
from collections.abc import Sequence
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from balpoe_jax.data.datasets.listing import Listing, read_class_names, read_folder, read_lists
from balpoe_jax.data.datasets.splitting import divide
from balpoe_jax.errors import UserError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_folder_of_classes(tmp_path: Path) -> None:
    """Sorted by class and name; other files, hidden ones and those of no class are passed over."""
    touch(
        tmp_path,
        *("owl/b.jpg", "owl/a.PNG", "owl/deep/c.webp", "owl/notes.txt", "owl/.hidden.jpg"),
        *("ant/z.bmp", "ant/.thumbs/y.jpg", "readme.md", ".git/x.jpg"),
    )
    found = read_folder(str(tmp_path))
    assert found.class_names == ("ant", "owl")
    assert found.names == ("ant/z.bmp", "owl/a.PNG", "owl/b.jpg", "owl/deep/c.webp")
    np.testing.assert_array_equal(found.labels, [0, 1, 1, 1])
    assert set(found.splits) == {""} and found.root == str(tmp_path)


def test_names_of_files_may_be_any_bytes_and_those_of_classes_text(tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff\xfe")
    touch(tmp_path / "a", f"ant/{odd}.png", "owl/1.png")
    listing = read_folder(str(tmp_path / "a"))
    assert listing.names == (f"ant/{odd}.png", "owl/1.png")
    assert len(divide(listing, 0.5, 0.1).train) > 0
    touch(tmp_path / "b", "ant/1.png", f"{odd}/1.png")
    with pytest.raises(UserError, match=r"should be text in UTF-8, and '.udcff.udcfe' in .* is no"):
        read_folder(str(tmp_path / "b"))


def test_a_folder_of_splits(tmp_path: Path) -> None:
    touch(tmp_path, "train/owl/a.jpg", "train/ant/b.jpg", "Validation/ant/c.jpg", "test/owl/d.jpg")
    found = read_folder(str(tmp_path))
    by_name = dict(zip(found.names, found.splits, strict=True))
    assert by_name == {
        "train/owl/a.jpg": "train", "train/ant/b.jpg": "train",
        "Validation/ant/c.jpg": "val", "test/owl/d.jpg": "test",
    }  # fmt: skip
    assert found.class_names == ("ant", "owl")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    """A folder with images and no folders in it is a class, whatever its name."""
    found = read_folder(str(touch(tmp_path, "train/a.jpg", "plane/b.jpg")))
    assert found.class_names == ("plane", "train") and set(found.splits) == {""}


def test_classes_in_an_order_of_their_own(tmp_path: Path) -> None:
    touch(tmp_path, "photos/owl/a.jpg", "photos/ant/b.jpg")
    found = read_folder(str(tmp_path / "photos"), ("owl", "yak", "ant"))
    assert found.class_names == ("owl", "yak", "ant")
    np.testing.assert_array_equal(found.labels, [2, 0])


@pytest.mark.parametrize(
    ("names", "class_names", "message"),
    [
        ((), (), "should hold a folder for each class"),
        (("a.jpg",), (), "should hold a folder for each class"),
        (("owl/a.jpg", "ant/b.txt"), (), "ant should hold the images of a class and has none"),
        (("owl/a.jpg", "yak/b.jpg"), ("owl",), "not among the names of classes: yak; add them"),
        (("train/owl/a.jpg", "other/b.jpg"), (), r"splits \(train\) and others \(other\)"),
        (("val/owl/a.jpg", "test/owl/b.jpg"), (), "has the folders test, val and no train"),
        (
            ("train/owl/a.jpg", "val/owl/a.jpg", "valid/owl/b.jpg"),
            (),
            r"several folders for one split \(val, valid\)",
        ),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, names, class_names, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_folder(str(touch(tmp_path, *names)), class_names)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere cannot be read \(No such file or directory\)"):
        read_folder(str(tmp_path / "nowhere"))


def test_a_csv_with_splits(tmp_path: Path) -> None:
    text = '\ufeffsplit, Path ,label\ntrain,a.jpg,owl\nTest,"b, c.jpg",ant\n\n,d/e.jpg,owl\n'
    found = read_lists({"": write(tmp_path / "list.csv", text)})
    assert found.names == ("a.jpg", "b, c.jpg", "d/e.jpg")
    assert found.splits == ("train", "test", "")
    assert found.class_names == ("ant", "owl") and found.root == str(tmp_path)
    np.testing.assert_array_equal(found.labels, [1, 0, 1])


def test_lists_of_the_field(tmp_path: Path) -> None:
    """Labels are whole numbers in the order of their values; names may have spaces."""
    lists = {
        "train": write(tmp_path / "train.txt", "train/n01/a b.JPEG 10\ntrain/n02/c.JPEG 2\n"),
        "test": write(tmp_path / "test.txt", "val/d.JPEG 2"),
    }
    found = read_lists(lists, str(tmp_path / "photos"))
    assert found.names == ("train/n01/a b.JPEG", "train/n02/c.JPEG", "val/d.JPEG")
    assert found.class_names == ("2", "10") and found.root == str(tmp_path / "photos")
    np.testing.assert_array_equal(found.labels, [1, 0, 0])
    assert found.splits == ("train", "train", "test")
    named = read_lists(lists, str(tmp_path), [f"bird {i}" for i in range(11)])
    assert named.class_names[10] == "bird 10"
    np.testing.assert_array_equal(named.labels, [10, 2, 2])


def test_paths_may_be_absolute_or_lead_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    path = write(folder / "list.csv", f"path,label\n{tmp_path}/x/a.jpg,0\n../y/b.jpg,1\n")
    found = read_lists({"": path})
    assert [str(Path(found.root, name).resolve()) for name in found.names] == [
        str((tmp_path / "x/a.jpg").resolve()), str((tmp_path / "y/b.jpg").resolve()),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "should name images and is empty"),
        ("path,label\n", "should name images and is empty"),
        ("path,class\na.jpg,1\n", "should begin with the header path,label"),
        ("path,label,path\na.jpg,1,b\n", "should begin with the header path,label"),
        ("path,label\na.jpg\n", "Row 2 of .* should have 2 columns"),
        ("path,label\na.jpg,\n", "Row 2 of .* should have 2 columns with a path and a label"),
        ("path,label,split\na.jpg,1,dev\n", "Row 2 of .* has the split 'dev'; it should be train"),
        ("path,label\na.jpg,1\na.jpg,2\n", "stand in the lists once, and a.jpg more often"),
        ("a.jpg\n", "Line 1 of .* should be a path and a label with a space"),
        ("a.jpg 1\n\n b \n", "Line 3 of .* should be a path and a label"),
        ("a\0.jpg 1\n", "Line 1 of .* has a path with a zero byte"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_lists({"": write(tmp_path / "list.csv", text)})


def test_a_list_of_one_split_that_names_another(tmp_path: Path) -> None:
    path = write(tmp_path / "test.csv", "path,label,split\na.jpg,1,train\n")
    with pytest.raises(UserError, match=r"list of test images and says that a.jpg is of train"):
        read_lists({"test": path})


def test_a_list_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot be read \(it is not text in UTF-8\)"):
        read_lists({"": str(tmp_path / "list.csv")})
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\)"):
        read_lists({"": str(tmp_path / "none.csv")})


def test_labels_beyond_the_names_of_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "list.txt", "a.jpg 0\nb.jpg 7\n")
    with pytest.raises(UserError, match="has the label 7, and there are 2 names of classes"):
        read_lists({"": path}, "", ("ant", "owl"))


def test_a_file_of_class_names(tmp_path: Path) -> None:
    path = write(tmp_path / "classes.txt", " snow owl \n\nant\n")
    assert read_class_names(path) == ("snow owl", "ant")
    for text, message in (("\n", "is empty"), ("ant\nowl\nant\n", "names ant more often")):
        with pytest.raises(UserError, match=message):
            read_class_names(write(tmp_path / "classes.txt", text))
    with pytest.raises(UserError, match="No such file"):
        read_class_names(str(tmp_path / "none.txt"))


_LINES = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from(
            ["path,label", "path,label,split", "a.jpg,1", 'a,"b', "b c 3", "x\ty", "\0"]
        ),
    ),
    max_size=8,
)


def outcome(path: str, class_names: Sequence[str]) -> tuple[Listing | None, str]:
    """The listing, or what is said against the list."""
    try:
        return read_lists({"": path}, "", class_names), ""
    except UserError as error:
        return None, str(error)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(lines=_LINES, classes=st.lists(st.text(max_size=4), max_size=3))
def test_any_list_is_read_or_refused(tmp_path_factory, lines: list[str], classes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.csv"
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace", newline="")
    found, message = outcome(str(path), classes)
    if found is None:
        assert message.endswith(".") and "\n" not in message
    else:
        assert len(found.names) == len(found.labels) == len(found.splits) > 0
        assert found.labels.min() >= 0 and found.labels.max() < len(found.class_names)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(content=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.csv"
    path.write_bytes(content)
    assert "\n" not in outcome(str(path), ())[1]
