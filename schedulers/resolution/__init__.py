"""Resolution: parts of the run on fewer tokens."""
