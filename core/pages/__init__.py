"""Pages to look at: one design for every command, in one file that opens offline."""
