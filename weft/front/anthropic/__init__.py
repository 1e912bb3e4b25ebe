"""Anthropic's HTTP API: request structs, answers, streams and errors in its shapes."""
