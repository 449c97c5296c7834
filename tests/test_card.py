"""Model cards: the numbers are those that were measured, the commands run, and what people wrote stays."""

import json
import re

import PIL.Image
import pytest
import yaml
from conftest import make_ddpm, make_generator, make_pipeline, smooth_picture
from huggingface_hub import ModelCard

from flowsr.card import KEPT, model_card
from flowsr.cli import main
from flowsr.hub import write_card

SETTINGS = {
    "train_data_dir": ["/somewhere/private/photos", "bsds399"],
    "learning_rate": 0.001,
    "unet": {"block_out_channels": [8]},
    "pretrained_model_name_or_path": None,
    "output_dir": "runs/x4",
}


@pytest.fixture
def folder(tmp_path):
    """As a training leaves it, with an example."""
    folder = tmp_path / "my-upscaler"
    make_pipeline().save_pretrained(folder)
    (folder / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    smooth_picture(8, 8).save(folder / "example.png")
    return folder


def test_the_numbers_are_those_of_evaluate(folder, tmp_path, capsys):
    (tmp_path / "hr").mkdir()
    smooth_picture(48, 40).save(tmp_path / "hr/a.png")
    measured = tmp_path / "waves.json"
    call = ["evaluate", tmp_path / "hr", "--checkpoint", folder, "--steps", 1, 2, "--consistency", "exact"]
    assert main([*map(str, call), "--json", str(measured)]) == 0
    assert main(["card", str(folder), "--results", f"Waves={measured}", "--license", "cc-by-4.0"]) == 0
    assert capsys.readouterr().out.endswith("README.md\n")
    result = json.loads(measured.read_text())
    card = ModelCard.load(folder / "README.md")
    claimed = {(each.dataset_name, each.metric_name): each.metric_value for each in card.data.eval_results}
    for row in result["rows"][1:]:
        words = row["method"].removeprefix("flowsr, ")
        assert claimed["Waves", f"PSNR-Y, {words}, consistency exact"] == pytest.approx(row["psnr_y"], abs=1e-4)
        assert f"| Waves | {words}, consistency exact | {row['psnr_y']:.2f} | {row['ssim_y']:.3f} |" in card.text
    assert not any("bicubic" in name for _, name in claimed)
    assert f"| Waves | bicubic | {result['rows'][0]['psnr_y']:.2f} |" in card.text
    assert json.loads((folder / "evaluation.json").read_text()) == {"Waves": result}
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "cc-by-4.0", "diffusers", "image-to-image",
    )  # fmt: skip


def test_the_training_is_told_without_places(folder):
    card = ModelCard.load(write_card(folder))
    assert "On photos, bsds399." in card.text
    assert "private" not in card.text
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1])
    assert settings == {"train_data_dir": ["photos", "bsds399"], "learning_rate": 0.001, "unet": SETTINGS["unet"]}
    assert "![An example](example.png)" in card.text
    assert "None has been chosen for the weights yet" in card.text
    named = model_card(make_pipeline(), "me/x", settings={"dataset_name": "you/photos"})
    assert named.data.datasets == ["you/photos"]


def test_the_commands_on_the_card_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    smooth_picture(6, 5).save("small.png")
    code = re.findall(r"```python\n(.*?)```", write_card(folder, "my-upscaler").read_text(), re.DOTALL)
    assert len(code) == 2
    assert "fidelity=1.0" in (folder / "README.md").read_text()
    for part in code:
        ran = {}
        exec(part, ran)
        assert isinstance(ran["large"], PIL.Image.Image)
        assert ran["large"].size == (24, 20)


def test_every_pipeline_has_a_card_of_its_own():
    diffusion, generator = model_card(make_ddpm(), "me/ddpm"), model_card(make_generator(), "me/digits")
    assert {"diffusion", "super-resolution"} < set(diffusion.data.tags)
    assert diffusion.data.pipeline_tag == "image-to-image"
    assert "fidelity" not in diffusion.text
    assert generator.data.pipeline_tag == "unconditional-image-generation"
    assert "super-resolution" not in generator.data.tags
    assert "batch_size=4" in generator.text


def test_what_people_wrote_stays(folder):
    path = write_card(folder, "me/x", license="cc0-1.0")
    first = path.read_text()
    assert write_card(folder, "me/x").read_text() == first  # the licence is remembered
    words = "## Acknowledgements\n\nTo the photographers.\n"
    path.write_text(first.replace("tags:\n", "base_model: me/base\ntags:\n- photographs\n") + words)
    write_card(folder, "me/y")
    card = ModelCard.load(path)
    assert card.text.partition(KEPT)[2].strip() == words.strip()
    assert 'from_pretrained("me/y")' in card.text
    assert card.data.base_model == "me/base"
    assert "photographs" in card.data.tags
    path.write_text("# All by hand\n")
    with pytest.raises(ValueError, match="README.md was written by hand. To have a card written above it, begin"):
        write_card(folder)
    assert path.read_text() == "# All by hand\n"
    path.write_text(f"{KEPT}\n# All by hand\n")  # as the error says
    assert write_card(folder).read_text().endswith(f"{KEPT}\n# All by hand\n")


def test_wrong_calls_are_named(folder, tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    cases = {
        (tmp_path / "empty",): "it has no model_index.json",
        (folder, "--results", "Set5"): "`--results` takes NAME=JSON",
        (folder, "--results", f"Set5={tmp_path / 'absent.json'}"): "absent.json",
        (folder, "--results", f"Set5={tmp_path / 'other.json'}"): "is not written by `flowsr evaluate --json`",
    }
    for arguments, message in cases.items():
        assert main(["card", *map(str, arguments)]) == 1
        assert message in capsys.readouterr().err
    assert not (folder / "README.md").exists()
    assert not (folder / "evaluation.json").exists()
