"""The stream of training crops, and where its pictures come from."""

import http.server
import shutil
import threading
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import random_picture, smooth_picture
from torch.utils.data import DataLoader

from flowsr.degradations import CHAINS, degrade, matlab_bicubic
from flowsr.files import as_levels
from flowsr.training.crops import CropDataset, Cropping, CropStream, as_images, order_of_pictures, to_tensor, turn
from flowsr.training.pictures import KNOWN, check_classes, load_images, unfit_pictures, with_lr


@pytest.fixture
def images(photo_folder):
    return load_images([str(photo_folder)], None)


@pytest.fixture
def class_folder(tmp_path):
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for k in range(3):
            random_picture(16, 16, seed=10 * number + k).save(tmp_path / f"classes/{name}/{k}.png")
    return tmp_path / "classes"


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_crops_are_aligned_and_a_function_of_seed_and_index(images):
    stream = CropDataset(images, Cropping(32, 4, seed=3), start=0, length=40)
    later = CropDataset(images, Cropping(32, 4, seed=3), start=10, length=30, cache=0)
    assert all(same(stream[10 + i], later[i]) for i in (0, 7, 25))
    assert not torch.equal(stream[0]["hr"], CropDataset(images, Cropping(32, 4, seed=4), 0, 1)[0]["hr"])
    crop = stream[5]
    assert crop["hr"].shape == (3, 32, 32)
    # Away from the edges of the crop its LR is that of the crop alone.
    again = to_tensor(matlab_bicubic(crop["hr"].permute(1, 2, 0).numpy(), 4))
    assert (again.int() - crop["lr"].int())[:, 2:-2, 2:-2].abs().max() <= 1


@pytest.mark.parametrize("chain", CHAINS)
def test_random_chains_are_a_function_of_seed_and_index_too(images, chain):
    stream = CropDataset(images, Cropping(32, 4, seed=3, degradation=chain), 0, 40)
    assert same(stream[7], CropDataset(images, Cropping(32, 4, seed=3, degradation=chain), 7, 1)[0])
    assert stream[7]["lr"].shape == (3, 8, 8)


def test_each_pass_sees_every_picture_once(images, monkeypatch):
    stream = CropDataset(images, Cropping(32, 4), 0, 18)
    seen, read = [], stream.read
    monkeypatch.setattr(stream, "read", lambda picture: seen.append(picture) or read(picture))
    for i in range(18):
        stream[i]
    assert sorted(seen[:9]) == sorted(seen[9:]) == list(range(9))


def test_overfitting_repeats_the_first_crops_under_new_numbers(images):
    stream = CropDataset(images, Cropping(32, 4), 0, 12, overfit=4)
    assert torch.equal(stream[1]["hr"], stream[9]["hr"])
    assert not torch.equal(stream[1]["hr"], stream[2]["hr"])
    assert [int(stream[i]["index"]) for i in (1, 9)] == [1, 9]


def test_the_cache_keeps_no_more_than_it_may(images):
    stream = CropDataset(images, Cropping(32, 4), 0, 20, cache=100_000)
    for i in range(20):
        stream[i]
    held = sum(hr.nbytes + lr.nbytes for hr, lr, *_ in stream.cache.values())
    assert 0 < held <= 100_000


def test_turns_are_the_eight_symmetries():
    square = np.arange(9).reshape(3, 3)
    assert len({turn(square, s).tobytes() for s in range(8)}) == 8


def test_augmentation_centre_and_size_are_as_asked(tmp_path):
    random_picture(40, 30).save(tmp_path / "a.png")
    picture = np.array(random_picture(40, 30))
    images = load_images([str(tmp_path)], None)
    plain = CropDataset(images, Cropping(16, 1, augmentation="none", resize_to=30), 0, 20)
    assert torch.equal(plain[3]["hr"], to_tensor(picture[7:23, 12:28]))
    assert "lr" not in plain[3]
    flipped = CropDataset(images, Cropping(16, 1, augmentation="flip", resize_to=30), 0, 20)
    kinds = {turn(picture[7:23, 12:28], symmetry).tobytes() for symmetry in (0, 4)}
    found = {flipped[i]["hr"].permute(1, 2, 0).numpy().tobytes() for i in range(20)}
    assert found == kinds
    small = CropDataset(images, Cropping(15, 1, augmentation="none", resize_to=15), 0, 1)
    resized = np.asarray(PIL.Image.fromarray(picture).resize((20, 15), PIL.Image.BICUBIC))
    assert torch.equal(small[0]["hr"], to_tensor(resized[:, 2:17]))
    grey = CropDataset(images, Cropping(16, 1, channels=1), 0, 1)
    assert grey[0]["hr"].shape == (1, 16, 16)


def test_class_folders_give_labels(class_folder):
    images = load_images([str(class_folder)], None, labels=True)
    stream = CropDataset(images, Cropping(16, 2, augmentation="none"), 0, 6)
    for i in range(6):
        crop = stream[i]
        wanted = [to_tensor(np.array(random_picture(16, 16, seed=10 * int(crop["label"]) + k))) for k in range(3)]
        assert any(torch.equal(crop["hr"], one) for one in wanted)


