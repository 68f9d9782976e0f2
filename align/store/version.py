"""The version of align, which every record holds."""

VERSION = "0.2.0"
