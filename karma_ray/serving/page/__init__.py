"""The search page, and what it asks beside recall: people, pictures, floors and decoded text."""
