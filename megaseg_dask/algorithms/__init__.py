"""Pure: integers and arrays. No files, no cluster, no torch."""
