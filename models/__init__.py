from .unet_sr import UNetSRModel

__all__ = ["UNetSRModel"]
