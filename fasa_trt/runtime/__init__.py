"""Running engines: one file a backend, and generation on top that does not know which one it drives."""
