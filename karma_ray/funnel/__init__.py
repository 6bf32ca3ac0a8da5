"""The three stages of a search system, recall, pre-ranking and ranking, measured together."""
