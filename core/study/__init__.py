"""Studies: what is compared, what is measured and what is expected, as data; see `spec` for the file's form."""
