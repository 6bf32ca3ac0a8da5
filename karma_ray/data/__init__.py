"""Table schemas, importers, sessions, splits, the catalogue, the collator and the toy shop."""
