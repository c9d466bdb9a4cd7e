"""Engines behind a network: one folder a protocol, over the runtime's `Service`."""
