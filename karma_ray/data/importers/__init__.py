"""Public datasets -> our tables, one module per dataset."""