def test_a_stream_goes_on_where_an_earlier_one_ended(photo_folder):
    random_picture(20, 90).save(photo_folder / "small.png")  # left out

    def crops(start, length):
        images = load_images([str(photo_folder)], None, streaming=True)
        return list(CropStream(images, Cropping(32, 4, seed=5), start, length))

    whole, rest = crops(0, 24), crops(11, 13)
    assert all(same(a, b) for a, b in zip(whole[11:], rest))
    assert [int(crop["index"]) for crop in rest] == list(range(11, 24))
    assert len({crop["hr"].numpy().tobytes() for crop in whole}) == 24
    with pytest.raises(ValueError, match="No picture of the stream is as large as a crop of 128"):
        images = load_images([str(photo_folder)], None, streaming=True)
        next(iter(CropStream(images, Cropping(128, 4), 0, 1)))


def test_a_stream_is_the_same_whatever_the_loader_processes(photo_folder):
    images = load_images([str(photo_folder)], None, streaming=True)
    alone, *shared = (
        list(DataLoader(CropStream(images, Cropping(32, 4), 3, 22, batch_size=4), 4, num_workers=workers))
        for workers in (0, 1, 2)
    )
    assert [len(batch["index"]) for batch in alone] == [4, 4, 4, 4, 4, 2]
    for loaded in shared:
        assert all(same(a, b) for a, b in zip(alone, loaded, strict=True))


def test_pictures_come_from_zips_urls_and_tables(photo_folder, tmp_path, monkeypatch):
    import datasets

    archive = shutil.make_archive(str(tmp_path / "photos"), "zip", photo_folder)
    images = load_images([archive, str(photo_folder)], None)
    assert len(images) == 18
    assert images[0]["image"].size == images[9]["image"].size

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *_):
            pass

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False, raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/photos.zip"
        monkeypatch.setitem(KNOWN, "DIV2K", url)
        assert len(load_images(None, "DIV2K")) == len(load_images(None, url)) == 9
    finally:
        server.shutdown()

    images.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "table/train.parquet"))
    assert len(load_images(None, str(tmp_path / "table"))) == 18


def test_the_official_files_of_div2k_are_known():
    assert KNOWN["DIV2K"] == "http://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_train_HR.zip"
    assert KNOWN["DIV2K_valid"].endswith("DIV2K_valid_HR.zip")


def test_wrong_sources_are_named(tmp_path, photo_folder):
    with pytest.raises(FileNotFoundError, match="no readable picture"):
        (tmp_path / "empty").mkdir()
        load_images([str(tmp_path / "empty")], None)
    with pytest.raises(ValueError, match="Give either"):
        load_images([str(photo_folder)], "DIV2K")
    load_images([str(photo_folder)], None).to_parquet(str(tmp_path / "table/train.parquet"))
    with pytest.raises(ValueError, match=r"needs the columns \['image', 'label'\]"):
        load_images(None, str(tmp_path / "table"), labels=True)


def test_small_and_unreadable_pictures_are_listed(tmp_path):
    random_picture(40, 90).save(tmp_path / "small.png")
    random_picture(90, 90).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture")
    words = sorted(unfit_pictures(load_images([str(tmp_path)], None), 64).values())
    assert [Path(each.split(" (")[0]).name for each in words] == ["small.png", "text.png"]
    assert "(40x90)" in words[0]
    assert "(cannot be read: cannot identify image file" in words[1]


def test_a_picture_that_breaks_off_is_named_or_passed_over(photo_folder):
    broken = photo_folder / "4.png"
    broken.write_bytes(broken.read_bytes()[:-3000])
    images = load_images([str(photo_folder)], None)
    assert unfit_pictures(images, 32) == {}  # its header is whole
    with pytest.raises(ValueError, match=r"4\.png cannot be read \(image file is truncated.*--small_images skip"):
        [CropDataset(images, Cropping(32, 4), 0, 9)[i] for i in range(9)]
    skipping = [CropDataset(images, Cropping(32, 4), 0, 9, small_images="skip") for _ in range(2)]
    assert all(same(skipping[0][i], skipping[1][i]) for i in range(9))


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_keep_their_brightness(tmp_path, mode):
    grey = np.random.default_rng(0).integers(0, 65536, (32, 32), dtype=np.uint16)
    picture = PIL.Image.fromarray(grey) if mode == "I;16" else PIL.Image.fromarray(grey.astype(np.int32))
    assert picture.mode == mode
    hr, _ = Cropping(32, 4).pair(picture)
    np.testing.assert_array_equal(hr, np.round(grey / 257).astype(np.uint8)[..., None].repeat(3, axis=2))
    with pytest.raises(ValueError, match="mode 'F', which has no defined way to RGB"):
        as_levels(PIL.Image.fromarray(np.zeros((4, 4), np.float32)), "RGB")
    for mode in ("1", "L", "P", "RGBA", "CMYK"):
        other = random_picture(9, 8, mode)
        np.testing.assert_array_equal(as_levels(other, "RGB"), other.convert("RGB"))


