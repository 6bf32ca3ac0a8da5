"""Importers of public data sets into the project's tables, one module per data set."""
