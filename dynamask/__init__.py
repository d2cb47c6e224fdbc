"""Dynamic Mask Attention: trainable, content-aware sparse attention (arXiv 2508.02124)."""

from dynamask import convert
from dynamask.cache import BoundedCache
from dynamask.errors import CacheRollbackError, InvalidInputError
from dynamask.ops.expiry import key_expiry
from dynamask.models import DynamaskConfig, DynamaskForCausalLM, DynamaskModel
from dynamask.ops import dynamic_mask_attention, interval_attention

__version__ = "0.1.0"
__all__ = [
    "BoundedCache",
    "CacheRollbackError",
    "DynamaskConfig",
    "DynamaskForCausalLM",
    "DynamaskModel",
    "InvalidInputError",
    "convert",
    "dynamic_mask_attention",
    "interval_attention",
    "key_expiry",
]
