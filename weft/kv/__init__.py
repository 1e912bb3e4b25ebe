"""The KV slots: evict, compress, store, reuse, offload."""
