"""Studies of many runs: tables of rows, searches, records, and their evaluation."""
