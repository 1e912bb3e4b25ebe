"""A server under requests whose answers are known, while things die under it: what is lost, what is wrong, what leaks."""
