"""From scratch: the paper's form where its window holds the context, and learned ranks with windows per head."""
