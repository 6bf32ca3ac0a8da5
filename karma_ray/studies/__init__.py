"""Many runs: tables of rows, searches, records and what they say together."""
