"""What a run says of its images before it trains on them."""

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("PIL")

from ijepa_fast.config import ConfigError, load_config
from ijepa_fast.run.sources import label_columns, training_source
from tests.data_images import write_photos


def config(tmp_path, **options):
    options = {"data.source": tmp_path / "photos", "runs": tmp_path / "runs"} | options
    return load_config("quickstart", [f"{key}={value}" for key, value in options.items()])


def test_rank_0_says_what_is_left_out_and_that_labels_are_not_needed(tmp_path, capsys, monkeypatch):
    write_photos(tmp_path / "photos" / "train", 6, size=20)
    (tmp_path / "photos" / "scan.tif").touch()
    (tmp_path / "photos" / "labels.csv").write_text("id,breed\na,pug\n")
    source = training_source(config(tmp_path))
    assert len(source) == 6
    assert label_columns(source) == ({}, {})
    said = capsys.readouterr().err
    assert "data.source: 6 images; left out: 1 .tif\n" in said
    assert "labels.csv, line 1: expected the columns file and at least one label" in said
    monkeypatch.setenv("RANK", "1")
    training_source(config(tmp_path))
    assert capsys.readouterr().err == ""


def test_runs_that_cannot_be_written_are_not_blamed_on_the_source(tmp_path):
    write_photos(tmp_path / "photos", 2, size=20)
    (tmp_path / "file").touch()
    for runs in (tmp_path / "file", "/proc/nothing"):
        with pytest.raises(ConfigError, match=rf"^runs={runs}: "):
            training_source(config(tmp_path, runs=runs))
    with pytest.raises(ConfigError, match=r"^data.source: data path '.*/nothing' does not exist"):
        training_source(config(tmp_path, **{"data.source": tmp_path / "nothing"}))
