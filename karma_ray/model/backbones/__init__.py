"""One module per family of language models, behind one record; the only door to transformers."""
