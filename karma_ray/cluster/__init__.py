"""Everything on Ray: preparation, embedding, training, tuning, studies and serving."""
