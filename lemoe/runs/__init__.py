"""Complete runs: training an adaptor on an edit file, choosing a layer, compacting an adaptor."""
