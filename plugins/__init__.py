"""The built-in strategies: one file each, named as its entry point."""
