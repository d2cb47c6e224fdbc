"""DMA with one thing changed at a time."""
