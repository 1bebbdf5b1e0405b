"""The studies that come with the engine: a TOML file each."""
