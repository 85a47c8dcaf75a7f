"""Passes and sequences on the workers of an executor: threads, processes or Dask."""
