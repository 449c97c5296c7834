from .unet_sr import UNetSRModel
from .unet_sr_context import ContextUNetSRModel

__all__ = ["ContextUNetSRModel", "UNetSRModel"]
