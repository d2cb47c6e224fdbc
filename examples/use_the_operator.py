"""The operator alone: sliding window, dense, packed documents and content-aware sparsity are one call."""

from __future__ import annotations

import torch

from dynamask import dynamic_mask_attention, interval_attention, key_expiry

torch.manual_seed(0)
length, window = 256, 32
query = torch.randn(1, 4, length, 16)  # (batch, query heads, length, head_dim)
key, value = torch.randn(1, 2, length, 16), torch.randn(1, 2, length, 16)  # two key/value heads
scores = torch.randn(1, 2, length, requires_grad=True)  # one score per key

# Dynamic mask attention: the `window` best-scored keys of each query's prefix.
output = dynamic_mask_attention(query, key, value, scores, window)
output.square().mean().backward()
print(f"dynamic mask: output {tuple(output.shape)}, gradient of the scores {scores.grad.norm():.4f}")

# The mask itself: key j is visible to the queries j <= i < expiry[j].
expiry = key_expiry(scores, window)
lifetime = expiry - torch.arange(length)
print(
    f"lifetimes: {int((lifetime == 0).sum())} keys are dead on arrival, the longest lives {int(lifetime.max())} queries"
)
print(f"work: {int(lifetime.sum())} query-key pairs of {length * (length + 1)} dense ones")

# A sliding window and dense causal attention are other intervals.
position = torch.arange(length, dtype=torch.int32)
sliding = interval_attention(query, key, value, (position + window).clamp(max=length).expand(1, 2, -1))
dense = interval_attention(query, key, value, torch.full((1, 2, length), length, dtype=torch.int32))
expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
torch.testing.assert_close(dense, expected, atol=1e-5, rtol=1e-5)
print(
    f"dense agrees with PyTorch; the window's output differs from it by {(sliding - dense).abs().mean():.3f} on average"
)

# Packed documents: no key outlives its document.
segment_ids = (position >= 100).long()[None]
packed = dynamic_mask_attention(query, key, value, scores, window, segment_ids=segment_ids)
first = dynamic_mask_attention(query[:, :, :100], key[:, :, :100], value[:, :, :100], scores[:, :, :100], window)
torch.testing.assert_close(packed[:, :, :100], first)
print("packed documents equal separate ones")
