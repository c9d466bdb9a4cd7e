"""Stage 1: find each attention head's dominant frequency chunks from a small text corpus."""
