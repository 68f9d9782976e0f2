"""The version of align, which every record holds."""

VERSION = "0.3.0"
