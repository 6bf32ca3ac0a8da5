"""Bundle, index and retriever: the code that serves is the code that is measured."""
