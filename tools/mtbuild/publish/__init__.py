"""Act three: decides by evidence, and lets a tag out."""
