"""The ceiling of choosing keys: one dense model that attends to the newest, the best static and the best keys."""
