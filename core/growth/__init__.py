"""Growth as a transaction: plans, staging, triggers."""
