"""Semantic ids: item embeddings become a few small numbers per item, the table `item_codes`."""
