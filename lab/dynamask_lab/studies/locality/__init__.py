"""Forms of DMA and rivals at a small window."""
