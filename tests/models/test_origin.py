"""What a checkpoint says of its base and its licence, and the card that is written of it."""

from pathlib import Path

import pytest

from jaxalign.models import Origin, origin_of, save
from tests.layouts import tiny_model
from tests.models import tiny

HUB = "someone/base"
CARD = (
    "---\nlanguage: en\nlicense: {licence}\nbase_model: {base}\ntags:\n- chat\n---\n\n# Base\n\nlicense: none of this\n"
)


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny.write_folder(tmp_path / "base", tiny.CONFIGS["llama2"])
    return tmp_path / "base"


@pytest.mark.parametrize("licence", ["apache-2.0", "'apache-2.0'", '"apache-2.0" '])
def test_a_folder_gives_its_licence_and_no_name(folder, licence):
    """The base of a downloaded model is not the model itself."""
    assert origin_of(folder) == Origin()
    (folder / "README.md").write_text(CARD.format(licence=licence, base="someone/older"))
    assert origin_of(folder) == Origin(None, "apache-2.0")
    (folder / "README.md").write_text("# No front matter\n\nlicense: mit\n")
    assert origin_of(folder) == Origin()


def test_a_name_on_the_hub_is_the_base(folder, monkeypatch):
    (folder / "README.md").write_text(CARD.format(licence="mit", base="someone/older"))
    monkeypatch.setattr("jaxalign.models.origin.find_checkpoint", lambda path, files: folder)
    assert origin_of(HUB) == Origin(HUB, "mit")


def test_a_gguf_file_gives_its_licence(tmp_path):
    hf = tiny.CONFIGS["llama3"] | {"head_dim": 32, "hidden_act": "silu", "eos_token_id": 2}
    path = tmp_path / "model.gguf"
    tiny.write_gguf(path, hf, tiny.arrays(hf))
    assert origin_of(path) == Origin()
    tiny.write_gguf(path, hf, tiny.arrays(hf), extra={"general.license": "apache-2.0"})
    assert origin_of(path) == Origin(None, "apache-2.0")


def test_both_go_through_our_own_exports(tmp_path):
    """From stage to stage: the second is trained from a folder whose card names the first's base."""
    model, variables = tiny_model(num_layers=1, windows=(9,))
    first = Origin(HUB, "apache-2.0")
    save(tmp_path / "one", model, variables, None, base_model=first.base_model, licence=first.licence, method="sft")
    assert origin_of(tmp_path / "one") == first


def test_a_card_names_no_folder_of_this_machine(tmp_path):
    model, variables = tiny_model(num_layers=1, windows=(9,))
    written = save(tmp_path / "export", model, variables, None, name="short answers", method="dpo")
    card = (written / "README.md").read_text()
    assert "# short answers\n" in card and "Trained with dpo" in card
    assert "base_model" not in card and "license" not in card and "export" not in card
