"""The stream of training crops, and where its pictures come from."""

import http.server
import shutil
import threading

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import random_picture, smooth_picture
from torch.utils.data import DataLoader

from flowsr.data import (
    KNOWN,
    CropDataset,
    Cropping,
    CropStream,
    check_classes,
    check_pairs,
    load_images,
    read_picture,
    smaller_than,
    to_tensor,
    turn,
    undecoded,
)
from flowsr.degradations import CHAINS, degrade, downscale


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
    stream = CropDataset(images, Cropping(32, 4, seed=3), start=0, length=40, cache_gib=1.0)
    later = CropDataset(images, Cropping(32, 4, seed=3), start=10, length=30)
    assert all(same(stream[10 + i], later[i]) for i in (0, 7, 25))
    assert not torch.equal(stream[0]["hr"], CropDataset(images, Cropping(32, 4, seed=4), 0, 1)[0]["hr"])
    crop = stream[5]
    assert crop["hr"].shape == (3, 32, 32)
    # Away from the edges of the crop its LR is that of the crop alone.
    levels = ((crop["hr"].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
    again = to_tensor(downscale(levels, 4))
    assert (again - crop["lr"])[:, 2:-2, 2:-2].abs().max() <= 1 / 127.5 + 1e-6


@pytest.mark.parametrize("chain", CHAINS)
def test_random_chains_are_a_function_of_seed_and_index_too(images, chain):
    stream = CropDataset(images, Cropping(32, 4, seed=3, degradation=chain), 0, 40)
    assert same(stream[7], CropDataset(images, Cropping(32, 4, seed=3, degradation=chain), 7, 1)[0])
    assert stream[7]["lr"].shape == (3, 8, 8)
    grey = CropDataset(images, Cropping(32, 4, channels=1, degradation=chain), 0, 9)
    assert {grey[i]["lr"].shape for i in range(9)} == {(1, 8, 8)}


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
    stream = CropDataset(images, Cropping(32, 4), 0, 20, cache_gib=100_000 / 2**30)
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
    plain = CropDataset(images, Cropping(16, 1, augmentation="none", center_crop=True), 0, 20)
    assert torch.equal(plain[3]["hr"], to_tensor(picture[7:23, 12:28]))
    assert "lr" not in plain[3]
    flipped = CropDataset(images, Cropping(16, 1, augmentation="flip", center_crop=True), 0, 20)
    kinds = {turn(picture[7:23, 12:28], symmetry).tobytes() for symmetry in (0, 4)}
    found = {((flipped[i]["hr"].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy().tobytes() for i in range(20)}
    assert found == kinds
    small = CropDataset(images, Cropping(15, 1, augmentation="none", center_crop=True, resize_to=15), 0, 1)
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
    with pytest.raises(FileNotFoundError, match="No readable picture"):
        (tmp_path / "empty").mkdir()
        load_images([str(tmp_path / "empty")], None)
    with pytest.raises(ValueError, match="Give either"):
        load_images([str(photo_folder)], "DIV2K")
    load_images([str(photo_folder)], None).to_parquet(str(tmp_path / "table/train.parquet"))
    with pytest.raises(ValueError, match=r"needs the columns \['image', 'label'\]"):
        load_images(None, str(tmp_path / "table"), labels=True)


def test_training_reads_pictures_as_the_pipelines_do(tmp_path):
    from flowsr.pipelines.image_processor import read_images

    levels = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    half_clear = np.dstack([np.array(random_picture(64, 64)), np.full((64, 64), 128, np.uint8)])
    turned = PIL.Image.Exif()
    turned[274] = 6  # a quarter turn
    pictures = {
        "deep": PIL.Image.fromarray(levels), "alpha": PIL.Image.fromarray(half_clear),
        "palette": random_picture(64, 64).quantize(16), "grey": random_picture(64, 64, "L"),
        "two_levels": random_picture(64, 64, "1"), "turned": random_picture(64, 48),
    }  # fmt: skip
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png", exif=turned if name == "turned" else None)
        (wanted,) = read_images(picture)
        wanted = ((wanted.color[0] + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8)
        wanted = np.rot90(wanted, -1) if name == "turned" else wanted
        found = np.asarray(read_picture({"bytes": None, "path": str(tmp_path / f"{name}.png")}))
        np.testing.assert_array_equal(found, wanted, err_msg=name)
    deep = CropDataset(load_images([str(tmp_path)], None), Cropping(64, 1, channels=1, augmentation="none"))
    name = [row["image"]["path"].endswith("deep.png") for row in deep.images].index(True)
    np.testing.assert_array_equal(deep.read(name)[0][..., 0], (levels / 257).round())
    # A stream turns photos upright as well.
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(tmp_path / "turned.png", photos)
    options = Cropping(48, 1, augmentation="none", center_crop=True)
    stream = CropStream(load_images([str(photos)], None, streaming=True), options, 0, 1)
    table = CropDataset(load_images([str(photos)], None), options, 0, 1)
    assert torch.equal(next(iter(stream))["hr"], table[0]["hr"])


def test_a_broken_picture_is_named(photo_folder):
    content = (photo_folder / "3.png").read_bytes()
    (photo_folder / "3.png").write_bytes(content[: len(content) // 2])
    for streaming in (False, True):
        images = load_images([str(photo_folder)], None, streaming=streaming)
        with pytest.raises(ValueError, match=r"The training picture .*3\.png cannot be read"):
            stream = (CropStream if streaming else CropDataset)(images, Cropping(32, 4), 0, 9)
            list(stream) if streaming else [stream[i] for i in range(9)]
    (photo_folder / "3.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"The training picture .*3\.png cannot be read"):
        smaller_than(load_images([str(photo_folder)], None), 64)


@pytest.mark.parametrize("streaming", [False, True])
def test_zips_have_classes_and_may_hold_other_files(class_folder, tmp_path, streaming):
    (class_folder / "readme.txt").write_text("what this is")
    (class_folder / "cat/Thumbs.db").write_text("a cache")
    (class_folder / "__MACOSX/cat").mkdir(parents=True)
    (class_folder / "__MACOSX/cat/._0.png").write_text("a resource fork")
    archive = shutil.make_archive(str(tmp_path / "classes"), "zip", class_folder)
    for place in (str(class_folder), archive):
        images = load_images(place, None, labels=True, streaming=streaming)
        assert images.features["label"].names == ["cat", "dog"]
        labels = [row["label"] for row in images]
        assert sorted(labels) == [0, 0, 0, 1, 1, 1]
        for row in undecoded(images):
            wanted = [np.array(random_picture(16, 16, seed=10 * row["label"] + k)) for k in range(3)]
            assert any(np.array_equal(np.asarray(read_picture(row["image"])), one) for one in wanted)
    (tmp_path / "cut.zip").write_bytes((tmp_path / "classes.zip").read_bytes()[:900])
    with pytest.raises(FileNotFoundError, match=r"No readable picture in .*cut\.zip"):
        load_images([str(tmp_path / "cut.zip")], None, streaming=streaming)
    with pytest.raises(ValueError, match="is a file; give a zip or a folder as `train_data_dir`"):
        load_images(None, archive, streaming=streaming)


def test_classes_may_be_plain_numbers():
    import datasets

    plain = datasets.Dataset.from_dict({"label": [0, 2, 1]})
    check_classes(plain, 3)
    check_classes(plain.cast_column("label", datasets.ClassLabel(3)), 3)
    with pytest.raises(ValueError, match="goes from 0 to 2"):
        check_classes(plain, 2)
    with pytest.raises(ValueError, match="has the classes"):
        check_classes(plain.cast_column("label", datasets.ClassLabel(3)), 4)
    for unknown in (plain.to_iterable_dataset(), datasets.Dataset.from_dict({"label": ["cat"]})):
        with pytest.raises(ValueError, match="store it as a ClassLabel"):
            check_classes(unknown, 3)


def test_lr_pictures_may_come_from_a_folder_of_the_same_names(photo_folder, tmp_path):
    lr_folder = tmp_path / "lr"
    lr_folder.mkdir()
    for path in photo_folder.iterdir():
        hr = np.array(PIL.Image.open(path))
        hr = hr[: len(hr) // 4 * 4, : hr.shape[1] // 4 * 4]
        PIL.Image.fromarray(downscale(hr, 4)).save(lr_folder / f"{path.stem}.bmp")
    images, paired = load_images([str(photo_folder)], None), Cropping(32, 4, 3, degradation=str(lr_folder))
    check_pairs(images, paired)
    made, read = CropDataset(images, Cropping(32, 4, 3), 0, 20), CropDataset(images, paired, 0, 20)
    assert all(same(made[i], read[i]) for i in range(20))
    stream = load_images([str(photo_folder)], None, streaming=True)
    pairs = (CropStream(stream, cropping, 0, 9) for cropping in (Cropping(32, 4, 3), paired))
    assert all(same(a, b) for a, b in zip(*pairs))
    PIL.Image.open(lr_folder / "5.bmp").resize((9, 9)).save(lr_folder / "5.bmp")
    with pytest.raises(ValueError, match=r"5\.bmp has 9x9 pixels, but its HR picture 5\.png has 140x96: .* 35x24"):
        check_pairs(images, paired)
    with pytest.raises(ValueError, match=r"5\.bmp has 9x9 pixels"):
        [read[i] for i in range(9)]
    (lr_folder / "5.bmp").unlink()
    (lr_folder / "7.bmp").rename(lr_folder / "seven.bmp")
    from flowsr.data import files_by_stem

    files_by_stem.cache_clear()
    with pytest.raises(ValueError, match=r"must hold one LR picture for [57]\.png, named as it, found none"):
        check_pairs(images, paired)


def test_a_stream_is_the_same_whatever_the_loader_processes(photo_folder):
    images = load_images([str(photo_folder)], None, streaming=True)
    alone, *shared = (
        list(DataLoader(CropStream(images, Cropping(32, 4), 3, 22, 4), 4, num_workers=workers))
        for workers in (0, 1, 2)
    )
    assert [len(batch["index"]) for batch in alone] == [4, 4, 4, 4, 4, 2]
    for loaded in shared:
        assert all(same(a, b) for a, b in zip(alone, loaded, strict=True))


def test_small_pictures_are_listed(tmp_path):
    random_picture(40, 90).save(tmp_path / "small.png")
    random_picture(90, 90).save(tmp_path / "large.png")
    ((number, words),) = smaller_than(load_images([str(tmp_path)], None), 64).items()
    assert number in (0, 1)
    assert "small.png (40x90)" in words


def test_degrading_leaves_the_hr_as_it_is():
    picture = np.array(smooth_picture(32, 32))
    before = picture.copy()
    degrade(picture, 4, "real_esrgan", np.random.default_rng(0))
    assert np.array_equal(picture, before)
