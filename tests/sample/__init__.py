"""What the bytes mean: documents, tables, pages, codecs, and other readers."""
