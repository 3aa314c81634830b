"""Parsing and serialization that several APIs share."""
