"""One picture of gigapixels: a tiled TIFF or a Zarr array becomes a Zarr pyramid, in bounded memory.

    python examples/gigapixel.py slide.tif large.zarr --tiff large.tif     # all in one process, by flowsr.streaming
    python examples/gigapixel.py slide.tif large.zarr --shard 2/4          # a quarter of it: one job of four
    python examples/gigapixel.py slide.tif large.zarr --finish             # the pyramid, when all jobs have ended
    python examples/gigapixel.py slide.tif large.zarr --dask 8             # eight processes of Dask

Each way gives the same pixels to the bit. The pyramid halves the picture until it fits into one chunk. `--tiff` also
writes a tiled BigTIFF of all levels, which keeps the georeference of a GeoTIFF. Needs the packages zarr, tifffile and,
for `--dask`, dask[array].
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache, partial

import numpy as np
import tifffile
import torch
import zarr

from flowsr.cli import shard_of
from flowsr.loading import load_upscaler
from flowsr.pipelines.tiling import enlarged, within
from flowsr.streaming import Upscaled, as_dtype

TILE = 256  # pixels: side of a tile of the TIFF
GEO_KEYS, PIXEL_SCALE, TIE_POINTS, TRANSFORMATION = (34735, 34736, 34737), 33550, 33922, 34264  # GeoTIFF 1.1
RASTER_TYPE, IS_POINT = 1025, 2


def open_picture(path: str) -> zarr.Array:
    """A picture `(h, w)` or `(h, w, c)`, of which what is asked for is read."""
    if path.endswith((".tif", ".tiff")):
        return zarr.open(tifffile.imread(path, aszarr=True, level=0), mode="r")
    return zarr.open_array(path, mode="r")


def by_bands(reader, writer, pipe, tile: int, shard: tuple[int, int] = (1, 1), **options) -> None:
    """Upscales the bands of rows that belong to shard (number, count); chunks of the writer are not shared by bands.

    Args:
        tile: rows of a band and columns of a part, LR pixels.
        options: as for [`~flowsr.streaming.Upscaled`].
    """
    (number, count), result = shard, Upscaled(reader, pipe, tile=tile, **options)
    for top in range((number - 1) * result.tall, result.shape[0], count * result.tall):
        writer[top : top + result.tall] = result[top : top + result.tall]


def by_dask(reader, writer, checkpoint: str, tile: int, workers: int, seed: int = 0, **options) -> None:
    """Upscales by Dask's `map_overlap`, whose depth is the pipeline's halo, in `workers` processes, or here for 0."""
    import dask.array

    pipe = pipeline(checkpoint)
    halo = pipe.halo(**options)
    if tile < halo:
        raise ValueError(f"A part sees {halo} LR pixels around itself; take a `--tile` from there on, got {tile}.")
    sides = [cut(size, tile) for size in reader.shape[:2]]
    picture = dask.array.from_array(reader, chunks=(*sides, *reader.shape[2:]))
    edges = [np.cumsum([0, *each]).tolist() for each in sides]
    made = dask.array.map_overlap(
        partial(upscale_block, checkpoint=checkpoint, edges=edges, halo=halo, seed=seed, options=options),
        picture,
        depth={0: halo, 1: halo},
        boundary="none",
        trim=False,
        chunks=(*([side * pipe.scale_factor for side in each] for each in sides), *reader.shape[2:]),
        meta=np.empty((0,) * picture.ndim, reader.dtype),
    )
    how = {"scheduler": "processes", "num_workers": workers} if workers else {"scheduler": "synchronous"}
    dask.array.store(made, writer, lock=False, **how)


def cut(size: int, tile: int) -> list[int]:
    """Sides of parts that cover `size`: `tile` each, and the last up to twice that, so that none is below it."""
    count = max(1, size // tile)
    return [tile] * (count - 1) + [size - tile * (count - 1)]


@cache
def pipeline(checkpoint: str):
    """One for each process."""
    pipe = load_upscaler(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def upscale_block(
    pixels: np.ndarray, checkpoint: str, edges: list, halo: int, seed: int, options: dict, block_id: tuple = ()
) -> np.ndarray:
    """One part with its halo -> the result of the part, by its place in the whole picture."""
    pipe = pipeline(checkpoint)
    kept = tuple(slice(edge[at], edge[at + 1]) for edge, at in zip(edges, block_id))
    seen = tuple(slice(max(0, k.start - halo), min(edge[-1], k.stop + halo)) for k, edge in zip(kept, edges))
    corner, generator = tuple(side.start for side in seen), torch.Generator().manual_seed(seed)
    made = pipe(pixels, corner=corner, generator=generator, output_type="np", **options).images[0]
    made = made[enlarged(within(kept, seen), pipe.scale_factor)]
    return as_dtype(made if pixels.ndim == 3 else made[..., 0], pixels.dtype)


def add_pyramid(group: zarr.Group) -> list[zarr.Array]:
    """Levels "1", "2", ... of the picture "0": means of 2x2 pixels, down to one chunk; an odd last row is left out."""
    levels = [group["0"]]
    while max(levels[-1].shape[:2]) > levels[-1].chunks[0]:
        above, name = levels[-1], str(len(levels))
        height, width = (side // 2 for side in above.shape[:2])
        level = group.require_array(
            name, shape=(height, width, *above.shape[2:]), chunks=above.chunks, dtype=above.dtype
        )
        for top in range(0, height, tall := level.chunks[0]):
            rows = above[2 * top : 2 * min(top + tall, height), : 2 * width].astype(np.float64)
            means = rows.reshape(-1, 2, width, 2, *above.shape[2:]).mean((1, 3))
            level[top : top + len(means)] = means.round().astype(above.dtype)
        levels.append(level)
    return levels


def write_tiff(levels: list[zarr.Array], path: str, source: str, scale: int) -> None:
    """A tiled BigTIFF with its pyramid, as viewers of slides and maps expect it."""
    first, *smaller = levels
    tags = georeference(source, scale) if source.endswith((".tif", ".tiff")) else []
    how = {"tile": (TILE, TILE), "compression": "adobe_deflate", "predictor": True}
    how["photometric"] = "rgb" if first.ndim == 3 and first.shape[2] > 2 else "minisblack"
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(
            tiles(first), shape=first.shape, dtype=first.dtype, subifds=len(smaller), extratags=tags, metadata=None,
            **how,
        )  # fmt: skip
        for level in smaller:
            tiff.write(tiles(level), shape=level.shape, dtype=level.dtype, subfiletype=1, metadata=None, **how)


def tiles(level: zarr.Array) -> Iterator[np.ndarray]:
    """From top to bottom and left to right, the last ones filled up by their edges."""
    for top in range(0, level.shape[0], TILE):
        rows = level[top : top + TILE]
        fill = [(0, -side % TILE) for side in rows.shape[:2]] + [(0, 0)] * (rows.ndim - 2)
        rows = np.pad(rows, fill, mode="edge")
        yield from (rows[:, left : left + TILE] for left in range(0, rows.shape[1], TILE))


def georeference(path: str, scale: int) -> list[tuple]:
    """The tags of a GeoTIFF that say where it lies, for a grid `scale` times as fine (OGC GeoTIFF 1.1, annex B.6)."""
    with tifffile.TiffFile(path) as tiff:
        tags = {tag.code: (tag.dtype, tag.value) for tag in tiff.pages[0].tags}
    kept = {code: tags[code][1] for code in GEO_KEYS if code in tags}
    keys = np.reshape(kept.get(GEO_KEYS[0], ()), (-1, 4)).tolist()
    # The middle of the first pixel moves where coordinates are those of middles.
    shift = (scale - 1) / 2 if any(key[0] == RASTER_TYPE and key[3] == IS_POINT for key in keys) else 0.0
    if PIXEL_SCALE in tags:
        x, y, z = tags[PIXEL_SCALE][1]
        kept[PIXEL_SCALE] = (x / scale, y / scale, z)
    if TIE_POINTS in tags:
        points = np.reshape(tags[TIE_POINTS][1], (-1, 6))
        points[:, :2] = points[:, :2] * scale + shift
        kept[TIE_POINTS] = tuple(points.ravel().tolist())
    if TRANSFORMATION in tags:
        finer = np.diag([1 / scale, 1 / scale, 1, 1])
        finer[:2, 3] = -shift / scale
        kept[TRANSFORMATION] = tuple((np.reshape(tags[TRANSFORMATION][1], (4, 4)) @ finer).ravel().tolist())
    return [(code, tags[code][0], len(value), value, True) for code, value in sorted(kept.items())]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="TIFF or Zarr array")
    parser.add_argument("destination", help="folder of the Zarr pyramid")
    parser.add_argument("--checkpoint", default="x4", help="bundled name, folder, file or Hub id (default: x4)")
    parser.add_argument("--steps", type=int, default=4, help="network evaluations (default: 4)")
    parser.add_argument("--fidelity", type=float, default=0.0, help="0 vivid ... 1 faithful (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the source noise (default: 0)")
    parser.add_argument("--tile", type=int, default=512, help="side of a part, LR pixels (default: 512)")
    parser.add_argument("--tiff", help="also write a tiled BigTIFF with a pyramid")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--shard", type=shard_of, metavar="I/N", help="only the I-th of N parts")
    way.add_argument("--dask", type=int, metavar="N", help="by Dask in N processes; 0: in this one")
    way.add_argument("--finish", action="store_true", help="only pyramid and TIFF of what shards have made")
    options = parser.parse_args(arguments)

    picture, pipe = open_picture(options.source), pipeline(options.checkpoint)
    scale, call = pipe.scale_factor, {"num_inference_steps": options.steps, "fidelity": options.fidelity}
    height, width, *channels = picture.shape
    group = zarr.open_group(options.destination, mode="a")
    large = group.require_array(
        "0", shape=(height * scale, width * scale, *channels), dtype=picture.dtype,
        chunks=(options.tile * scale, options.tile * scale, *channels),
    )  # fmt: skip
    if options.dask is not None:
        by_dask(picture, large, options.checkpoint, options.tile, options.dask, options.seed, **call)
    elif not options.finish:
        by_bands(picture, large, pipe, options.tile, options.shard or (1, 1), seed=options.seed, **call)
    if not options.shard:
        levels = add_pyramid(group)
        if options.tiff:
            write_tiff(levels, options.tiff, options.source, scale)


if __name__ == "__main__":
    main()
