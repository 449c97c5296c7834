"""The example for one picture of gigapixels, on a small one: each way gives the pixels of the whole."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_encoded_pipeline, smooth_picture

zarr, tifffile, dask = (pytest.importorskip(name) for name in ("zarr", "tifffile", "dask.array"))
SPEC = importlib.util.spec_from_file_location(
    "gigapixel", Path(__file__).parents[1] / "examples/gigapixel.py"
)  # of the checkout
gigapixel = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gigapixel)

KEYS = (1, 1, 0, 2, 1024, 0, 1, 1, 1025, 0, 1, 1)  # a projected map whose coordinates are those of corners


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """A TIFF in tiles with a place on earth, and what it is to become."""
    folder = tmp_path_factory.mktemp("gigapixel")
    make_encoded_pipeline().save_pretrained(folder / "checkpoint")
    pipe = gigapixel.pipeline(str(folder / "checkpoint"))
    picture = np.asarray(smooth_picture(230, 203))
    place = [(34735, 3, len(KEYS), KEYS, True), (33550, 12, 3, (10.0, 10.0, 0.0), True),
             (33922, 12, 6, (0.0, 0.0, 0.0, 500.0, 900.0, 0.0), True)]  # fmt: skip
    tifffile.imwrite(folder / "in.tif", picture, tile=(64, 64), photometric="rgb", extratags=place)
    whole = pipe(picture, 2, generator=torch.Generator().manual_seed(3), output_type="np").images[0]

    def run(name: str, *arguments):
        options = ["--checkpoint", str(folder / "checkpoint"), "--steps", "2", "--seed", "3", "--tile", "96"]
        gigapixel.main([str(folder / "in.tif"), str(folder / name), *options, *map(str, arguments)])
        return zarr.open_group(folder / name, mode="r")

    return run, folder, (whole * 255).round().astype(np.uint8)


def test_shards_in_any_order_and_dask_give_the_whole_to_the_bit(call):
    run, _, whole = call
    for shard in ("2/2", "1/2"):
        sharded = run("shards.zarr", "--shard", shard)
    assert np.array_equal(sharded["0"][:], whole)
    assert np.array_equal(run("dask.zarr", "--dask", 0)["0"][:], whole)
    with pytest.raises(ValueError, match="around itself"):
        run("small.zarr", "--dask", 0, "--tile", 4)


def test_the_tiff_has_the_picture_its_pyramid_and_its_place(call):
    run, folder, whole = call
    levels = run("one.zarr", "--tiff", folder / "large.tif")
    with tifffile.TiffFile(folder / "large.tif") as tiff:
        assert tiff.is_bigtiff
        shapes = [level.shape for level in tiff.series[0].levels]
        assert shapes == [(812, 920, 3), (406, 460, 3), (203, 230, 3)]
        assert np.array_equal(tiff.series[0].asarray(), whole)
        half = tiff.series[0].levels[1].asarray()
        tags = tiff.pages[0].geotiff_tags
    assert np.array_equal(half, levels["1"][:])
    # Neighbours of a pixel of the half differ from it by their deviations, which cancel.
    means = sum(whole[y::2, x::2].astype(float) for y in (0, 1) for x in (0, 1)) / 4
    assert np.abs(means - half).max() <= 0.5
    assert tags["ModelPixelScale"] == [2.5, 2.5, 0.0]
    assert tags["ModelTiepoint"] == [0.0, 0.0, 0.0, 500.0, 900.0, 0.0]


def test_coordinates_of_pixel_middles_stay_where_they_are(tmp_path):
    """The middle of LR pixel (0, 0) lies at 1.5 on a grid four times as fine."""
    matrix, keys = np.array([[10, 1, 0, 500], [2, -10, 0, 900], [0, 0, 1, 0], [0, 0, 0, 1.0]]), (*KEYS[:-1], 2)
    place = [(34735, 3, len(keys), keys, True), (34264, 12, 16, tuple(matrix.ravel()), True)]
    tifffile.imwrite(tmp_path / "in.tif", np.zeros((8, 8), np.uint8), extratags=place)
    found = {code: value for code, _, _, value, _ in gigapixel.georeference(str(tmp_path / "in.tif"), 4)}
    finer = np.reshape(found[34264], (4, 4))
    for column, row in ((0, 0), (3, 5)):
        there = finer @ [4 * column + 1.5, 4 * row + 1.5, 0, 1]
        assert np.allclose(there, matrix @ [column, row, 0, 1])
