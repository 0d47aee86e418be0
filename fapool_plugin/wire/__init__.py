"""Bytes between ranks: messages, links, and how both ends of a link meet. What they mean is not known here."""

PROTOCOL_VERSION = 13
"""Of what both ends say; versions are not negotiated."""
