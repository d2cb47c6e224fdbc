"""Give a dense model dynamic mask attention: the same logits up to `window` tokens, sparse and trainable beyond."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynamask import BoundedCache, convert

torch.manual_seed(0)
# Any Llama, Mistral, Qwen2, Qwen3 or SmolLM3 checkpoint does: AutoModelForCausalLM.from_pretrained(...)
dense = LlamaForCausalLM(
    LlamaConfig(vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
).eval()
sparse = convert.upcycle(dense, window=32, local=8, sinks=2)
tokens = torch.randint(0, 200, (1, 100))

with torch.no_grad():
    near = (sparse(tokens[:, :32]).logits - dense(tokens[:, :32]).logits).abs().max()
    far = (sparse(tokens).logits - dense(tokens).logits)[:, 32:].abs().max()
print(f"difference from the dense model within the window: {near:.1e}, beyond it: {far:.1e}")

optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-3)
sparse.train()
for step in range(5):
    loss = sparse(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")

cache = BoundedCache(sparse.config)
sparse.eval().generate(tokens, max_new_tokens=50, past_key_values=cache, pad_token_id=0, attention_mask=tokens > -1)
print(f"after {cache.get_seq_length()} tokens the cache holds {cache.layers[0].keys_held.max()} keys per head")

# The last layer left dense: its cache grows with the text.
mixed = convert.upcycle(dense, window=32, local=8, sinks=2, dense_layers=[-1])
answer = mixed.eval().generate(
    tokens, max_new_tokens=50, pad_token_id=0, attention_mask=tokens > -1, return_dict_in_generate=True
)
*bounded, whole = answer.past_key_values.layers
kept = [*(int(layer.keys_held.max()) for layer in bounded), whole.keys.shape[2]]
print(f"keys per head in the caches of a layer with a window and of one left dense: {kept}")
