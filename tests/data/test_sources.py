"""Which rows a source has: splits by names, tars of every kind, folders with anything in them."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import pytest
from data_samples import picture
from PIL import Image

from transformers_nextflow.data import DocumentReader, ExtractionSettings, Pictures, Source, extract
from transformers_nextflow.data.sources import as_source, content_hash, find_columns, task_of


def write_rows(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"text": list(texts)}).to_parquet(str(path))


def write_photos(folder: Path, *names: str) -> None:
    """Pictures whose captions are their names."""
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(number))
    lines = [json.dumps({"file_name": name, "text": name}) + "\n" for name in names]
    (folder / "metadata.jsonl").write_text("".join(lines))


def write_tar(path: Path, **members: bytes) -> None:
    """`0_png` is the file 0.png."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name.replace("_", "."))
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def texts(path: Path, split: str = "train") -> list[str]:
    return Source(str(path), split).load()["text"][:]


def test_no_picture_is_left_out_for_its_name(tmp_path):
    names = ["cat.png", "test.png", "train-ride.png", "x[1].png"]
    write_photos(tmp_path / "photos [2] * 3", *names)
    assert sorted(texts(tmp_path / "photos [2] * 3")) == names


def test_splits_are_what_names_of_files_and_folders_say(tmp_path):
    rows, photos = tmp_path / "rows", tmp_path / "photos"
    write_rows(rows / "train-00000-of-00001.parquet", "a", "b", "c")
    write_rows(rows / "more" / "dev.parquet", "d")
    write_rows(rows / "more" / "test" / "rows.parquet", "e")
    assert (texts(rows), texts(rows, "validation")) == (["a", "b", "c"], ["d"])
    assert texts(rows, "train[:2]") == ["a", "b"] and texts(rows, "train[2:]+dev") == ["c", "d"]
    assert texts(rows, "test") == ["e"]
    write_photos(photos / "train", "a.png", "b.png")
    write_photos(photos / "val2017", "c.png")
    assert (texts(photos), texts(photos, "validation")) == (["a.png", "b.png"], ["c.png"])
    assert [Path(path).name for path in Pictures(Source(str(photos), "validation"))] == ["c.png"]


def test_a_saved_dict_of_datasets_has_its_own_splits(tmp_path):
    kinds = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("sft", "preferences")}
    datasets.DatasetDict(kinds).save_to_disk(str(tmp_path / "saved"))
    assert texts(tmp_path / "saved", "preferences") == ["preferences"]
    with pytest.raises(ValueError, match="saved has no split train, but preferences, sft"):
        texts(tmp_path / "saved")


def test_a_split_that_is_not_there_is_refused(tmp_path):
    write_rows(tmp_path / "a.parquet", "a")
    write_rows(tmp_path / "mixed" / "test.parquet", "b")
    for name in ("a.parquet", "mixed"):
        with pytest.raises(ValueError, match=f"{name} has no split validation, but t"):
            texts(tmp_path / name, "validation")
    write_rows(tmp_path / "mixed" / "notes.parquet", "c")
    with pytest.raises(ValueError, match="mixed has files of the splits test, and of none, such as .*notes.parquet"):
        texts(tmp_path / "mixed", "test")
    with pytest.raises(ValueError, match="config names a part of a dataset on the Hub, .*a.parquet is here: got 'en'"):
        Source(str(tmp_path / "a.parquet"), config="en").load()


def test_a_tar_may_lack_members_and_hold_what_is_no_text(tmp_path, data_checkpoint):
    """Each key by itself: what a row lacks costs this row, which is counted."""
    members = {"0_png": picture(0), "1_png": picture(1), "2_png": picture(2), "0_txt": b"a star"}
    write_tar(tmp_path / "a.tar", **members, **{"1_txt": b"caf\xe9", "3_txt": b"no picture", "notes": b"no key"})
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        folder = tarfile.TarInfo("4.txt")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    settings = ExtractionSettings("text-to-image", {"text": "txt", "image": "png"})
    counts = extract(Source(str(tmp_path / "a.tar")), data_checkpoint, tmp_path / "out", settings)["statistics"]
    assert counts["documents"] == 1
    skipped = {name.removeprefix("skipped: "): n for name, n in counts.items() if name.startswith("skipped")}
    assert skipped == {"no text": 1, "no Unicode text": 1, "no image": 1}
    write_tar(tmp_path / "a.tar", **members)  # the same name is not the same source
    assert Source(str(tmp_path / "a.tar"), "train[1:]").load()["__key__"][:] == ["1", "2"]


def test_tars_of_several_formats_have_one_column_of_pictures(tmp_path):
    folder = tmp_path / "tars"
    folder.mkdir()
    write_tar(folder / "a.tar", **{"0_jpg": picture(0), "0_txt": b"zero", "1_PNG": picture(1), "1_txt": b"one"})
    write_tar(folder / "b.tar", **{"2_webp": picture(2), "2_txt": b"two"})
    table = Source(str(folder)).load()
    assert find_columns(table) == {"image": "jpg;png;webp", "text": "txt"}
    assert list(Pictures(Source(str(folder)))) == [picture(0), picture(1), picture(2)]
    assert table["txt"][:] == [b"zero", b"one", b"two"]


def test_pictures_that_stand_beside_each_other_are_columns_of_their_own(tmp_path):
    members = {"0_jpg": picture(0), "0_png": picture(1), "1_jpg": picture(2)}
    write_tar(tmp_path / "a.tar", **members, **{"0_after_gif": picture(3), "1_after_png": picture(4)})
    columns = Source(str(tmp_path / "a.tar")).load()
    pictures = [[row and row["bytes"] for row in columns[name]] for name in ("jpg", "png", "after.gif;after.png")]
    assert pictures == [[picture(0), picture(2)], [picture(1), None], [picture(3), picture(4)]]


