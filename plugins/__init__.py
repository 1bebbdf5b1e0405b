"""The built-in strategies: one file each, named after its entry point."""
