"""flowsr: image super-resolution by flow matching, in the manner of diffusers."""

from pathlib import Path as _Path

# In a source checkout the component folders lie beside this one; an installed copy has them inside it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and (_root / "pipelines").is_dir():
    __path__.append(str(_root))

# Eager imports: diffusers looks component classes up among the loaded modules.
from flowsr.models.encoded_sr import EncodedSRModel  # noqa: E402
from flowsr.models.unet_sr import UNetSRModel  # noqa: E402
from flowsr.models.unet_sr_context import ContextUNetSRModel  # noqa: E402
from flowsr.pipelines.pipeline_ddpm_sr import DDPMSRPipeline  # noqa: E402
from flowsr.pipelines.pipeline_flow_match import FlowMatchPipeline  # noqa: E402
from flowsr.pipelines.pipeline_flow_match_sr import FlowMatchSRPipeline  # noqa: E402
from flowsr.schedulers.scheduling_flow_match_sr_euler import FlowMatchSREulerScheduler  # noqa: E402
from flowsr.upscaler import Upscaler  # noqa: E402

__version__ = "0.1.0"


def bundled(name: str = "x4") -> str:
    """Folder of a checkpoint that ships inside the package, to be given to `from_pretrained`.

    Raises:
        ValueError: for an unknown name, listing those that ship.
    """
    weights = _Path(__file__).resolve().parent / "weights"
    names = sorted(folder.name for folder in weights.glob("*") if (folder / "model_index.json").is_file())
    if name not in names:
        raise ValueError(f"There is no bundled checkpoint {name!r}; these ship with flowsr: {names}.")
    return str(weights / name)


__all__ = [
    "ContextUNetSRModel",
    "DDPMSRPipeline",
    "EncodedSRModel",
    "FlowMatchPipeline",
    "FlowMatchSREulerScheduler",
    "FlowMatchSRPipeline",
    "UNetSRModel",
    "Upscaler",
    "bundled",
]
