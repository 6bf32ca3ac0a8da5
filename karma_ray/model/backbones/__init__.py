"""One module per family of language models; the only room that imports transformers."""