def test_zips_give_labels_and_hold_other_files_too(class_folder, tmp_path):
    (class_folder / "readme.txt").write_text("two classes")
    (class_folder / "cat/Thumbs.db").write_bytes(b"thumbs")
    (class_folder / "__MACOSX/cat").mkdir(parents=True)
    (class_folder / "__MACOSX/cat/._0.png").write_text("what macOS puts into zips")
    archive = shutil.make_archive(str(tmp_path / "classes"), "zip", class_folder)
    images = load_images([archive], None, labels=True)
    assert images.features["label"].names == ["cat", "dog"]
    assert sorted(images["label"]) == [0, 0, 0, 1, 1, 1]
    assert len(list(load_images([archive], None, streaming=True))) == 6
    with pytest.raises(ValueError, match=r"classes\.zip is a file; give it as `--train_data_dir"):
        load_images(None, archive)
    with pytest.raises(ValueError, match="cannot be streamed: unpack it"):
        load_images([archive], None, labels=True, streaming=True)
    whole = Path(archive).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.zip is not a whole zip of pictures"):
        load_images([str(tmp_path / "cut.zip")], None)


def test_integers_are_labels_if_they_are_classes_of_the_network():
    import datasets

    images = datasets.Dataset.from_dict({"label": [0, 2, 1]})
    check_classes(images, 3)
    with pytest.raises(ValueError, match=r"`num_class_embeds` is 2, but the data has the labels \[2\]"):
        check_classes(images, 2)
    with pytest.raises(ValueError, match="cast it to ClassLabel"):
        check_classes(datasets.Dataset.from_dict({"label": ["cat", "dog"]}), 2)
    with pytest.raises(ValueError, match=r"the data has the classes \['cat', 'dog'\]"):
        check_classes(images.select([0]).cast_column("label", datasets.ClassLabel(names=["cat", "dog"])), 3)


def test_hr_pictures_find_their_lr_by_name(photo_folder, tmp_path):
    lr_folder = tmp_path / "lr"
    lr_folder.mkdir()
    lr = {}
    for path in photo_folder.iterdir():
        width, height = PIL.Image.open(path).size
        lr[path.stem] = random_picture(width // 4, height // 4, seed=int(path.stem))
        lr[path.stem].save(lr_folder / f"{path.stem}{'x4' if int(path.stem) % 2 else ''}.bmp")
    images = with_lr(load_images([str(photo_folder)], None), str(lr_folder), 4)
    assert unfit_pictures(images, 96, 4) == {}
    stream = CropDataset(images, Cropping(32, 4, augmentation="none"), 0, 9)
    for number in range(9):
        crop, hr = stream[number], images[int(order_of_pictures(0, 0, 9)[number])]["image"]
        (name,) = (stem for stem in lr if PIL.Image.open(photo_folder / f"{stem}.png").size == hr.size)
        places = np.lib.stride_tricks.sliding_window_view(np.asarray(lr[name]), (8, 8, 3)).reshape(-1, 8, 8, 3)
        assert (places == crop["lr"].permute(1, 2, 0).numpy()).all((1, 2, 3)).any()
    (lr_folder / "0.bmp").unlink()
    random_picture(20, 20).save(lr_folder / "2.bmp")
    with pytest.raises(ValueError, match=r"one LR picture for each of 9 HR pictures.*for 1: 0 \(0\)"):
        with_lr(load_images([str(photo_folder)], None), str(lr_folder), 4)
    random_picture(25, 24).save(lr_folder / "0.png")
    images = with_lr(load_images([str(photo_folder)], None), str(lr_folder), 4)
    ((number, words),) = unfit_pictures(images, 96, 4).items()
    assert "2.png (116x96 with an LR of 20x20)" in words
    with pytest.raises(ValueError, match="its LR of 20x20 is not 1 / 4 of 116x96"):
        Cropping(32, 4).pair(images[number]["image"], images[number]["lr"])


def test_a_stream_names_or_leaves_out_what_is_no_picture(photo_folder):
    (photo_folder / "broken.png").write_text("no picture")
    images = load_images([str(photo_folder)], None, streaming=True)
    assert len(list(CropStream(images, Cropping(32, 4), 0, 12, small_images="skip"))) == 12
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        list(CropStream(images, Cropping(32, 4), 0, 12))


@pytest.mark.parametrize("chain", CHAINS)
def test_grey_pictures_are_degraded_as_colour_ones_are(images, chain):
    crop = CropDataset(images, Cropping(32, 4, channels=1, degradation=chain), 0, 1)[0]
    assert crop["lr"].shape == (1, 8, 8)
    pictures = as_images(crop)
    assert pictures["hr"].dtype == torch.float32 and -1 <= pictures["hr"].min() < pictures["hr"].max() <= 1
    assert (pictures["lr"].mean() - pictures["hr"].mean()).abs() < 0.2


def test_degrading_leaves_the_hr_as_it_is():
    picture = np.array(smooth_picture(32, 32))
    before = picture.copy()
    degrade(picture, 4, "real_esrgan", np.random.default_rng(0))
    assert np.array_equal(picture, before)
