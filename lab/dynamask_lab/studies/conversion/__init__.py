"""Conversion: a pretrained dense model made sparse, beside the dense model and other ways to bound its cache."""
