"""Plugins found, loaded, checked, configured and bound."""
