"""Number formats, one module each."""
