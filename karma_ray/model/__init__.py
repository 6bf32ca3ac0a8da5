"""KARMA's model: item encoder, user decoder, and the decoders that exist only in training."""
