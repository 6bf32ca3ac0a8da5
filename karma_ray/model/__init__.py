"""Item encoder, user decoder and the train-only decoders around one Hugging Face backbone."""
