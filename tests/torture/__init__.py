"""Torture: what the operating system and hostile input do to a run, and whether anything is lost."""
