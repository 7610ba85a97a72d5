"""Act one: what should exist, and whether it can. Needs no engine."""
