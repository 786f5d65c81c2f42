"""The registry library: names, manifests, the store, and the sources models come from."""