def test_links_are_followed_once_and_lead_nowhere(tmp_path):
    write_photos(tmp_path / "elsewhere", "a.png")
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "in").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nothing.png")
    assert texts(folder) == ["a.png"]


def test_pictures_without_a_caption_are_counted(tmp_path, caplog):
    write_photos(tmp_path / "photos", "a.png", "b.png")
    assert texts(tmp_path / "photos") == ["a.png", "b.png"] and texts(tmp_path / "photos", "train[:1]") == ["a.png"]
    assert not caplog.text, "a part of a split leaves nothing out"
    (tmp_path / "photos" / "c.png").write_bytes(picture(2))
    assert texts(tmp_path / "photos") == ["a.png", "b.png"]
    assert "1 of 3 pictures of" in caplog.text


def test_folders_of_pictures_are_no_labels(tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        (tmp_path / "pictures" / name / "a.png").write_bytes(picture(0))
    assert Source(str(tmp_path / "pictures")).load().column_names == ["image"]


def test_folders_of_no_format_or_several_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="must hold images, or files of one of .parquet, .*; found: none"):
        Source(str(tmp_path)).load()
    write_rows(tmp_path / "a.parquet", "a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')
    with pytest.raises(ValueError, match="must hold images, or files of one of .parquet, .*; found: json, parquet"):
        Source(str(tmp_path)).load()


def test_columns_are_named_where_they_are_not_plain():
    def table(*pictures: str, **texts: list) -> datasets.Dataset:
        kinds = {name: datasets.Image() for name in pictures} | dict.fromkeys(texts, datasets.Value("string"))
        return datasets.Dataset.from_dict({name: [None] for name in pictures} | texts, datasets.Features(kinds))

    both = {"caption": ["a"], "text": ["b"]}
    assert find_columns(table("photo", **both)) == {"image": "photo", "text": "text"}
    assert find_columns(table("a", "b", **both), "b", "caption") == {"image": "b", "text": "caption"}
    for pictures, message in (((), "caption, text"), (("a", "b"), "a, b, caption, text")):
        with pytest.raises(ValueError, match=f"name the column of pictures, one of {message}"):
            find_columns(table(*pictures, **both))
    with pytest.raises(ValueError, match="name the column of captions, one of photo, title; in a folder of pictures"):
        find_columns(table("photo", title=["a"]))
    assert task_of(table("photo", **both)) == ("text-to-image", {"image": "photo", "text": "text"})
    assert task_of(table("photo", messages=["a"])) == ("chat", {})


def test_a_sources_hash_shows_rows_that_changed():
    """All of few, some of many."""
    rows = [{"text": str(number)} for number in range(128)]
    for count, changed in ((3, (0, 1, 2)), (128, (0, 2, 126))):
        before = content_hash(datasets.Dataset.from_list(rows[:count]))
        assert content_hash(datasets.Dataset.from_list(rows[:count])) == before
        for number in changed:
            other = [*rows[:number], {"text": "other"}, *rows[number + 1 : count]]
            assert content_hash(datasets.Dataset.from_list(other)) != before
        assert content_hash(datasets.Dataset.from_list(rows[: count - 1])) != before


def test_pictures_of_rows_are_their_bytes(tmp_path):
    rows = [{"photo": {"bytes": data, "path": None}} for data in (picture(0), picture(1))] + [{"photo": None}]
    table = datasets.Dataset.from_list(rows, datasets.Features({"photo": datasets.Image()}))
    table.to_parquet(str(tmp_path / "a.parquet"))
    pictures = Pictures(Source(str(tmp_path / "a.parquet")))
    assert len(pictures) == 3 and list(map(pictures.__getitem__, range(2))) == [picture(0), picture(1)]
    with pytest.raises(ValueError, match="no image"):
        pictures[2]
    assert isinstance(Source(str(tmp_path / "a.parquet")).load(decode=True)[0]["photo"], Image.Image)


@pytest.mark.parametrize("kind", [datasets.List, datasets.LargeList])
def test_pictures_of_lists_of_any_kind_stay_encoded(kind, tmp_path):
    rows = [{"text": "a", "images": [{"bytes": picture(n), "path": None} for n in range(2)]}]
    features = datasets.Features({"text": datasets.Value("string"), "images": kind(datasets.Image())})
    datasets.Dataset.from_list(rows, features).to_parquet(str(tmp_path / "a.parquet"))
    source = Source(str(tmp_path / "a.parquet"))
    (document,) = DocumentReader("video", root=source.root).read(source.load()[0], 0)
    assert document.images == (picture(0), picture(1))


def test_rows_are_the_same_in_any_format(tmp_path):
    rows = [{"key": 7, "text": "a", "images": [picture(0), picture(1)], "other": 1.5}]
    table = datasets.Dataset.from_list(rows)
    formats = [table.with_format(name) for name in ("torch", "numpy", "pandas", "arrow")]
    for each in (*formats, table.with_format(None, columns=["text"]), table.with_format("numpy", columns=["key"])):
        assert as_source(each).load()[:] == table[:]
    upper = table.with_transform(lambda batch: batch | {"text": [text.upper() for text in batch["text"]]})
    assert as_source(upper).load()[0] == rows[0] | {"text": "A"}
    for other in (datasets.DatasetDict(train=table), table.to_iterable_dataset()):
        with pytest.raises(ValueError, match=f"rows must be a datasets.Dataset, got a {type(other).__name__}"):
            as_source(other)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match="a.jsonl cannot be read as a dataset: it has no rows"):
        Source(str(tmp_path / "a.jsonl")).load()
