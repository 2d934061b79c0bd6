"""Importers of other tools' traces, one format a file."""
