"""Sources: which settings apply to which, their fingerprints, and local directories read by the hub's library."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import zstandard

from moelm.config import SourceConfig
from moelm.config.load import check_section
from moelm.data.sources import read_source, source_fingerprint
from moelm.errors import MoelmError

datasets.disable_progress_bars()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "a.txt", "split": "test"}, "split does not apply to a source with path, only with hub"),
        ({"path": "a.txt", "config": "en"}, "config does not apply to a source with path"),
        ({"hub": "a/b", "documents": "line"}, "documents does not apply to a source with hub, only with path"),
        ({"name": "builtin", "column": "text"}, "column does not apply to a source with name: builtin"),
        ({"name": "builtin", "domain": "x"}, "domain does not apply to a source with name: builtin"),
        ({"name": "builtin", "path": "a.txt"}, "a source is exactly one of"),
        ({"path": "a", "domain": "x", "domain_column": "y"}, "only one of them is expected"),
        ({"path": ""}, "'' is not a path"),
        ({"hub": ""}, "hub is ''; text that is not blank is expected"),
        ({"path": "a", "column": "a\0b"}, "column is 'a\\x00b'; text that is not blank is expected"),
        ({"path": "a", "domain": "\ud800"}, "half a surrogate pair"),
        ({"path": "a", "weight": float("inf")}, "weight is inf"),
        ({"path": "a", "max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_settings_that_do_not_apply_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MoelmError) as caught:
        check_section(SourceConfig, settings, "a.yaml")
    assert message in str(caught.value)


def test_a_config_written_out_is_the_same_config() -> None:
    for source in (SourceConfig(path="a.txt"), SourceConfig(hub="a/b"), SourceConfig(name="builtin")):
        assert SourceConfig.model_validate(source.model_dump(exclude_none=True)) == source


def test_a_label_is_text_where_the_path_is_not() -> None:
    assert SourceConfig(path=os.fsdecode(b"caf\xe9.txt")).label == "caf?.txt"


def hub_texts(folder: Path, **settings: Any) -> list[str]:
    return [document.text for document in read_source(SourceConfig(hub=str(folder), **settings), 1000)]


def test_the_fingerprint_of_a_local_directory_is_that_of_its_files(tmp_path: Path) -> None:
    source = SourceConfig(hub=str(tmp_path))
    (tmp_path / "data").mkdir()
    seen = [source_fingerprint(source)]
    for change in (
        lambda: (tmp_path / "data" / "train.jsonl").write_text("{}"),
        lambda: (tmp_path / "data" / "train.jsonl").write_text("{} "),
        lambda: os.utime(tmp_path / "data" / "train.jsonl", (1, 1)),
        lambda: (tmp_path / "data" / "train.jsonl").rename(tmp_path / "train.jsonl"),
    ):
        change()
        assert source_fingerprint(source) not in seen
        seen.append(source_fingerprint(source))
    (tmp_path / ".cache").write_text("x")
    assert source_fingerprint(source) == seen[-1]
    assert source_fingerprint(SourceConfig(hub="owner/name")) == "owner/name"


def test_a_cut_zst_in_a_local_directory_is_refused(tmp_path: Path) -> None:
    frames = [
        zstandard.compress("".join(json.dumps({"text": f"{part} {i}"}) + "\n" for i in range(9)).encode()) for part in "ab"
    ]
    (tmp_path / "train.jsonl.zst").write_bytes(b"".join(frames))
    assert len(hub_texts(tmp_path)) == 18
    (tmp_path / "train.jsonl.zst").write_bytes(b"".join(frames)[:-3])
    with pytest.raises(MoelmError, match=r"train.jsonl.zst is not a whole zst file"):
        hub_texts(tmp_path)


def test_saved_datasets_are_read(tmp_path: Path) -> None:
    train, test = (datasets.Dataset.from_dict({"text": [f"{split} {i}" for i in range(3)]}) for split in ("train", "test"))
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "several")
    assert hub_texts(tmp_path / "one") == hub_texts(tmp_path / "several") == ["train 0", "train 1", "train 2"]
    assert hub_texts(tmp_path / "several", split="test") == ["test 0", "test 1", "test 2"]
    with pytest.raises(MoelmError, match="holds a single split"):
        hub_texts(tmp_path / "one", split="train")
    with pytest.raises(MoelmError, match="several has no split 'validation'; it has 'train', 'test'"):
        hub_texts(tmp_path / "several", split="validation")
    with pytest.raises(MoelmError, match="config does not apply"):
        hub_texts(tmp_path / "several", config="en")


def test_a_local_directory_with_a_pattern_in_its_name_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "texts [2024]"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(MoelmError, match=r"texts \[2024\] for a pattern; rename the directory"):
        hub_texts(folder)
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(folder / "saved")
    assert hub_texts(folder / "saved") == ["x"]


def test_hub_records_without_text_name_their_row(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["x", None]}).save_to_disk(tmp_path / "set")
    with pytest.raises(MoelmError, match="set, row 2: column 'text' holds no value"):
        hub_texts(tmp_path / "set")
    with pytest.raises(MoelmError, match="set, row 1 has no column 'body'; it has 'text'"):
        hub_texts(tmp_path / "set", column="body")
    (tmp_path / "file.jsonl").write_text("")
    with pytest.raises(MoelmError, match=r"file.jsonl is a file; read it as path"):
        hub_texts(tmp_path / "file.jsonl")
