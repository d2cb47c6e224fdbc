"""Dynamic Mask Attention: trainable, content-aware sparse attention (arXiv 2508.02124)."""

from dynamask.errors import CacheRollbackError, InvalidInputError
from dynamask.expiry import key_expiry
from dynamask.ops import dynamic_mask_attention, interval_attention

__version__ = "0.1.0"
__all__ = ["CacheRollbackError", "InvalidInputError", "dynamic_mask_attention", "interval_attention", "key_expiry"]
