"""Errors, units, files, documents, progress and threads: nothing about models."""
