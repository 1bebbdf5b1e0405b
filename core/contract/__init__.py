"""What a plugin sees: hooks, traits, options, records, and the parts that layers are made of."""
