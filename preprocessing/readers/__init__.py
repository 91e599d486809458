"""One file for each kind of corpus; each has `parts` (what there is to read) and `read` (the documents of a unit)."""
