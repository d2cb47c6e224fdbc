"""A fast recurrent model with one layer of attention: dense, sliding, or over the keys of the best learned ranks."""
