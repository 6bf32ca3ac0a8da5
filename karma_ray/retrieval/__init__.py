"""Bundle, index and retriever, which serving and evaluation share."""
