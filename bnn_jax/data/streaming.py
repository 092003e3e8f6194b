"""Placeholder until the reader is merged."""


class StreamedSplit: ...
