"""Long reading: whole folders of sources as documents, and what is lost of tokens whose last use lies far back."""
