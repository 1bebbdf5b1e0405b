"""Studies: a grid of variants and seeds, criteria, tables, figures."""
