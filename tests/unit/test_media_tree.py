import os

import pytest

from vmtasks.errors import ImageError
from vmtasks.media import tree
from vmtasks.media.tree import Entry


def paths(entries):
    return [entry.path for entry in entries]


def file(path, **more):
    return Entry(path, "file", **more)


def test_later_layers_win_and_parents_appear():
    merged = tree.merge([file("a/b/c", data=b"1"), Entry("a", "dir", 0o700)], [file("a/b/c", data=b"2")])
    assert paths(merged) == ["a", "a/b", "a/b/c"]
    assert merged[0].mode == 0o700
    assert merged[2].read() == b"2"


def test_folder_over_a_link_to_a_folder_leaves_the_link():
    assert tree.merge([Entry("lib", "link", target="usr/lib")], [Entry("lib", "dir")])[0].kind == "link"


def test_file_where_a_folder_is_needed():
    with pytest.raises(ImageError, match="needs a to be a folder"):
        tree.merge([file("a"), file("a/b")])


def test_order_goes_by_parts():
    assert paths(tree.sort([file("a-b"), file("a/b"), file("a")])) == ["a", "a/b", "a-b"]


@pytest.mark.parametrize(
    ("globs", "kept"),
    [
        ([], ["a", "a/b", "a/b/c.ko", "a/d.txt", "e"]),
        (["a"], ["e"]),
        (["a/*"], ["a", "e"]),
        (["**.ko"], ["a", "a/b", "a/d.txt", "e"]),
        (["*.ko"], ["a", "a/b", "a/b/c.ko", "a/d.txt", "e"]),
        (["a", "!a/b/c.ko"], ["a", "a/b", "a/b/c.ko", "e"]),
        (["!a/b/c.ko", "a"], ["e"]),
        (["a/?.txt"], ["a", "a/b", "a/b/c.ko", "e"]),
        (["a.*"], ["a", "a/b", "a/b/c.ko", "a/d.txt", "e"]),
    ],
)
def test_drop(globs, kept):
    whole = tree.merge([file("a/b/c.ko"), file("a/d.txt"), file("e")])
    assert sorted(paths(tree.drop(whole, globs))) == sorted(kept)


def test_select_says_when_there_is_nothing():
    assert paths(tree.select([file("boot/vmlinuz-6"), file("boot/config")], "boot/vmlinuz-*")) == ["boot/vmlinuz-6"]
    with pytest.raises(ImageError, match="nothing in the tree"):
        tree.select([file("boot")], "boot/*")


@pytest.mark.parametrize("path", ["../a", "a/../../b", "a/.."])
def test_no_way_out_of_the_tree(path):
    with pytest.raises(ImageError, match="out of its tree"):
        tree.clean(path)


def test_overlay_modes_depend_on_the_content_only(tmp_path):
    (tmp_path / "sub").mkdir(mode=0o700)
    for name, data, mode in [("sub/run", b"#!/bin/sh\n", 0o600), ("plain", b"x", 0o666), ("tool", b"\x7fELF", 0o700)]:
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).chmod(mode)
    (tmp_path / "link").symlink_to("plain")
    found = {entry.path: entry.mode for entry in tree.overlay(tmp_path)}
    assert found == {"link": 0o777, "plain": 0o644, "sub": 0o755, "sub/run": 0o755, "tool": 0o755}


def test_overlay_refuses_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="pipe is neither"):
        tree.overlay(tmp_path)
    with pytest.raises(ImageError, match="not a folder"):
        tree.overlay(tmp_path / "absent")


def test_chmod_makes_folders_and_wants_files():
    made = {entry.path: entry for entry in tree.chmod([file("etc/shadow")], {"var/tmp/": "1777", "etc/shadow": "0600"})}
    assert made["var/tmp"].mode == 0o1777
    assert made["var"].mode == 0o755
    assert made["etc/shadow"].mode == 0o600
    with pytest.raises(ImageError, match="there is no etc/gshadow"):
        tree.chmod([], {"etc/gshadow": "0600"})
