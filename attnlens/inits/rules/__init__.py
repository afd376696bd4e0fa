"""The rules behind the initialisers: one file each, registered by name in `attnlens.inits.registry`."""
