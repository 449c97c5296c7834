"""flowsr: image super-resolution by flow matching, in the manner of diffusers."""

import importlib as _importlib
import logging as _logging
import sys as _sys
from pathlib import Path as _Path
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING as _TYPE_CHECKING

__version__ = "0.1.0"

# In a source checkout the component folders lie beside this one; an installed copy has them inside it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and (_root / "pipelines").is_dir():
    __path__.append(str(_root))

COMPONENTS = {  # class: module; the names stand in saved pipelines
    "ContextUNetSRModel": "flowsr.models.unet_sr_context",
    "DDPMSRPipeline": "flowsr.pipelines.pipeline_ddpm_sr",
    "EncodedSRModel": "flowsr.models.encoded_sr",
    "FlowMatchPipeline": "flowsr.pipelines.pipeline_flow_match",
    "FlowMatchSREulerScheduler": "flowsr.schedulers.scheduling_flow_match_sr_euler",
    "FlowMatchSRPipeline": "flowsr.pipelines.pipeline_flow_match_sr",
    "UNetSRModel": "flowsr.models.unet_sr",
}
_HOMES = {
    **COMPONENTS,
    "FlowMatchSRBlocks": "flowsr.pipelines.modular_flow_match_sr",
    "Upscaler": "flowsr.upscaler",
    "stream": "flowsr.streaming",
}

__all__ = [
    "ContextUNetSRModel",
    "DDPMSRPipeline",
    "EncodedSRModel",
    "FlowMatchPipeline",
    "FlowMatchSRBlocks",
    "FlowMatchSREulerScheduler",
    "FlowMatchSRPipeline",
    "UNetSRModel",
    "Upscaler",
    "bundled",
    "stream",
]

if _TYPE_CHECKING:
    from flowsr.models.encoded_sr import EncodedSRModel
    from flowsr.models.unet_sr import UNetSRModel
    from flowsr.models.unet_sr_context import ContextUNetSRModel
    from flowsr.pipelines.modular_flow_match_sr import FlowMatchSRBlocks
    from flowsr.pipelines.pipeline_ddpm_sr import DDPMSRPipeline
    from flowsr.pipelines.pipeline_flow_match import FlowMatchPipeline
    from flowsr.pipelines.pipeline_flow_match_sr import FlowMatchSRPipeline
    from flowsr.schedulers.scheduling_flow_match_sr_euler import FlowMatchSREulerScheduler
    from flowsr.streaming import stream
    from flowsr.upscaler import Upscaler


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


# torch and diffusers take seconds to import, so `import flowsr` and `flowsr --help` leave them until a class is used.


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(_importlib.import_module(_HOMES[name]), name)
    if name in ("models", "pipelines", "schedulers"):
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


class _Deferred(_ModuleType):
    """A component's module until its first use: diffusers looks for it among the loaded modules."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if _sys.modules.get(self.__name__) is self:
            del _sys.modules[self.__name__]
        return getattr(_importlib.import_module(self.__name__), name)


for _module in COMPONENTS.values():
    _sys.modules.setdefault(_module, _Deferred(_module))


def _demote(record: _logging.LogRecord) -> bool:
    """Takes one warning of bitsandbytes for information.

    It is given when diffusers imports peft, which imports bitsandbytes, and is about a kernel for 4-bit weights.
    """
    if str(record.msg).startswith("Failed to load CPU gemm_4bit_forward"):
        record.levelno, record.levelname = _logging.INFO, "INFO"
    return record.levelno >= _logging.getLogger(record.name).getEffectiveLevel()


_logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_demote)
