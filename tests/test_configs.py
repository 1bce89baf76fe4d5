"""Ready configurations are found by name, files by path."""

import pytest

from ijepa_fast import configs
from tests.launch import ROOT


@pytest.mark.parametrize(
    "name",
    ["quickstart", "quickstart.yaml", ROOT / "configs" / "quickstart.yaml"],
    ids=["name", "name with .yaml", "path"],
)
def test_a_name_and_a_path_find_the_same_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.find(name).samefile(ROOT / "configs" / "quickstart.yaml")


def test_a_file_comes_before_a_name_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    assert configs.find("cifar10") == ROOT / "configs" / "cifar10.yaml"
    (tmp_path / "quickstart.yaml").write_text("name: mine\n")
    assert configs.find("quickstart.yaml").resolve() == tmp_path / "quickstart.yaml"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("quickstrat", "did you mean quickstart, of the ready ones "),
        ("elsewhere/quickstart.yaml", "there is no file elsewhere/quickstart.yaml; did you mean quickstart"),
        ("xyz", "the ready ones are beit_cifar10, "),
    ],
)
def test_an_unknown_one_lists_the_ready_ones(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        configs.find(name)
    assert all(ready in str(error.value) for ready in configs.names())
