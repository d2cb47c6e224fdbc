"""Small language models for the studies: the engine and the token streams it reads."""
