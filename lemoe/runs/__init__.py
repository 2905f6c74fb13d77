"""Whole jobs: teaching an edit file to an adaptor, choosing a layer, making an adaptor smaller."""
