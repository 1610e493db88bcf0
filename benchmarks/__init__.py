"""One file a question; each prints a table and, with --json, writes what it measured and on what."""
