"""The endpoint without its host: the HTTP application and what answers behind it (no Ray)."""
